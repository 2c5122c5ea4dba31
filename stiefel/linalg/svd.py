"""The nearest orthonormal matrix by singular value decomposition: exact, without a gradient. Imports ``linalg``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stiefel.linalg.precision import in_double

if TYPE_CHECKING:
    from jaxtyping import Float


@torch.no_grad()
def nearest_orthonormal(v: Float[Tensor, "*batch p n"]) -> Float[Tensor, "*batch p n"]:
    """Nearest matrix with orthonormal rows in the Frobenius norm: ``U Vᴴ`` of the SVD ``V = U S Vᴴ``.

    Args:
        v: any finite matrix with p ≤ n, also rank-deficient (then the nearest point is not unique, and the one
            returned completes the row space orthonormally).

    Returns:
        X with X Xᴴ = I to rounding, in the dtype of ``v``; computed in double precision.

    Source: Fan and Hoffman (1955); Higham, Functions of Matrices (2008), Theorem 8.4.
    """
    u, _, vh = torch.linalg.svd(in_double(v), full_matrices=False)
    return (u @ vh).to(v.dtype)
