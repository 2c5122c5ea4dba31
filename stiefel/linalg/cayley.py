"""The Cayley transform applied to a point, never building n×n where p is small. Imports ``linalg``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stiefel.linalg.lu import inverse_of, solve, solve_from_the_right
from stiefel.linalg.precision import has_double, widened
from stiefel.linalg.products import add_product, balance, frobenius, skew, sym
from stiefel.linalg.tracing import readable

if TYPE_CHECKING:
    from jaxtyping import Float

SHORT = 4.0
"""Largest ‖U‖_F at which N below is well conditioned: its condition number is at most 1 + ¼‖U‖²."""
LONGEST, LONGEST_ALONE = 1e8, 30.0
"""Largest ‖B‖_F of a transform: beyond the first, even double loses all digits of I beside A; in float32 alone, where
the device has no fast double, beyond the second, which turns by 170 degrees, the low-rank form loses too many."""


def cayley_step(x: Float[Tensor, "*batch p n"], b: Float[Tensor, "*batch p n"]) -> Float[Tensor, "*batch p n"]:
    """Rotate the rows of X by a Cayley transform: ``X (I + ½A)(I − ½A)⁻¹`` with ``A = XᴴB − BᴴX``.

    A has rank 2p, so wherever 2p < n the Sherman-Morrison-Woodbury form is used: with ``U = [Xᴴ, B̂ᴴ]`` (n×2p),
    ``Z = [B̂; −X]`` (2p×n), ``B = c B̂``, c = ‖B‖_F/√p:

        X⁺ = X + c · XU (I₂ₚ − (c/2) ZU)⁻¹ Z

    Neither U nor Z is formed, and the solve is from the left: p right-hand sides instead of n.

    Without the balancing by c the 2p×2p system mixes entries of very different size, and float32 loses four digits. Any
    c gives the same point, so the derivative takes it as a constant, and is right at B = 0 too. Systems are solved in
    double where B is not short: I − ½A has singular values between 1 and 1 + ½‖A‖, and float32 loses that factor (in
    the low-rank form its square, for directions of low rank).

    Args:
        x: the point, p ≤ n; orthonormal rows are kept orthonormal.
        b: the direction, of any length; cut to ``LONGEST`` where it is longer. For a tangent U take
            ``B = U(I − ½XᵀX)``, which makes X A = U (:func:`stiefel.manifold.retractions.retract_cayley`).

    Returns:
        X⁺, the same shape and dtype.

    Source: Wen and Yin (2013), Lemma 4, in rows form.
    """
    p, n = x.shape[-2:]
    b = limited(b, LONGEST if has_double(b.device) else LONGEST_ALONE)
    c = balance(b)  # (*batch, 1, 1)
    short = readable(c) and float(c.max() if c.numel() else 0) <= 1
    # The low-rank system is 2p×2p: where 2p ≥ n, A itself (n×n) is no larger.
    if 2 * p >= n:
        wide = x if short else widened(x)
        a = 2 * skew(wide.mH @ b.to(wide.dtype))
        # X + XA (I − ½A)⁻¹; the right-hand solve is a solve with the transpose.
        return x + solve_from_the_right(wide @ a, _identity(n, a) - 0.5 * a).to(x.dtype)
    b = b / c
    xu, zu = low_rank_blocks(x, b) if short else low_rank_blocks(widened(x), widened(b))
    # w = c XU (I − (c/2)ZU)⁻¹ is (*batch, p, 2p); its halves multiply the two blocks of Z = [B̂; −X].
    w = (c * solve_from_the_right(xu, _identity(2 * p, xu) - (0.5 * c) * zu)).to(x.dtype)
    return x + w[..., :p] @ b - w[..., p:] @ x


def cayley_along(x: Float[Tensor, "*batch p n"], u: Float[Tensor, "*batch p n"]) -> Float[Tensor, "*batch p n"]:
    """:func:`cayley_step` along a tangent U: with ``B = U(I − ½XᴴX)``, for which X A = U.

    Square matrices, and short steps of others, need p×p systems only. With S = UXᴴ (skew-Hermitian) and V = U − SX, the
    part of U that is orthogonal to X's rows, ``XA = SX + V`` and ``VA = −VVᴴX``, so that X⁺(I − ½A) = X(I + ½A) gives

        X⁺ = −X + N⁻¹(2X + V) = X + N⁻¹(U − ½VVᴴX),   N = I − ½S + ¼VVᴴ

    The second form is used: it adds the step to X, so that X's own digits are not rounded again.

    Args:
        x: the point, orthonormal rows.
        u: the tangent, X Uᴴ skew-Hermitian.
    """
    p, n = x.shape[-2:]
    short = readable(u) and (not u.numel() or float(frobenius(u.detach()).max()) <= SHORT)
    if p == n:  # V = 0
        u = limited(u, LONGEST if has_double(u.device) else LONGEST_ALONE)
        wide = x if short else widened(x)
        # S = UXᴴ, skew by construction: then the result is a rotation of X even if U is tangent only to rounding.
        turn = skew(u.to(wide.dtype) @ wide.mH)
        return x + solve(_identity(p, turn) - 0.5 * turn, turn @ wide).to(x.dtype)
    s = u @ x.mH
    # The short form assumes XXᴴ = I. Off the set it is another function of X than cayley_step, so that derivatives with
    # respect to X must not use it.
    off_set = torch.is_grad_enabled() and x.requires_grad
    if off_set or not short:
        return cayley_step(x, u - 0.5 * s @ x)
    # ½VVᴴ = ½(UUᴴ − SSᴴ), without V. sym(S) is 0 for a tangent U; it takes out what rounding has moved off the tangent
    # space.
    half = 0.5 * (u @ u.mH - s @ s.mH)
    inverse = inverse_of(_identity(p, s) + 0.5 * half - 0.5 * skew(s))
    return add_product(x, inverse, add_product(u, half + sym(s), x, alpha=-1))


def limited(b: Float[Tensor, "*batch p n"], longest: float) -> Float[Tensor, "*batch p n"]:
    """B, shortened to ``‖B‖_F = longest`` where it is longer, without an overflow."""
    size = frobenius(b)
    if readable(b) and (not b.numel() or float(size.detach().max()) <= longest):
        return b
    # A NaN norm fails the test above and stays NaN here.
    return b * (longest / size.clamp_min(longest))


def _identity(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)


def low_rank_blocks(x: Float[Tensor, "*batch p n"], b: Float[Tensor, "*batch p n"]) -> tuple[Tensor, Tensor]:
    """``XU`` (p×2p) and ``ZU`` (2p×2p) for ``U = [Xᴴ, Bᴴ]`` and ``Z = [B; −X]``, in three products."""
    xx, xb, bb = x @ x.mH, x @ b.mH, b @ b.mH
    xu = torch.cat([xx, xb], dim=-1)
    # ZU = [[BXᴴ, BBᴴ], [−XXᴴ, −XBᴴ]]: the lower half is −XU.
    return xu, torch.cat([torch.cat([xb.mH, bb], dim=-1), -xu], dim=-2)
