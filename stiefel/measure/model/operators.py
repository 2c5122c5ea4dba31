"""Singular values of convolutions as operators on whole images, not of their flattened kernels.

With circular padding and stride 1 the operator is block diagonal in the Fourier basis: its singular values are those of
the matrices ``K(ω) = Σ_t W_t e^{iω·t}`` (outputs × inputs) at the image's frequencies ω, t over the kernel. With stride
s, a dimension's s frequencies ``φ + 2π j/s`` fall on one of the output, and the blocks are ``[K(φ + 2π j/s)]_j / √s``
(outputs × s inputs). Groups are blocks of their own, and a dilation multiplies t. Windows that are disjoint, without
padding (k ≤ s; a 1×1 kernel), are blocks too: whatever the padding mode, no window wraps around. A transposed
convolution is the adjoint of such an operator.

Any other operator (zero padding) is written out as a matrix where it has few rows or columns. Where it has many, the
largest singular value alone is found, by the Lanczos iteration on products with T and Tᴴ, from below. It is at most
that of circular padding on an image larger by the kernel's reach.

Imports ``taps``, ``windows``, ``spectrum`` and ``attach``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from stiefel.attach import constrained_weights
from stiefel.attach.select import CONVOLUTIONS
from stiefel.linalg import in_double
from stiefel.measure.model.spectrum import lanczos
from stiefel.measure.model.taps import UNCALLED, Place, Taps, linear_maps
from stiefel.measure.model.windows import apply, is_transposed, kernels, paddings

if TYPE_CHECKING:
    from jaxtyping import Float

EXACT_TO = 256
"""Rows or columns, whichever are fewer, of an operator that is written out as a matrix."""
ENTRIES = 2**22
"""Complex entries of the blocks that are decomposed at once."""
RESIDUAL = 1e-4
"""Relative residual of TᴴT at which the Lanczos iteration for the largest singular value stops."""

Map = Callable[[Tensor], Tensor]
How = Literal["frequencies", "matrix", "lanczos"]


@dataclass(frozen=True)
class OperatorSpectrum:
    """Singular values of one convolution, without its bias, as a map from images to images.

    ``largest`` is its operator norm ‖T‖₂, by which it lengthens an image at most; ``smallest`` the least of its
    min(rows, columns) singular values, None where it is not known. ``kernel`` is the largest singular value of the
    flattened kernel, which orthogonality constrains. ``how`` they were found: ``"frequencies"`` and ``"matrix"`` are
    exact and have all singular ``values``, descending; ``"lanczos"`` has the largest alone. ``size`` is that of the
    images which enter. What was not measured is None, with the ``reason``.
    """

    largest: float | None
    smallest: float | None
    kernel: float | None
    size: tuple[int, ...]
    how: How | None
    values: Float[Tensor, " r"] | None = field(default=None, compare=False)
    reason: str | None = None


def operator_spectrum(
    model: nn.Module,
    run: Callable[[], Any],
    *,
    circular: bool = False,
    unconstrained: bool = False,
    exact_to: int = EXACT_TO,
) -> dict[str, OperatorSpectrum]:
    """Singular values of each convolution as an operator on the images that it meets.

    ``operator_spectrum(model, lambda: model(x))``

    All are exact with circular padding, for windows that do not overlap, and on images of up to ``exact_to`` entries;
    else the largest alone, with an error of 5e-5 at most (1e-7 is usual), from below.
    An orthonormal kernel does not make an orthogonal operator: of a k×k kernel with stride 1, ‖T‖₂ may be up to k.

    Args:
        model: whose Conv1-3d and ConvTranspose1-3d with a constrained weight are measured.
        run: calls the model; sizes of images are those of a layer's first call.
        circular: whether each convolution is taken as with circular padding that keeps the image's size (divided by
            the stride), as Sedghi et al. do; the stride has to divide the size.
        unconstrained: whether layers without a constraint are measured too.
        exact_to: rows or columns of an operator that is written out.

    Returns:
        By the weights' names, in the order of the layers' first calls, convolutions that were not seen last.

    Source: Sedghi, Gupta and Long, *The Singular Values of Convolutional Layers*, ICLR 2019 (stride 1); Senderovich,
    Bulatova, Obukhov and Rakhuba, *Towards Practical Control of Singular Values of Convolutional Layers*, NeurIPS 2022
    (strides); Wang et al., *Orthogonal Convolutional Neural Networks*, CVPR 2020 (kernel and operator).
    """
    layers = {
        n: m for n, m in linear_maps(model, unconstrained=unconstrained)[0].items() if isinstance(m, CONVOLUTIONS)
    }
    sizes: dict[str, list[tuple[int, ...]]] = {}

    def see(name: str, layer: nn.Module, place: Place, tensor: Tensor) -> None:
        # Of the first call: what enters, then what leaves.
        if len(sizes.setdefault(name, [])) < 2:
            sizes[name].append(tuple(tensor.shape[-len(layer.kernel_size) :]))  # type: ignore[arg-type]

    with torch.no_grad(), Taps(layers, see):
        run()
    weights = {w.name: w.value for w in constrained_weights(model, ties=True) if w.name in layers}
    found = {}
    for name, (size, out) in sizes.items():
        weight = in_double((weights[name] if name in weights else layers[name].weight).detach())
        found[name] = _spectrum(_Operator(layers[name], weight, size, out), circular, exact_to)
    missing = OperatorSpectrum(None, None, None, (), None, reason=UNCALLED)
    return found | {name: missing for name in layers if name not in found}


@dataclass(frozen=True)
class _Operator:
    """A convolution with its weight in double precision, and the sizes of its images."""

    layer: Any
    weight: Tensor
    size: tuple[int, ...]
    out: tuple[int, ...]

    @property
    def fine(self) -> tuple[int, ...]:
        """The image that windows are read from, which a transposed convolution writes."""
        return self.out if is_transposed(self.layer) else self.size

    @property
    def coarse(self) -> tuple[int, ...]:
        """The image that has an entry for each window."""
        return self.size if is_transposed(self.layer) else self.out

    @property
    def entries(self) -> tuple[int, int]:
        """Of an image that enters, and of one that leaves: the operator's columns and rows."""
        return self.layer.in_channels * math.prod(self.size), self.layer.out_channels * math.prod(self.out)

    def __call__(self, images: Float[Tensor, "b columns"]) -> Float[Tensor, "b rows"]:
        """Of images as vectors."""
        return apply(self.layer, self.weight, images.reshape(-1, self.layer.in_channels, *self.size), self.out).flatten(
            1
        )


