"""Orthonormalization by polynomial steps, a given number of them or until convergence. Imports ``linalg``.

A step moves every singular value towards 1 and leaves the singular vectors alone: ``X ← T(X Xᴴ) X``.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stiefel.linalg.precision import in_double
from stiefel.linalg.products import gram_matrix, newton_schulz
from stiefel.linalg.spectral_map import Map, gram_factor, spectral_map
from stiefel.linalg.svd import nearest_orthonormal
from stiefel.linalg.tracing import readable

if TYPE_CHECKING:
    from jaxtyping import Float

SMALLEST = 1e-7
"""Singular values down to this are raised to 1, by as many steps on a Gram matrix as SHIFT allows."""
SHIFT = 2e-15
"""Added to a Gram matrix's diagonal, so that rounding makes no eigenvalue negative: steps would drive it to −∞."""
POLISH = 4
"""Steps after those that have raised the smallest singular value to about ½."""


def iterated(
    polynomial: Map, count: int | None, x: Float[Tensor, "*batch p n"], growth: float = 1.5
) -> Float[Tensor, "*batch p n"]:
    """``X ← T(X Xᴴ) X``, ``count`` times, or until the rows are orthonormal.

    Where rows are long, float32 is iterated on its Gram matrix, in double because that squares the condition number
    (:func:`stiefel.linalg.spectral_map.gram_factor`).

    *Until they are orthonormal* means, on a CPU: until ``‖XXᴴ − I‖_F`` is below √ε, and one step more, which squares
    it. The last steps act on X itself and remove the error that the Gram matrix leaves. X's condition number determines
    how many steps that takes. An X without full rank does not converge, and is completed orthonormally. Where no value
    can be read (on a GPU, whose host must not wait, and under a compiler) the number is fixed, and enough for condition
    numbers up to 1e5.

    Args:
        polynomial: T, of a Hermitian matrix.
        count: number of steps; None to iterate until convergence.
        x: p ≤ n, with singular values of at most 1.1.
        growth: T(0), the factor by which a step raises small singular values; 1.5 of the Newton-Schulz step.

    Source: Björck and Bowie (1971), for the polynomials.
    """
    # The number of steps that raise SMALLEST to about 1.
    most = math.ceil(-math.log(SMALLEST) / math.log(growth))
    return spectral_map(partial(_run, polynomial, count, most), x)


def _run(polynomial: Map, count: int | None, most: int, x: Tensor) -> tuple[Tensor, Map]:
    """The iteration's result, and the same steps as a map that decides nothing."""
    if count is None and readable(x):
        y, before, after = _until_orthonormal(polynomial, most, x)
        return y, partial(_along, polynomial, before, after)
    # Nothing can be read, or the number is given: it does not depend on X.
    before, after = (most, POLISH) if count is None else (count, 0)
    repeated = partial(_along, polynomial, *((before, after) if _on_gram(x) else (0, before + after)))
    return repeated(x), repeated


def _along(polynomial: Map, before: int, after: int, x: Tensor) -> Tensor:
    """Steps on the Gram matrix, then steps on X itself."""
    if before:
        wide = in_double(x)
        x = (gram_factor(before * [polynomial], _shifted_gram(wide)) @ wide).to(x.dtype)
    # Only the last step needs a Gram matrix with an exact diagonal: later steps remove the rounding of earlier ones.
    for _ in range(after - 1):
        x = polynomial(x @ x.mH) @ x
    return polynomial(gram_matrix(x)) @ x if after else x


def _until_orthonormal(polynomial: Map, most: int, x: Tensor) -> tuple[Tensor, int, int]:
    """The limit, and the numbers of steps on the Gram matrix and on X itself."""
    before = 0
    # On the p×p Gram matrix while the smallest singular values grow.
    if _on_gram(x):
        wide = in_double(x)
        gram, before = _shifted_gram(wide), 1
        t = z = polynomial(gram)
        # Z collects the product of all factors T, and is applied to X once.
        while before < most and not _is_near(gram, x.dtype):
            gram = t @ gram @ t
            t = polynomial(gram)
            z, before = t @ z, before + 1
        x = (z @ wide).to(x.dtype)
    # On X itself, which removes what the Gram matrix has lost.
    for after in range(1, most - before + 2 * POLISH):
        gram = gram_matrix(x)
        x = polynomial(gram) @ x
        # At least two steps: one alone has another second derivative than the limit.
        if before + after > 1 and _is_near(gram, x.dtype):
            return x, before, after
    # Too many steps: a singular value is 0, or below SMALLEST.
    return _completed(x), before, after


def _on_gram(x: Tensor) -> bool:
    return 2 * x.shape[-2] <= x.shape[-1] and x.dtype not in (torch.float64, torch.complex128)


def _shifted_gram(x: Tensor) -> Tensor:
    return x @ x.mH + SHIFT * torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)


def _is_near(gram: Tensor, dtype: torch.dtype) -> bool:
    """Whether one more step, which squares the residual, leaves no more than rounding."""
    residual = torch.linalg.matrix_norm(gram.detach() - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device))
    return not residual.numel() or bool(residual.max() <= torch.finfo(dtype).eps ** 0.5)


def _completed(x: Tensor) -> Tensor:
    """The nearest orthonormal matrix, with the derivative of the iteration; NaN stays NaN."""
    return x + (newton_schulz(nearest_orthonormal(x)) - x).detach() if bool(x.isfinite().all()) else x
