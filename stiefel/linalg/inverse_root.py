"""The inverse square root of a Gram matrix by products alone, where the matrix is not too ill-conditioned.

An eigendecomposition costs as much as 20 (p = 512) to 100 (p = 16) p×p products on a CPU; this needs 3 to 14. Imports
``linalg`` and numpy.
"""

from __future__ import annotations

import math
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from stiefel.linalg.msign import quintics
from stiefel.linalg.precision import in_double, widened
from stiefel.linalg.products import gram_matrix, inner
from stiefel.linalg.spectral_map import gram_factor

if TYPE_CHECKING:
    from jaxtyping import Float

NEAR = 0.8
"""Largest ‖E‖₂ for which (I + E)^{-1/2} is evaluated at once: by 24 terms, whose coefficients are all below 3."""
SPREAD = 40.0
"""Ratio of extreme eigenvalues that the coarse polynomial is made for: residual below 0.1; at a ratio of 100, 0.5."""
ITERATIONS, SMALLEST_ROOT = 12, 1e-5
"""Steps where nothing is read back, and the smallest singular value they are made for, relative to ‖VVᴴ‖_F^{1/2}."""
SMALLEST_MEAN = 1e-28
"""Smallest mean eigenvalue: below it a float32 Gram matrix has too few digits."""
TRUNCATION = 2e-8
"""Largest error of a truncated series, below the rounding of float32."""


@torch.no_grad()
def inverse_root(v: Float[Tensor, "b p n"]) -> tuple[Float[Tensor, "b p p"], Float[Tensor, "b p p"]] | None:
    """``Z = M^{-1/2}`` and ``H = M^{1/2}`` of ``M = V Vᴴ``, or None where V's condition number is above about 10.

    With ``M = c (I + E)``, c near the middle of M's spectrum, the Chebyshev series of ``(1 + e)^{-1/2}`` on [−ρ, ρ] is
    summed by the scheme of Paterson and Stockmeyer, with as many terms as ρ asks for; ``ρ = ‖E⁴‖_F^{1/4}`` is never
    below ‖E‖₂ and at most p^{1/8} times it, and higher powers of E tighten the bound where that pays. Where ρ is too
    large, a coarse polynomial on [u/40, u] is applied first, u the largest eigenvalue: it gives a Z₀ that commutes with
    M, and the same series is applied to ``E = Z₀ M Z₀ − I``, with its own ρ.

    The number of terms depends on V alone, not on earlier steps, so that training continues bit for bit from a
    checkpoint. Choosing it reads numbers back from the device: this is for the CPU.

    Args:
        v: float32 or complex64, p ≤ n. Zero, rank-deficient and not finite V give None.

    Returns:
        Z and H in the dtype of ``v``, with an error of 2e-7 near the set and up to 1e-6 at the end of the range.

    Source: Higham, Functions of Matrices (2008), sections 4.2 and 4.4.3; Paterson and Stockmeyer (1973).
    """
    found = inverse_root_of_gram(v)
    return None if found is None else (found[0], torch.bmm(found[1], found[0]))


@torch.no_grad()
def inverse_root_of_gram(v: Float[Tensor, "b p n"]) -> tuple[Float[Tensor, "b p p"], Float[Tensor, "b p p"]] | None:
    """:func:`inverse_root` that returns M itself instead of its root, which would take another product."""
    if not v.numel():
        return None
    gram = gram_matrix(v)
    middle = _mean_eigenvalue(gram)  # the first choice of c, which makes tr E = 0
    # With NaN every test of ρ below is false, and the result is None.
    middle = torch.where(middle > SMALLEST_MEAN, middle, math.nan)
    e = _add_identity(gram / middle, -1)
    square = torch.bmm(e, e)
    rho = _largest(square) ** 0.5  # ‖E‖₂ ≤ ‖E²‖_F^½
    if rho > 0.25:
        # A centre near the middle of the spectrum makes ρ smaller than the mean does.
        shift = _middle(e, square)
        middle = middle * (1 + shift)
        e, square = _shifted(e, square, shift)
        rho = _largest(square) ** 0.5
    powers, rho = _powers(e, square, rho)
    if rho <= NEAR:
        # M^{-1/2} = c^{-1/2} (I + E)^{-1/2}
        return _add_identity(_series(powers, rho)).mul_(middle.rsqrt()), gram
    return _far_root(v, middle, rho)


