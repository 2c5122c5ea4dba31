"""The matrix exponential of a low-rank rotation applied to a point. Imports ``linalg``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stiefel.linalg.cayley import low_rank_blocks
from stiefel.linalg.precision import in_double
from stiefel.linalg.products import balance, is_short, skew

if TYPE_CHECKING:
    from jaxtyping import Float


def exponential_step(x: Float[Tensor, "*batch p n"], b: Float[Tensor, "*batch p n"]) -> Float[Tensor, "*batch p n"]:
    """Rotate the rows of X by an exponential: ``X expm(A)`` with ``A = XᴴB − BᴴX``, as :func:`cayley_step` does.

    A has rank 2p. With ``cUZ = A``, ``U = [Xᴴ, B̂ᴴ]``, ``Z = [B̂; −X]``, ``B = c B̂``, the last rows of Z are −X, and
    ``Z f(UZ) = f(ZU) Z`` for every power series f:

        X⁺ = X − [0, I] (expm(c ZU) − I) Z

    The exponential is of a 2p×2p matrix; where 2p ≥ n the n×n one is cheaper, and used. Unless B is short both are
    computed in double: digits are lost in proportion to the length of the rotation, or to its square where B has a
    lower rank than X, which double tolerates up to lengths of 10⁵.

    Args:
        x: the point, p ≤ n; orthonormal rows are kept orthonormal.
        b: the direction; for a tangent U take ``B = U(I − ½XᴴX)``, which makes X A = U.

    Source: Higham, Functions of Matrices (2008), Theorem 1.35 and Corollary 1.34.
    """
    p, n = x.shape[-2:]
    if not is_short(b) and x.dtype != in_double(x).dtype:
        return exponential_step(in_double(x), in_double(b)).to(x.dtype)
    if 2 * p >= n:  # A = XᴴB − BᴴX itself
        return x @ torch.linalg.matrix_exp(2 * skew(x.mH @ b))
    c = balance(b)
    b = b / c
    _, zu = low_rank_blocks(x, b)
    # The last p rows of expm(c ZU) − I, (*batch, p, 2p). I is subtracted before Z is applied: the step is then added
    # to X, whose own digits are not rounded again.
    turned = torch.linalg.matrix_exp(c * zu)[..., p:, :] - torch.eye(2 * p, dtype=x.dtype, device=x.device)[p:]
    return x - turned[..., :p] @ b + turned[..., p:] @ x
