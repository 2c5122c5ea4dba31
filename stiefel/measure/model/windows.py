"""A convolution as a linear map on images: its padding, the windows that it reads, and the map by itself.

A transposed convolution is the adjoint of one, which reads windows of the larger image: its output. Imports ``attach``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from stiefel.attach.select import CONVOLUTIONS

if TYPE_CHECKING:
    from jaxtyping import Shaped

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_MAPS = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}
_ADJOINTS = {
    1: nn.functional.conv_transpose1d,
    2: nn.functional.conv_transpose2d,
    3: nn.functional.conv_transpose3d,
}


def dimensions(layer: nn.Module) -> int:
    """Of the images that a convolution reads; 0 for a Linear."""
    return len(layer.kernel_size) if isinstance(layer, CONVOLUTIONS) else 0


def is_transposed(layer: nn.Module) -> bool:
    """Whether it is a transposed convolution."""
    return isinstance(layer, TRANSPOSED)


def paddings(layer: Any) -> tuple[tuple[int, int], ...]:
    """Entries added before and after each dimension of the image that windows are read from."""
    if layer.padding == "valid":
        return ((0, 0),) * len(layer.kernel_size)
    if layer.padding == "same":  # which needs stride 1; torch adds the odd one after
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((p, p) for p in layer.padding)


def padded(layer: Any, images: Shaped[Tensor, "b c *size"]) -> Shaped[Tensor, "b c *padded"]:
    """Images as windows are read from them, by the layer's ``padding_mode``."""
    flat = [entries for pair in reversed(paddings(layer)) for entries in pair]
    if not any(flat):
        return images
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return nn.functional.pad(images, flat, mode=mode)


def windows(layer: Any, images: Shaped[Tensor, "b c *size"]) -> Shaped[Tensor, "b *positions c *kernel"]:
    """What the kernel meets at each position, as a view of the padded images: entries are shared, not copied."""
    found, n = padded(layer, images), dimensions(layer)
    for axis, (k, stride, dilation) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), 2):
        found = found.unfold(axis, dilation * (k - 1) + 1, stride)[..., ::dilation]
    return found.movedim(1, n + 1)


def apply(
    layer: Any, weight: Tensor, images: Shaped[Tensor, "b c *size"], size: tuple[int, ...]
) -> Shaped[Tensor, "b o *out"]:
    """The layer's map with another weight of its shape, without the bias.

    Args:
        layer: a convolution, of either kind.
        weight: in the dtype of the images.
        images: what enters.
        size: of the images that leave it, which a transposed convolution may choose.
    """
    n = dimensions(layer)
    if not is_transposed(layer):
        return _MAPS[n](padded(layer, images), weight, None, layer.stride, 0, layer.dilation, layer.groups)
    more = [
        out - ((n_in - 1) * s - 2 * p + d * (k - 1) + 1)
        for out, n_in, s, p, d, k in zip(
            size, images.shape[2:], layer.stride, layer.padding, layer.dilation, layer.kernel_size, strict=True
        )
    ]
    return _ADJOINTS[n](images, weight, None, layer.stride, layer.padding, more, layer.groups, layer.dilation)


def kernels(layer: Any, weight: Tensor) -> Shaped[Tensor, "g o i taps"]:
    """Per group the filters (o, i, taps) that read windows; of a transposed convolution, those of its adjoint."""
    return weight.reshape(layer.groups, weight.shape[0] // layer.groups, weight.shape[1], -1)