def _spectrum(operator: _Operator, circular: bool, exact_to: int) -> OperatorSpectrum:
    unknown = OperatorSpectrum(None, None, None, operator.size, None)
    entry = operator.weight.abs().max().item()
    if not math.isfinite(entry):
        return replace(unknown, reason="the weight is not finite")
    # Scaled by a power of two, so that no square leaves the range of numbers.
    unit = 2.0 ** math.frexp(entry)[1]
    operator = replace(operator, weight=operator.weight / unit)
    taps = kernels(operator.layer, operator.weight)
    unknown = replace(unknown, kernel=unit * _flattened_norm(operator.layer, taps))
    periods = _periods(operator, circular)
    fewest = min(operator.entries)
    if periods is not None:
        return _exact(unknown, "frequencies", unit * _of_frequencies(taps, periods))
    if circular:
        why = f"an image of {operator.fine} is not made of whole strides {operator.layer.stride}"
        return replace(unknown, reason=why)
    if fewest <= max(exact_to, 2) or not entry:
        values = torch.linalg.svdvals(_matrix(operator)) if entry else torch.zeros(fewest, dtype=torch.float64)
        return _exact(unknown, "matrix", unit * values)
    why = "the smallest is known of circular padding, of disjoint windows, and of small images alone"
    try:
        return replace(unknown, largest=unit * _norm(operator), how="lanczos", reason=why)
    except RuntimeError as error:  # as ArpackNoConvergence is one
        return replace(unknown, reason=f"{type(error).__name__}: {error}")


def _flattened_norm(layer: nn.Module, taps: Float[Tensor, "g o i t"]) -> float:
    """Of the kernel as constraints read it: outputs by inputs and taps, also where the layer is transposed."""
    filters = (taps.transpose(1, 2) if is_transposed(layer) else taps).flatten(2)
    filters = filters if filters.shape[1] <= filters.shape[2] else filters.mT
    return math.sqrt(torch.linalg.eigvalsh(filters @ filters.mH)[:, -1].max().item())


def _exact(unknown: OperatorSpectrum, how: How, values: Tensor) -> OperatorSpectrum:
    return replace(unknown, largest=values[0].item(), smallest=values[-1].item(), how=how, values=values.cpu())


@dataclass(frozen=True)
class _Period:
    """A dimension along which the operator is periodic.

    Args:
        length: of the image whose frequencies are taken.
        stride, dilation, taps: of the kernel.
        repeats: how many such images stand side by side, none of whose windows reaches into another.
        rest: entries behind them that no window reads.
    """

    length: int
    stride: int
    dilation: int
    taps: int
    repeats: int = 1
    rest: int = 0

    @property
    def coarse(self) -> int:
        """Frequencies of the smaller image."""
        return self.length // self.stride

    def phases(self) -> Tensor:
        """e^{iωt} for each of them, each of the stride's frequencies that fall on it, and each tap."""
        frequency = torch.arange(self.coarse)[:, None] + self.coarse * torch.arange(self.stride)
        turns = frequency[..., None] * self.dilation * torch.arange(self.taps) % self.length
        return torch.polar(torch.ones(turns.shape, dtype=torch.float64), 2 * math.pi / self.length * turns.double())


