"""The Stiefel manifold St(p, n) = {X : X Xᵀ = I}: tangents, gradients, retractions, random points.

Pure functions of ``(*batch, p, n)`` tensors with orthonormal rows; imports only ``linalg`` and torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stiefel.linalg import (
    add_product,
    frobenius,
    nearest_orthonormal,
    project_horizontal,
    readable,
    sym,
)

if TYPE_CHECKING:
    from jaxtyping import Float


NOISE = 32.0
"""Bound of the computed ‖P_X(SX)‖_F of a normal vector SX of length 1, in epsilons, at an X orthonormal to rounding."""


def project_tangent(
    x: Float[Tensor, "*batch p n"], u: Float[Tensor, "*batch p n"], *, horizontal: bool = False
) -> Float[Tensor, "*batch p n"]:
    """Project U orthogonally onto the tangent space at X: ``U − sym(U Xᵀ) X``.

    It is the orthogonal projection in the Euclidean and in the canonical metric alike: normal vectors are S X with S
    symmetric, and both metrics hold them orthogonal to every tangent vector. (Edelman, Arias and Smith 1998, eq. 2.4)
    With ``horizontal`` the part that turns the rows within their span is taken off too.
    """
    if horizontal:
        return project_horizontal(x, u)
    return add_product(u, sym(u @ x.mH), x, alpha=-1)


def tangent_gradient_(
    x: Float[Tensor, "b p n"], g: Float[Tensor, "b p n"], *, horizontal: bool = False
) -> Float[Tensor, "b p n"]:
    """The tangent part of a gradient, ``P_X(G)``, in G's own memory; 0 where it is no more than G's rounding.

    At a stationary point P_X(G) is rounding alone: about 20 epsilons of ‖G‖ at 512×4608 in double, and less elsewhere.
    An optimizer that divides a gradient by its own size would turn it into steps of full length. With ``horizontal``
    the part that turns the rows within their span is taken off too.
    """
    # First, because the next line overwrites G.
    rounding = NOISE * torch.finfo(g.dtype).eps * frobenius(g)
    inside = g @ x.mH
    return _zero_where(rounding, g.baddbmm_(inside if horizontal else sym(inside), x, alpha=-1))


def without_rounding(
    part: Float[Tensor, "*batch p n"], whole: Float[Tensor, "*batch p n"]
) -> Float[Tensor, "*batch p n"]:
    """``part``, and 0 in each matrix where it is no more than the rounding of ``whole``, from which it was computed."""
    return _zero_where(NOISE * torch.finfo(whole.dtype).eps * frobenius(whole), part)


def _zero_where(rounding: Tensor, part: Tensor) -> Tensor:
    small = frobenius(part) <= rounding  # false for NaN, which must not become 0
    # The usual case on a CPU: nothing to replace, and no copy.
    if readable(small) and not small.any():
        return part
    return torch.where(small, 0, part)


def tangent_direction(x: Float[Tensor, "*batch p n"], u: Float[Tensor, "*batch p n"]) -> Float[Tensor, "*batch p n"]:
    """:func:`project_tangent`, with 0 where the result is no more than the rounding of U.

    For methods that normalize it: a U that only rescales X, such as that of weight decay alone, has no direction.
    """
    return without_rounding(project_tangent(x, u), u)


def euclidean_gradient(x: Float[Tensor, "*batch p n"], g: Float[Tensor, "*batch p n"]) -> Float[Tensor, "*batch p n"]:
    """Riemannian gradient in the Euclidean metric: ``G − sym(G Xᵀ) X = skew(GXᵀ)X + G(I − XᵀX)``; (a, b) = (1, 1)."""
    return project_tangent(x, g)


def canonical_gradient(x: Float[Tensor, "*batch p n"], g: Float[Tensor, "*batch p n"]) -> Float[Tensor, "*batch p n"]:
    """Riemannian gradient in the canonical metric: ``G − X Gᵀ X = 2 skew(GXᵀ)X + G(I − XᵀX)``; (a, b) = (2, 1).

    Source: Edelman, Arias and Smith (1998), eq. 2.53, in rows form.
    """
    return add_product(g, x @ g.mH, x, alpha=-1)


def euclidean_inner(u: Float[Tensor, "*batch p n"], v: Float[Tensor, "*batch p n"]) -> Float[Tensor, "*batch"]:
    """Inner product ``Re tr(U Vᴴ)``."""
    return (u * v.conj()).sum(dim=(-2, -1)).real


def canonical_inner(
    x: Float[Tensor, "*batch p n"], u: Float[Tensor, "*batch p n"], v: Float[Tensor, "*batch p n"]
) -> Float[Tensor, "*batch"]:
    """Inner product ``tr(U (I − ½XᵀX) Vᵀ)`` at X (Edelman, Arias and Smith 1998, eq. 2.39)."""
    # ⟨U, V⟩ − ½⟨UXᵀ, VXᵀ⟩: p×p products, and no n×n matrix.
    return euclidean_inner(u, v) - 0.5 * euclidean_inner(u @ x.mH, v @ x.mH)


def random_stiefel(
    *shape: int, generator: torch.Generator, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> Float[Tensor, "*batch p n"]:
    """Draw points uniformly (Haar measure) from St(p, n): the polar factor of a Gaussian matrix (Chikuse 2003, 2.5.1).

    Args:
        shape: ``*batch, p, n`` with p ≤ n.
        generator: the source of randomness, on ``device``.
    """
    # Drawn in double for every dtype: a seed then gives the same point in all precisions, up to rounding.
    wide = torch.promote_types(dtype, torch.float64)
    gaussian = torch.randn(*shape, generator=generator, dtype=wide, device=device)
    return nearest_orthonormal(gaussian).to(dtype)
