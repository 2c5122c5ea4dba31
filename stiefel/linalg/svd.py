"""The nearest orthonormal matrix, without a gradient: by singular values, or by products alone. Imports ``linalg``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stiefel.linalg.inverse_root import inverse_root, inverse_root_by_iteration
from stiefel.linalg.precision import in_double
from stiefel.linalg.tracing import is_traced

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


@torch.no_grad()
def nearest_in_step(v: Float[Tensor, "*batch p n"]) -> Float[Tensor, "*batch p n"]:
    """:func:`nearest_orthonormal` for methods that take one per step: float32 by products where they are accurate.

    That is to 1e-6, on a CPU wherever V is not ill-conditioned; on a GPU always, so that the host need not wait for it,
    and what a GPU is handed with linearly dependent rows then lacks rows.
    """
    if v.dtype in (torch.float32, torch.complex64) and not is_traced():
        batch = v.reshape(-1, *v.shape[-2:])
        root = inverse_root_by_iteration(batch) if v.is_cuda else inverse_root(batch)
        if root is not None:
            return (root[0] @ batch.to(root[0].dtype)).to(v.dtype).reshape(v.shape)
    return nearest_orthonormal(v)
