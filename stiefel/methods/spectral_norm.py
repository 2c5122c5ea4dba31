"""Spectral normalization: the largest singular value is 1, the others are free. A control."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stiefel.constraint import Reparameterization, register
from stiefel.layout import Layout
from stiefel.linalg import unit_sized


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
        sigma = torch.linalg.svd(v, full_matrices=False).S
        # Values that are equal to rounding count as tied.
        leads = sigma >= sigma[..., :1] * (1 - 1e3 * torch.finfo(sigma.dtype).eps)
        return v / ((sigma * leads).sum(-1) / leads.sum(-1))[..., None, None]
