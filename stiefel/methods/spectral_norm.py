"""Spectral normalization: the largest singular value is 1, the others are free. A control."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stiefel.constraint import Reparameterization, register
from stiefel.layout import Layout
from stiefel.linalg import largest_singular_value, unit_sized


@register
@dataclass(frozen=True, kw_only=True)
class SpectralNorm(Reparameterization):
    """``X = V / ‖V‖₂``: a layer that expands nothing, and may shrink anything.

    The norm is exact, by singular values, where the usual implementation tracks it by one power iteration per step.
    Where several share the largest value, as at the orthonormal start, the gradient is the mean of their gradients.

    Source: Miyato, Kataoka, Koyama and Yoshida, ICLR 2018, eq. 8.
    """

    name = "spectral_norm"
    summary = "largest singular value 1, no orthogonality: a control"
    reference = "Miyato et al., ICLR 2018"
    decay = "acts"

    def forward(self, proxy: Tensor, layout: Layout) -> Tensor:
        """Divide by the largest singular value."""
        v = unit_sized(proxy)
        return v / largest_singular_value(v)[..., None, None]
