"""The convolutional networks of Huang et al. (AAAI 2018), at any width, for images of any number of channels.

``width`` multiplies the papers' numbers of filters; the smallest is one. ``norm`` and ``place`` are those of ``norms``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from parts import norms


def vgg(channels: int, classes: int, width: float, norm: str = "none", place: str = "after") -> nn.Sequential:
    """64, 128, pool, 256, 256, pool, 512, 512, average pool; a hidden layer, and the classes."""
    a, b, c, d = (_times(filters, width) for filters in (64, 128, 256, 512))
    net = nn.Sequential()
    for i, (inputs, outputs) in enumerate(zip((channels, a, b, c, c, d), (a, b, c, c, d, d), strict=True), 1):
        norms.add(net, nn.Conv2d(inputs, outputs, 3, padding=1), (f"conv{i}", f"norm{i}"), norm, place, 2)
        net.add_module(f"relu{i}", nn.ReLU())
        if i in (2, 4):
            net.add_module(f"pool{i}", nn.MaxPool2d(2))
    net.add_module("average", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    net.add_module("classifier", nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, classes)))
    return net


# Filters of the 1×1, 3×3 and double 3×3 branches (the latter two after a reduction), and the pooling branch.
_INCEPTION = (
    (64, (64, 64), (64, 96), ("average", 32)),
    (64, (64, 96), (64, 96), ("average", 64)),
    (0, (128, 160), (64, 96), ("max", 0)),
    None,  # halves the resolution
    (224, (64, 96), (96, 128), ("average", 128)),
    (192, (96, 128), (96, 128), ("average", 128)),
    (160, (128, 160), (128, 160), ("average", 96)),
    (96, (128, 192), (160, 192), ("average", 96)),
    (0, (128, 192), (192, 256), ("max", 0)),
    None,
    (352, (192, 320), (160, 224), ("average", 128)),
    (352, (192, 320), (192, 224), ("max", 128)),
)


def inception(channels: int, classes: int, width: float, norm: str = "batch", place: str = "after") -> nn.Sequential:
    """Batch-normalized GoogLeNet for small images (Ioffe and Szegedy, 2015): ten Inception modules."""
    a, b, kind = _times(64, width), _times(192, width), (norm, place)
    net = nn.Sequential(_convolution(channels, a, 3, kind), _convolution(a, b, 3, kind))
    last = b
    for row in _INCEPTION:
        if row is None:
            net.append(_convolution(last, last, 2, kind, stride=2))
        else:
            module = Inception(last, *row, width, kind)
            net.append(module)
            last = module.outputs
    return net.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten()).append(nn.Linear(last, classes))


class Inception(nn.Module):
    """Branches side by side: 1×1, 3×3, 3×3 twice, and a pool."""

    def __init__(
        self,
        inputs: int,
        single: int,
        triple: tuple[int, int],
        double: tuple[int, int],
        pool: tuple[str, int],
        width: float,
        norm: tuple[str, str],
    ) -> None:
        super().__init__()
        (r, t), (s, d) = ([_times(filters, width) for filters in pair] for pair in (triple, double))
        self.branches = nn.ModuleList()
        self.outputs = t + d
        if single:
            self.branches.append(_convolution(inputs, _times(single, width), 1, norm))
            self.outputs += _times(single, width)
        self.branches.append(nn.Sequential(_convolution(inputs, r, 1, norm), _convolution(r, t, 3, norm)))
        twice = (_convolution(a, d, 3, norm) for a in (s, d))
        self.branches.append(nn.Sequential(_convolution(inputs, s, 1, norm), *twice))
        kind, filters = pool
        last = nn.Sequential(nn.AvgPool2d(3, 1, 1) if kind == "average" else nn.MaxPool2d(3, 1, 1))
        if filters:
            last.append(_convolution(inputs, _times(filters, width), 1, norm))
        self.branches.append(last)
        self.outputs += _times(filters, width) if filters else inputs

    def forward(self, x: Tensor) -> Tensor:
        """The branches' outputs, one after the other."""
        return torch.cat([branch(x) for branch in self.branches], 1)


def wide_resnet(
    channels: int, classes: int, width: float, depth: int, norm: str = "batch", dropout: float = 0.3
) -> nn.Sequential:
    """Wide ResNet ``depth``-``10 width`` (Zagoruyko and Komodakis, BMVC 2016): 16, then 160, 320, 640 times width."""
    net, last = nn.Sequential(nn.Conv2d(channels, 16, 3, padding=1, bias=False)), 16
    for stage, filters in enumerate((160, 320, 640)):
        for block in range((depth - 4) // 6):
            stride = 2 if stage and not block else 1
            net.append(Residual(last, _times(filters, width), stride, dropout, norm))
            last = _times(filters, width)
    net.append(norms.norm(norm, last, 2)).append(nn.ReLU())
    return net.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten()).append(nn.Linear(last, classes))


class Residual(nn.Module):
    """Two 3×3 convolutions, each after normalization and ReLU; a 1×1 ``shortcut`` where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float, norm: str) -> None:
        super().__init__()
        self.before = nn.Sequential(norms.norm(norm, inputs, 2), nn.ReLU())
        self.convolutions = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            norms.norm(norm, outputs, 2),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
        )
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``shortcut(x) + convolutions(x)``."""
        y = self.before(x)
        return self.convolutions(y) + (x if self.shortcut is None else self.shortcut(y))


def _convolution(inputs: int, outputs: int, size: int, norm: tuple[str, str], stride: int = 1) -> nn.Sequential:
    net = nn.Sequential()
    convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2 if stride == 1 else 0, bias=False)
    norms.add(net, convolution, ("convolution", "norm"), *norm, 2)
    return net.append(nn.ReLU())


def _times(filters: int, width: float) -> int:
    return max(1, round(filters * width))