def _periods(operator: _Operator, circular: bool) -> tuple[_Period, ...] | None:
    """How the operator repeats itself along each dimension; None where it does not along one."""
    layer, found = operator.layer, []
    wraps = circular or layer.padding_mode == "circular"
    for fine, coarse, k, s, d, pad in zip(
        operator.fine, operator.coarse, layer.kernel_size, layer.stride, layer.dilation, paddings(layer), strict=True
    ):
        if pad == (0, 0) and d * (k - 1) < s:
            found.append(_Period(s, s, d, k, coarse, fine - s * coarse))
        elif wraps and (is_transposed(layer) or fine % s == 0) and (circular or fine == coarse * s):
            found.append(_Period(coarse * s if is_transposed(layer) else fine, s, d, k))
        else:
            return None
    return tuple(found)


def _of_frequencies(taps: Float[Tensor, "g o i t"], periods: tuple[_Period, ...]) -> Float[Tensor, " r"]:
    """The singular values of the blocks [K(φ + 2π j/s)]_j / √s of all φ, frequencies of the smaller image."""
    phases = [period.phases().to(taps.device) for period in periods]
    grid = tuple(period.coarse for period in periods)
    at = torch.arange(math.prod(grid))
    times = torch.ones_like(at)
    if not taps.is_complex():
        # The block of −φ is the conjugate of that of φ, with its columns in another order.
        mirror = [-index % n for index, n in zip(torch.unravel_index(at, grid), grid, strict=True)]
        other = torch.stack([index * math.prod(grid[k + 1 :]) for k, index in enumerate(mirror)]).sum(0)
        times, at = (1 + (other != at).long())[at <= other], at[at <= other]
    strides = math.prod(period.stride for period in periods)
    found = []
    for chunk in at.split(max(1, ENTRIES // (taps[..., 0].numel() * strides))):
        wave = taps.new_ones(len(chunk), 1, 1).to(phases[0].dtype)
        for index, phase in zip(torch.unravel_index(chunk, grid), phases, strict=True):
            here = phase[index.to(phase.device)]  # (chunk, j, t) of this dimension, beside those before
            wave = (wave[:, :, None, :, None] * here[:, None, :, None, :]).flatten(3).flatten(1, 2)
        blocks = torch.einsum("fjt,goit->fgoji", wave, taps.to(wave.dtype)) / math.sqrt(strides)
        found.append(torch.linalg.svdvals(blocks.flatten(3)).flatten(1))
    repeats = math.prod(period.repeats for period in periods)
    values = torch.cat(found).repeat_interleave(times.to(taps.device) * repeats, dim=0).flatten()
    g, o, i, _ = taps.shape
    fine = g * i * math.prod(period.length * period.repeats + period.rest for period in periods)
    count = min(fine, g * o * math.prod(grid) * repeats)
    # An entry that no window reads is a singular vector of the value 0. The blocks may have more of them than there are
    # entries, where the last window ends with the image, or fewer, where there is a rest.
    values = torch.cat([values, values.new_zeros(max(0, count - len(values)))])
    return values.sort(descending=True)[0][:count]


def _matrix(operator: _Operator) -> Float[Tensor, "r c"]:
    """The operator as a matrix, or its adjoint, whichever has fewer rows."""
    columns, rows = operator.entries
    images = torch.eye(min(rows, columns), dtype=operator.weight.dtype, device=operator.weight.device)
    return (operator if columns <= rows else _adjoint(operator, rows))(images)


def _norm(operator: _Operator) -> float:
    """‖T‖₂ from the largest eigenvalue of TᴴT or T Tᴴ, whichever is smaller."""
    columns, rows = operator.entries
    maps: tuple[Map, Map] = (operator, _adjoint(operator, 1))
    first, second = maps if columns <= rows else maps[::-1]
    device, dtype = operator.weight.device, operator.weight.dtype
    square = lanczos(lambda v: second(first(v.to(device)[None]))[0].cpu(), min(rows, columns), dtype, RESIDUAL)
    return math.sqrt(square)


def _adjoint(operator: _Operator, batch: int) -> Map:
    """Tᴴ, as the derivative of T, for as many images at a time."""
    with torch.enable_grad():
        columns = operator.entries[0]
        x = torch.zeros(batch, columns, dtype=operator.weight.dtype, device=operator.weight.device, requires_grad=True)
        y = operator(x)
    return lambda dy: torch.autograd.grad(y, x, dy, retain_graph=True)[0]
