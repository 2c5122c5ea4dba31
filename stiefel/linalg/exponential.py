"""The matrix exponential of a low-rank rotation applied to a point. Imports ``linalg``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stiefel.linalg.cayley import low_rank_blocks
from stiefel.linalg.devices import may_wait
from stiefel.linalg.precision import widened
from stiefel.linalg.products import balance, is_short, skew
from stiefel.linalg.tracing import is_traced

if TYPE_CHECKING:
    from jaxtyping import Float

TERMS, HALVED = 16, 0.5
"""Terms of the exponential's series, and the length that matrices are halved to: the rest is below 1e-18."""
LONGEST = 1e6
"""The longest direction that is expected: of retractions by exponentials."""


def exponential_step(
    x: Float[Tensor, "*batch p n"], b: Float[Tensor, "*batch p n"], longest: float = LONGEST
) -> Float[Tensor, "*batch p n"]:
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
        longest: a bound of ‖B‖_F.

    Source: Higham, Functions of Matrices (2008), Theorem 1.35 and Corollary 1.34.
    """
    p, n = x.shape[-2:]
    if not is_short(b) and x.dtype != widened(x).dtype:
        return exponential_step(widened(x), widened(b), longest).to(x.dtype)
    if 2 * p >= n:  # A = XᴴB − BᴴX itself
        return x @ matrix_exponential(2 * skew(x.mH @ b), longest)
    c = balance(b)
    b = b / c
    _, zu = low_rank_blocks(x, b)
    # The last p rows of expm(c ZU) − I, (*batch, p, 2p). I is subtracted before Z is applied: the step is then added
    # to X, whose own digits are not rounded again.
    turned = matrix_exponential(c * zu, longest)[..., p:, :] - torch.eye(2 * p, dtype=x.dtype, device=x.device)[p:]
    return x - turned[..., :p] @ b + turned[..., p:] @ x


def matrix_exponential(a: Float[Tensor, "*batch p p"], longest: float = LONGEST) -> Float[Tensor, "*batch p p"]:
    """``expm(A)`` by torch, and on other devices than a CPU by as many squarings as the longest A would need.

    torch chooses the series by norms that it reads on the host. Here each matrix is halved k times, so that its length
    is at most ½, and squared k times: all are squared, and what is past its k keeps its value.

    Args:
        a: what it is taken of.
        longest: of the direction that A was made of, so that ‖A‖_F is at most four times that.

    Source: Higham, Functions of Matrices (2008), section 10.3; Paterson and Stockmeyer (1973) for the series.
    """
    if may_wait(a) or is_traced():
        return torch.linalg.matrix_exp(a)
    length = torch.linalg.matrix_norm(a.detach(), keepdim=True)
    k = (length / HALVED).clamp_min(1).log2().ceil()
    a = a * torch.exp2(-k)
    square = a @ a
    powers = [torch.eye(a.shape[-1], dtype=a.dtype, device=a.device), a, square, square @ a]
    fourth, x = square @ square, torch.zeros_like(a)
    for low in range(TERMS - 4, -1, -4):  # Horner's form in A⁴
        x = x @ fourth
        for i, power in enumerate(powers):
            x = torch.add(x, power, alpha=1 / math.factorial(low + i))
    for i in range(math.ceil(math.log2(4 * longest / HALVED))):
        x = torch.where(i < k, x @ x, x)
    return x
