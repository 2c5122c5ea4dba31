"""Orthonormalization by a given number of polynomial steps. Imports ``linalg``.

A step moves every singular value towards 1 and leaves the singular vectors alone: ``X ← T(X Xᴴ) X``.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stiefel.linalg.precision import widened
from stiefel.linalg.products import gram_matrix
from stiefel.linalg.spectral_map import Map, gram_factor, spectral_map

if TYPE_CHECKING:
    from jaxtyping import Float

SHIFT = 2e-15
"""Added to a Gram matrix's diagonal, so that rounding makes no eigenvalue negative: steps would drive it to −∞."""


def iterated(polynomial: Map, count: int, x: Float[Tensor, "*batch p n"]) -> Float[Tensor, "*batch p n"]:
    """``X ← T(X Xᴴ) X``, ``count`` times.

    Where rows are long, float32 is iterated on its Gram matrix, in double because that squares the condition number
    (:func:`stiefel.linalg.spectral_map.gram_factor`).

    Args:
        polynomial: T, of a Hermitian matrix.
        count: number of steps.
        x: p ≤ n, with singular values of at most 1.1.

    Source: Björck and Bowie (1971), for the polynomials.
    """
    steps = partial(_along, polynomial, count)
    return spectral_map(lambda x: (steps(x), steps), x)


def _along(polynomial: Map, count: int, x: Tensor) -> Tensor:
    wide = widened(x)
    if wide.dtype != x.dtype and 2 * x.shape[-2] <= x.shape[-1]:
        gram = wide @ wide.mH + SHIFT * torch.eye(x.shape[-2], dtype=wide.dtype, device=x.device)
        return (gram_factor(count * [polynomial], gram) @ wide).to(x.dtype)
    # Only the last step needs a Gram matrix with an exact diagonal: later steps remove the rounding of earlier ones.
    for _ in range(count - 1):
        x = polynomial(x @ x.mH) @ x
    return polynomial(gram_matrix(x)) @ x