def _far_root(v: Tensor, middle: Tensor, rho: float) -> tuple[Tensor, Tensor] | None:
    """The same after a coarse step, in double where float32 would lose too much."""
    if not rho < 4 * SPREAD:  # also where it is NaN
        return None
    wide = in_double(v)
    gram = torch.bmm(wide, wide.mH)
    scaled = gram / middle
    # 1 + ρ bounds the largest eigenvalue of M/c, because ρ ≥ ‖E‖₂.
    first = _coarse(scaled, 1 + rho)
    e = _add_identity(torch.bmm(torch.bmm(first, scaled), first), -1).to(v.dtype)
    square = torch.bmm(e, e)
    powers, rho = _powers(e, square, _largest(square) ** 0.5)
    if not rho <= NEAR:
        return None
    # M^{-1/2} = c^{-1/2} (I + E)^{-1/2} Z₀, as all three commute.
    z = torch.bmm(_add_identity(_series(powers, rho)), first.to(v.dtype))
    return z.mul_(middle.rsqrt()), gram.to(v.dtype)


@torch.no_grad()
def inverse_root_by_iteration(v: Float[Tensor, "*batch p n"]) -> tuple[Tensor, Tensor]:
    """:func:`inverse_root` for condition numbers up to 1e4: a fixed number of products in double, nothing read back.

        N₀ = M / ‖M‖_F,   T = a + bN + cN²,   Z ← T Z,   N ← T N T

    with the coefficients of :func:`msign`, applied to the Gram matrix (:func:`gram_factor`). M = 0 counts as I. It is
    in double because float32 would lose one digit for each digit of the condition number; on GPUs that costs little
    beside a factorization.

    Source: Amsel, Persson, Musco and Gower, The Polar Express, ICLR 2026 (arXiv 2505.16932), section 3, on the
    Gram matrix.
    """
    wide = widened(v)
    gram = wide @ wide.mH
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    gram = torch.where(torch.linalg.matrix_norm(gram, keepdim=True) > 0, gram, eye)
    z = iterated_inverse_root(gram, 1.01 * torch.linalg.matrix_norm(gram, keepdim=True), ITERATIONS, SMALLEST_ROOT)
    return z, gram @ z


def iterated_inverse_root(
    gram: Float[Tensor, "*batch p p"], largest: Float[Tensor, "*batch 1 1"] | float, steps: int, smallest: float
) -> Tensor:
    """The iteration of :func:`inverse_root_by_iteration` on M itself.

    Args:
        gram: M, in double.
        largest: an upper bound of its eigenvalues.
        steps, smallest: the number of steps, and the smallest root of an eigenvalue they are made for, relative to the
            root of ``largest``: each step multiplies small roots by 4, and four more make them 1 to rounding.
    """
    polynomials = [partial(_quintic, *coefficients) for coefficients in quintics(steps, smallest)]
    return gram_factor(polynomials, gram / largest) / largest**0.5


def _quintic(a: float, b: float, c: float, n: Tensor) -> Tensor:
    flat = n.reshape(-1, *n.shape[-2:])
    return _add_identity(torch.baddbmm(flat, flat, flat, beta=b, alpha=c), a).reshape(n.shape)


def _mean_eigenvalue(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).real.mean(-1)[:, None, None]


def _add_identity(a: Tensor, times: float = 1.0) -> Tensor:
    """``A + times · I``, in place."""
    a.diagonal(dim1=-2, dim2=-1).add_(times)
    return a


def _middle(e: Tensor, square: Tensor) -> Tensor:
    """The d that minimizes the 4-norm of the eigenvalues of E − d, the root of ``Σ (e − d)³ = 0``; Σ e = 0 is given."""
    second, third = inner(e, e), inner(e, square)
    d = torch.zeros_like(third)
    for _ in range(3):  # Newton's method on d ↦ p d³ + 3 m₂ d − m₃, which is increasing and convex for d > 0
        slope = 3 * (e.shape[-1] * d.square() + second)
        d = d - (e.shape[-1] * d**3 + 3 * second * d - third) / slope
    return d


