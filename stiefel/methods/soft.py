"""Soft orthogonality: a penalty on the Gram matrix's distance from the identity, in the five published measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from stiefel.constraint import ROUNDING, Penalty, register
from stiefel.errors import LayoutError
from stiefel.layout import Layout
from stiefel.linalg import gram_residual, spectral_radius, squared_residual

KINDS = ("so", "dso", "mc", "srip", "ocnn")


@register
@dataclass(frozen=True, kw_only=True)
class Soft(Penalty):
    """``Φ(X)``, a measure of ``Δ = X Xᵀ − I`` on the smaller side's Gram matrix.

        so     ‖Δ‖_F²                       gradient 4 Δ X
        dso    ‖Δ‖_F² + ‖XᵀX − I‖_F²        = 2 · so + (n − p): the same penalty at half the strength
        mc     max |Δ_ij|                   mutual coherence
        srip   ‖Δ‖₂                         by power iteration, which costs little beside Δ itself
        ocnn   ‖conv(K, K) − I‖_F²          of the convolution as a linear map, not of its flattened kernel

    With so, gradient descent at rate lr is stable near the set only for lr · strength < ¼: there a singular value's
    deviation is multiplied by 1 − 8 · lr · strength. ``ocnn`` takes the stride into account; its minimum is above 0
    where there are more outputs than inputs · stride².

    Args:
        kind: the measure.
        strength: λ ≥ 0, or a callable of the number of optimizer steps taken so far.
        decoupled: act in the step instead of in the loss.

    Source: Bansal, Chen and Wang, NeurIPS 2018, eqs. 1 to 4 and 6; Massart, ICPR 2022, for dso = so; Wang, Chen,
    Chakraborty and Yu, Orthogonal Convolutional Neural Networks, CVPR 2020, eq. 8.
    """

    kind: str = "so"

    name = "soft"
    summary = "penalty on XXᵀ − I: its squared norm (so), or dso, mc, srip, ocnn"
    reference = "Bansal et al., NeurIPS 2018; Wang et al., CVPR 2020"
    tuning: ClassVar = {"kind": KINDS, "strength": (1e-3, 1e-2, 1e-1, 1.0)}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_one_of("kind", KINDS)

    def check(self, layout: Layout) -> None:
        """Refuse ``kind="ocnn"`` where the weight is no plain convolution or matrix."""
        super().check(layout)
        if self.kind == "ocnn" and (layout.transposed or layout.group_size is not None or set(layout.dilation) > {1}):
            raise LayoutError(
                "kind='ocnn' is defined for convolutions that are not transposed, dilated or split by group_size; use "
                "kind='so' for this weight"
            )

    def penalty(self, x: Tensor, layout: Layout) -> Tensor:
        """Φ of each matrix."""
        if self.kind == "ocnn":
            return _convolution_residual(layout.kernels(x), layout.stride)
        if self.kind == "so":
            return squared_residual(x)
        if self.kind == "dso":
            return 2 * squared_residual(x) + (x.shape[-1] - x.shape[-2])
        delta = gram_residual(x)  # its norm has a kink at 0: without care, rounding would move an orthonormal weight
        delta = delta * (delta.abs() > ROUNDING * torch.finfo(x.dtype).eps)
        return delta.abs().amax(dim=(-2, -1)) if self.kind == "mc" else spectral_radius(delta)


def _convolution_residual(kernels: Tensor, stride: tuple[int, ...]) -> Tensor:
    """``‖conv(K, K, stride S, padding P) − I₀‖_F²`` with ``P = ⌊(k−1)/S⌋·S``: the row Gram of the convolution.

    ``kernels`` is (b, out, in, *k); each K is convolved with itself, by one grouped convolution.
    """
    b, out, _, *size = kernels.shape
    stride = stride or (1,) * len(size)
    padding = tuple((k - 1) // s * s for k, s in zip(size, stride, strict=True))
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(size)]
    images = kernels.transpose(0, 1).flatten(1, 2)  # out images of b·in channels
    # Group i convolves the channels of weight i with its own kernels: (out, b·out, *shifts).
    gram = convolve(images, kernels.conj().flatten(0, 1), stride=stride, padding=padding, groups=b)
    gram = gram.unflatten(1, (b, out)).movedim(1, 0)  # (b, out, out, *shifts)
    target = torch.zeros_like(gram)
    middle: Any = (slice(None), *(p // s for p, s in zip(padding, stride, strict=True)))
    # The unshifted position is at padding/stride; there the target is I, and 0 at all other shifts.
    target.movedim((1, 2), (-2, -1))[middle] = torch.eye(out, dtype=gram.dtype, device=gram.device)
    return _square(gram - target)


def _square(a: Tensor) -> Tensor:
    """Squared Frobenius norm of each entry of a batch, also twice differentiable at 0."""
    return (a * a.conj()).real.flatten(1).sum(-1)
