"""Convolutions that are orthogonal operators, by orthogonium, as one more method; imported for its name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from stiefel import register
from stiefel.constraint import Reparameterization
from stiefel.errors import LayoutError
from stiefel.layout import Layout
from stiefel.linalg import nearest_orthonormal, polar


@register
@dataclass(frozen=True, kw_only=True)
class AOC(Reparameterization):
    """``K = K₁ ⊛ B₁ ⊛ … ⊛ B_{k−1}``: a 1×1 orthogonal kernel, and 2×2 ones of pairs of projectors, convolved.

    The convolution with K, circular and of stride 1, is an orthogonal operator: it keeps the norm of every image, where
    one with a flattened kernel of orthonormal rows can enlarge it k-fold. That kernel's rows are not orthonormal, so
    that the method claims none. With zero padding the norm is at most 1. The projectors are onto the rows of 2k
    matrices c/2×c, c the larger number of channels, which are trained; the proxy of the kernel itself is not used. The
    kernel is computed by orthogonium's module, the projectors' rows are orthonormalized by this library.

    Source: Li, Haque, Anil, Lucas, Grosse and Jacobsen, NeurIPS 2019 (BCOP); Boissin et al., arXiv 2501.07930 (AOC).
    """

    name = "aoc"
    summary = "orthogonal convolution operator (BCOP as in AOC)"
    reference = "Li et al., NeurIPS 2019; Boissin et al., 2025"
    decay = "rescales"
    real_only = True

    def check(self, layout: Layout) -> None:
        """Refuse what is no 2-d convolution with a square kernel and stride 1."""
        super().check(layout)
        if find_spec("orthogonium") is None:
            raise LayoutError("'aoc' is built by orthogonium, which is not installed: pip install 'stiefel[bench]'")
        kernel = (
            len(layout.shape) == 4 and layout.shape[2] == layout.shape[3] and not (layout.axes or layout.transposed)
        )
        if not kernel or set(layout.stride) - {1} or layout.group_size is not None:
            raise LayoutError(
                f"'aoc' is for 2-d convolutions with square kernels and stride 1, without groups of outputs, and this "
                f"weight has {layout}; exclude it"
            )
        if max(_channels(layout)) < 2:
            raise LayoutError(f"'aoc' needs two channels or more on one side, and this weight has {layout}")

    def start(self, x: Tensor, layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
        """Random projectors: no kernel of the family is known to be nearest to a given one."""
        wide = max(_channels(layout))
        random = torch.randn(len(x), 2 * layout.shape[-1], wide // 2, wide, dtype=x.dtype, device=x.device)
        return x, {"projectors": nn.Parameter(nearest_orthonormal(random))}

    def forward(self, proxy: Tensor, layout: Layout, projectors: Tensor) -> Tensor:
        """Build the kernels of all weights as one grouped kernel."""
        outputs, inputs = _channels(layout)
        build = _builder(len(projectors) * inputs, len(projectors) * outputs, layout.shape[-1], len(projectors))
        kernel = build(polar(projectors).mT)
        rows = kernel.reshape(len(projectors), outputs, -1)
        return rows.mT if layout.columns else rows


def _channels(layout: Layout) -> tuple[int, int]:
    """Outputs and inputs of a block."""
    return layout.out, layout.shape[1]


@cache
def _builder(inputs: int, outputs: int, size: int, groups: int) -> nn.Module:
    from orthogonium.layers.conv.AOC.fast_block_ortho_conv import BCOPTrivializer

    found: nn.Module = BCOPTrivializer(inputs, outputs, size, groups)
    return found