def _shifted(e: Tensor, square: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """``(E − d)/(1 + d)`` and its square: E for the centre c(1 + d) instead of c."""
    scale = 1 / (1 + d)
    moved = e * scale
    moved.diagonal(dim1=-2, dim2=-1).sub_((d * scale)[..., 0])
    # (E − d)² = E² − 2dE + d²
    square = torch.addcmul(square, e, d, value=-2) * scale.square()
    square.diagonal(dim1=-2, dim2=-1).add_((d * scale).square()[..., 0])
    return moved, square


def _powers(e: Tensor, square: Tensor, rho: float) -> tuple[list[Tensor], float]:
    """E, E², …, so many that the terms take the fewest products, and a bound ρ of the batch's largest ‖E‖₂.

    Args:
        e, square: E and its square.
        rho: a bound known already.
    """
    if rho <= 0.1:
        return [e, square], rho
    fourth = torch.bmm(square, square)
    rho = min(rho, _largest(fourth) ** 0.25)
    if rho <= 0.3:
        return [e, square], rho
    power, exponent = fourth, 4
    while rho > 0.6 and exponent < 16:  # each squaring tightens the bound, for one product
        power, exponent = torch.bmm(power, power), 2 * exponent
        rho = min(rho, _largest(power) ** (1 / exponent))
        if rho > 1.2 * NEAR:  # further squarings would not bring it below NEAR
            break
    # E³ is one more product, and with E⁴ each further product sums four terms instead of two.
    return [e, square, torch.bmm(square, e), fourth], rho


def _largest(a: Tensor) -> float:
    return float(torch.linalg.vector_norm(a, dim=(-2, -1)).max())


def _series(powers: list[Tensor], rho: float) -> Tensor:
    """``(I + E)^{-1/2} − I`` from powers of E, for ‖E‖₂ ≤ ρ."""
    # ρ is rounded up to a multiple of 0.02, so that few sets of coefficients are cached.
    return _polynomial(_series_coefficients(math.ceil(50 * rho) / 50), powers)


def _polynomial(coefficients: tuple[float, ...], powers: list[Tensor]) -> Tensor:
    """``Σ_{j ≥ 1} a_j E^j`` in Horner's form over the highest power given; each step is one product."""
    width, degree = len(powers), len(coefficients)
    total: Tensor | None = None
    # From the highest block down; a block is a_{low+1} E + … + a_{low+width} E^width, the highest may be shorter.
    for low in range((degree - 1) // width * width, -1, -width):
        block = coefficients[low] * powers[0]
        for a, power in zip(coefficients[low + 1 : low + width], powers[1:], strict=False):
            block.add_(power, alpha=a)
        total = block if total is None else torch.baddbmm(block, total, powers[-1])
    assert total is not None
    return total


@cache
def _series_coefficients(rho: float) -> tuple[float, ...]:
    """a₁, a₂, … of ``(1 + e)^{-1/2} − 1`` on [−ρ, ρ], to TRUNCATION.

    The constant term of the Chebyshev fit is replaced by 1: the difference is within the truncation error.
    """
    rho = max(rho, 0.02)
    # 64 nodes and degree 63: an interpolation, whose coefficients decay geometrically for ρ < 1.
    nodes = np.polynomial.chebyshev.chebpts1(64)
    terms = np.polynomial.chebyshev.chebfit(nodes, (1 + rho * nodes) ** -0.5, 63)
    # The sum of the dropped coefficients bounds the error, since Chebyshev polynomials are at most 1.
    tails = np.cumsum(np.abs(terms[::-1]))[::-1]
    degree = int(np.argmax(tails < TRUNCATION)) - 1
    # From Chebyshev polynomials of e/ρ to powers of e.
    powers = np.polynomial.chebyshev.cheb2poly(terms[: degree + 1]) / rho ** np.arange(degree + 1)
    return tuple(float(a) for a in powers[1:])


def _coarse(m: Tensor, largest: float) -> Tensor:
    """A polynomial Z₀ of degree 7 in M with ``‖Z₀ M Z₀ − I‖₂ < 0.1`` for eigenvalues in [largest/SPREAD, largest]."""
    middle, half = _interval(largest)
    # t maps [largest/SPREAD, largest] to [−1, 1], where powers are well conditioned.
    t = _add_identity(m / middle, -1) * (middle / half)
    square = torch.bmm(t, t)
    fourth = torch.bmm(square, square)
    constant, *rest = _coarse_coefficients()
    z = _polynomial(tuple(rest), [t, square, torch.bmm(square, t), fourth])
    return _add_identity(z, constant) / largest**0.5


def _interval(largest: float) -> tuple[float, float]:
    low = largest / SPREAD
    return (largest + low) / 2, (largest - low) / 2


@cache
def _coarse_coefficients() -> tuple[float, ...]:
    """Coefficients in t ∈ [−1, 1] that minimize the largest relative error of λ^{-1/2} over [1/SPREAD, 1]."""
    middle, half = _interval(1.0)
    t = np.polynomial.chebyshev.chebpts1(400)
    root = np.sqrt(middle + half * t)
    weights, basis = np.ones_like(t), np.vander(t, 8, increasing=True)
    # Lawson's iteration: weighted least squares, whose weights grow where the error is large, tends to the minimax fit.
    for _ in range(200):
        scale = np.sqrt(weights)
        a = np.linalg.lstsq(basis * (root * scale)[:, None], scale, rcond=None)[0]
        weights *= np.abs(1 - basis @ a * root)
        weights /= weights.sum()
    return tuple(float(x) for x in a)
