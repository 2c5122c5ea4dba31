"""The sign of a square orthogonal matrix's determinant. Imports ``tracing`` and ``devices``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stiefel.linalg.precision import in_double
from stiefel.linalg.tracing import readable

if TYPE_CHECKING:
    from jaxtyping import Float


def with_determinant(x: Float[Tensor, "b p p"], v: Float[Tensor, "b p p"], sign: int) -> Float[Tensor, "b p p"]:
    """X with a determinant of a sign: where it has the other one, ``X − 2 u uᵀ X``, u V's smallest direction.

    For X the polar factor of V this is the matrix of that sign nearest to V, and continuous in V: where V passes by
    a singular matrix, its smallest singular value changes sign, and the reflection follows it.

    Args:
        x: orthogonal, or near it; computed from V.
        v: any.
        sign: 1 or −1.

    Source: Kabsch (1976); Umeyama (1991), lemma.
    """
    with torch.no_grad():
        wrong = torch.linalg.det(in_double(x)).sign() != sign
    if readable(wrong):
        if not wrong.any():
            return x
        # Of these alone: the gradient of eigenvectors is NaN where two eigenvalues are equal.
        x = x.clone()
        x[wrong] = _reflected(x[wrong], v[wrong])
        return x
    return torch.where(wrong[:, None, None], _reflected(x, v), x)


def _reflected(x: Tensor, v: Tensor) -> Tensor:
    wide = in_double(v)
    u = torch.linalg.eigh(wide @ wide.mT)[1][..., :1].to(x.dtype)  # of the smallest eigenvalue
    return x - 2 * u @ (u.mT @ x)
