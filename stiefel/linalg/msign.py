"""The matrix sign of a rectangular matrix by products alone: Polar Express. Imports ``linalg``."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from stiefel.linalg.products import balance

if TYPE_CHECKING:
    from jaxtyping import Float

SMALLEST = 1e-3
"""Singular values above this share of the Frobenius norm reach 1 at the fastest possible rate."""


def msign(
    m: Float[Tensor, "*batch p n"], steps: int = 12, smallest: float = SMALLEST, safety: float = 1.0
) -> Float[Tensor, "*batch p n"]:
    """Polar factor by ``steps`` odd quintics, each the best possible after those before it: no factorization.

        X₀ = M / (1.01 ‖M‖_F),   X ← aX + b(XXᴴ)X + c(XXᴴ)²X

    Singular values that are 0 stay 0, so a rank-deficient M gives a partial isometry, where :func:`polar` would have to
    choose. The fixed coefficients popular with Muon do not converge (they leave singular values between 0.7 and 1.2).

    Args:
        m: p ≤ n, float32 or wider: in bfloat16 the result is off by 0.02.
        steps: 8 converge where the smallest singular value is at least 1e-3 ‖M‖_F, 12 where it is 1e-4 ‖M‖_F; in
            float32 the result then is off by epsilon times the condition number.
        smallest: singular values above this share of ‖M‖_F reach 1 at the fastest possible rate.
        safety: as in :func:`quintics`; 1.01 where ``smallest`` is so small that rounding would leave an interval.

    Source: Amsel, Persson, Musco and Gower, The Polar Express, ICLR 2026 (arXiv 2505.16932), Algorithm 1.
    """
    # balance(M)·√p is ‖M‖_F, or √p for M = 0; 1.01 leaves room for rounding, since the first interval ends at 1.
    x = (m / (1.01 * m.shape[-2] ** 0.5 * balance(m))).reshape(-1, *m.shape[-2:])
    for a, b, c in quintics(steps, smallest, safety):
        gram = x @ x.mH
        # (bG + cG²)X + aX with G = XXᴴ, in two fused products
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.reshape(m.shape)


@cache
def quintics(steps: int, smallest: float, safety: float = 1.0) -> tuple[tuple[float, float, float], ...]:
    """The polynomial of each step: the minimax quintic on the interval that then holds the singular values.

    Args:
        steps: how many.
        smallest: lower end of the first interval, whose upper end is 1.
        safety: by how much each step but the last shortens its argument: beyond its interval a step that raises small
            values quickly sends large ones to infinity.
    """
    low, high = smallest, 1.0
    found: list[tuple[float, float, float]] = []
    for _ in range(steps):
        coefficients, error = _minimax_quintic(low, high)
        short = safety if len(found) < steps - 1 else 1.0
        a, b, c = coefficients
        found.append((a / short, b / short**3, c / short**5))
        # The step maps [low, high] into this interval, for which the next polynomial is made.
        low, high = (1 - error) / short, 1 + error
    return tuple(found)


def _minimax_quintic(low: float, high: float) -> tuple[tuple[float, float, float], float]:
    """Odd quintic p with the smallest max |1 − p| on [low, high], and that error, by Remez' exchange.

    The error oscillates between its bounds at the interval's ends and at the two stationary points inside.
    """
    if low > (1 - 1e-4) * high:  # the exchange is at rounding level; the limit is the quintic Newton-Schulz step
        u = (low + high) / 2
        # p(u(1 + δ)) = 1 + 2.5δ³ + O(δ⁴), bounded here by 3|δ|³.
        return (15 / (8 * u), -10 / (8 * u**3), 3 / (8 * u**5)), max(abs(1 - low / u), abs(1 - high / u)) ** 3 * 3
    inner = np.array([(3 * low + high) / 4, (low + 3 * high) / 4])
    signs = np.array([1.0, -1.0, 1.0, -1.0])
    for _ in range(100):
        # Four equations 1 − p(tᵢ) = ±error, linear in a, b, c and the error; then the interior points move.
        t = np.array([low, *inner, high])
        a, b, c, error = np.linalg.solve(np.stack([t, t**3, t**5, signs], axis=1), np.ones(4))
        squares = np.sort(np.roots([5 * c, 3 * b, a]).real)  # p'(t) = a + 3bt² + 5ct⁴
        moved = np.sqrt(np.clip(squares, low**2, high**2))
        if np.allclose(moved, inner, rtol=1e-12, atol=0):
            break
        inner = moved
    return (float(a), float(b), float(c)), abs(float(error))
