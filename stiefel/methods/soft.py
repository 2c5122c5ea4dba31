"""Soft orthogonality: a penalty on the distance of the Gram matrix from the identity."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stiefel.constraint import Penalty
from stiefel.linalg import gram_residual
from stiefel.methods import register


@register
@dataclass(frozen=True, kw_only=True)
class Soft(Penalty):
    """``Φ(X) = ‖X Xᵀ − I‖_F²`` on the smaller side's Gram matrix.

    Gradient ``4 (XXᵀ − I) X``. Gradient descent with rate lr is stable near the set only for lr · strength < ¼: there a
    singular value's deviation is multiplied by 1 − 8 · lr · strength.

    Source: Bansal, Chen and Wang, Can We Gain More from Orthogonality Regularizations, NeurIPS 2018, eq. 1.
    """

    name = "soft"
    summary = "penalty ‖XXᵀ − I‖_F² (SO)"
    reference = "Bansal et al., NeurIPS 2018"

    def penalty(self, x: Tensor) -> Tensor:
        """Squared Frobenius norm of the Gram residual of each matrix."""
        return gram_residual(x).square().sum(dim=(-2, -1))
