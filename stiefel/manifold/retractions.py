"""Retractions and geodesics of the Stiefel manifold, as functions of a point and a tangent. Imports ``linalg``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stiefel.linalg import (
    add_product,
    balance,
    cayley_along,
    exponential_step,
    is_traced,
    limited,
    matrix_exponential,
    may_wait,
    nearest_in_step,
    newton_schulz,
    polar,
    qf,
    skew,
    widened,
)

if TYPE_CHECKING:
    from jaxtyping import Float

LONGEST = 1e4
"""Largest ‖U‖_F of Cayley's retraction, whose largest angle is near π there, and of rotations of a start by an
exponential: up to this length one Newton-Schulz step removes the rounding of the point."""

LONGEST_GEODESIC = 1e6
"""Largest ‖U‖_F of retractions by exponentials: beyond it rounding decides the angles, in float32 that of U itself."""


def retract_qr(x: Float[Tensor, "*batch p n"], u: Float[Tensor, "*batch p n"]) -> Float[Tensor, "*batch p n"]:
    """QR retraction: ``qf(X + U)`` (Absil, Mahony and Sepulchre 2008, Example 4.1.3). First order."""
    return qf(x + u)


def retract_polar(x: Float[Tensor, "*batch p n"], u: Float[Tensor, "*batch p n"]) -> Float[Tensor, "*batch p n"]:
    """Polar retraction: ``polar(X + U)``, the nearest point to X + U (ibid., Example 4.1.3).

    Where it is differentiated, one Newton-Schulz step keeps it on the manifold if U is so long that X + U is
    ill-conditioned.
    """
    v = x + u
    # nearest_in_step is faster and has no gradient. While traced, a tensor may not tell whether it needs one.
    if is_traced() or (torch.is_grad_enabled() and v.requires_grad):
        return newton_schulz(polar(v))
    return nearest_in_step(v)


def retract_cayley(x: Float[Tensor, "*batch p n"], u: Float[Tensor, "*batch p n"]) -> Float[Tensor, "*batch p n"]:
    """Cayley retraction of a tangent U: the transform of ``A = XᵀB − BᵀX``, ``B = U(I − ½XᵀX)``, for which X A = U.

    For U = −η(G − XGᵀX) it is the update of Wen and Yin (2013), ``A = η(GᵀX − XᵀG)``. The rounding of many rotations
    would add up: one Newton-Schulz step removes it. A U longer than ``LONGEST`` is cut to that length.
    """
    return newton_schulz(cayley_along(x, limited(u, LONGEST)))


def exp_euclidean(x: Float[Tensor, "*batch p n"], u: Float[Tensor, "*batch p n"]) -> Float[Tensor, "*batch p n"]:
    """Exact geodesic from X along the tangent U in the Euclidean metric, at time 1.

    With ``A = U Xᵀ`` (skew), ``S = U Uᵀ`` and c = ‖U‖_F/√p, in rows form:

        X⁺ = expm(−A) [I, 0] expm([[A, c I], [−S/c, A]]) [X; U/c]

    Any c gives the same point; this one balances the blocks. With c = 1 the norm of the block matrix is ‖U‖², and
    float32 loses the manifold at ‖U‖ ≈ 100. S is taken as ``VVᵀ − A²``, V = U − AX: where rounding has left U not quite
    tangent, or X not quite on the manifold, UUᵀ would make the exponential grow with ‖U‖.

    Source: Edelman, Arias and Smith (1998), eq. 2.14 (2p×2p exponentials, nothing of size n×n).
    """
    p, c = x.shape[-2], balance(u)
    a = skew(u @ x.mH)
    v = add_product(u, a, x, alpha=-1) / c
    # S/c, with the V/c of the line above: VVᵀ/c − A²/c.
    s = c * (v @ v.mH) - (a / c) @ a
    eye = torch.eye(p, dtype=x.dtype, device=x.device)
    # [I, 0] keeps the top p rows of the 2p×2p exponential.
    block = torch.cat([torch.cat([a, c * eye], -1), torch.cat([-s, a], -1)], -2)
    top = matrix_exponential(block)[..., :p, :]
    turned = matrix_exponential(-a) @ top
    # turned is p×2p and multiplies [X; U/c] block by block.
    return turned[..., :p] @ x + (turned[..., p:] / c) @ u


def exp_canonical(
    x: Float[Tensor, "*batch p n"], u: Float[Tensor, "*batch p n"], longest: float = LONGEST_GEODESIC
) -> Float[Tensor, "*batch p n"]:
    """Exact geodesic from X along the tangent U in the canonical metric, at time 1.

    ``X⁺ = X expm(XᵀB − BᵀX)`` with B = U(I − ½XᵀX), for which X A = U; ``longest`` bounds ‖U‖_F.

    Source: Edelman, Arias and Smith (1998), section 2.4.2 and eq. 2.42.
    """
    return exponential_step(x, u - 0.5 * (u @ x.mH) @ x, longest)


def retract_exp_euclidean(
    x: Float[Tensor, "*batch p n"], u: Float[Tensor, "*batch p n"]
) -> Float[Tensor, "*batch p n"]:
    """:func:`exp_euclidean` as a retraction for any number of steps of any length.

    Exponentials lose digits in proportion to the length of the step: so it is computed in double, cut to
    ``LONGEST_GEODESIC`` where it is longer, and its end is projected onto the set.
    """
    return _projected(exp_euclidean(widened(x), limited(widened(u), LONGEST_GEODESIC)), x.dtype)


def retract_exp_canonical(
    x: Float[Tensor, "*batch p n"], u: Float[Tensor, "*batch p n"]
) -> Float[Tensor, "*batch p n"]:
    """:func:`exp_canonical` as a retraction, as :func:`retract_exp_euclidean`."""
    return _projected(exp_canonical(widened(x), limited(widened(u), LONGEST_GEODESIC)), x.dtype)


def _projected(end: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest point to a curve's end; where the host may not wait, of the end as it will be held."""
    if may_wait(end) or (torch.is_grad_enabled() and end.requires_grad):
        return polar(end).to(dtype)
    return nearest_in_step(end.to(dtype))
