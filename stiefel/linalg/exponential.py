"""The matrix exponential of a low-rank rotation applied to a point. Imports ``linalg``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stiefel.linalg.cayley import low_rank_blocks
from stiefel.linalg.products import balance, skew

if TYPE_CHECKING:
    from jaxtyping import Float


def exponential_step(x: Float[Tensor, "*batch p n"], b: Float[Tensor, "*batch p n"]) -> Float[Tensor, "*batch p n"]:
    """Rotate the rows of X by an exponential: ``X expm(A)`` with ``A = XᴴB − BᴴX``, as :func:`cayley_step` does.

    A has rank 2p. With ``cUZ = A``, ``U = [Xᴴ, B̂ᴴ]``, ``Z = [B̂; −X]``, ``B = c B̂`` and ``φ(M) = (e^M − I)/M``,

        X⁺ = X + c · XU φ(c ZU) Z,        [e^M, φ(M); 0, I] = expm [M, I; 0, 0]

    so that nothing is larger than 4p×4p; where 4p ≥ n the n×n exponential is cheaper, and taken.

    Args:
        x: the point, p ≤ n; orthonormal rows are kept orthonormal.
        b: the direction; for a tangent U take ``B = U(I − ½XᴴX)``, which makes X A = U.

    Source: Higham, Functions of Matrices (2008), Theorem 1.35 and Problem 10.10.
    """
    p, n = x.shape[-2:]
    if 4 * p >= n:
        return x @ torch.linalg.matrix_exp(2 * skew(x.mH @ b))
    c = balance(b)
    b = b / c
    xu, zu = low_rank_blocks(x, b)
    eye = torch.eye(2 * p, dtype=x.dtype, device=x.device).expand(*x.shape[:-2], 2 * p, 2 * p)
    top = torch.cat([c * zu, eye], dim=-1)
    phi = torch.linalg.matrix_exp(torch.cat([top, torch.zeros_like(top)], dim=-2))[..., : 2 * p, 2 * p :]
    w = c * (xu @ phi)
    return x + w[..., :p] @ b - w[..., p:] @ x
