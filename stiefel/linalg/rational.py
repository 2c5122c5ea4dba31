"""The polar factor and the Lyapunov equation by a few inverses: nothing is read back. Imports ``lu``, numpy, scipy.

Polynomials need some ten products for each factor of 10 in the condition number that they are made for; a rational
function of degree 4 does the work of nine polynomial steps, by inverses that are computed together. Both functions take
a fixed number of operations, so that the host need not wait for a device, and are made for double precision.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.special import ellipj, ellipkm1
from torch import Tensor

from stiefel.linalg.lu import one_by_one

if TYPE_CHECKING:
    from jaxtyping import Float

DEGREE, POLISH = 4, 4
"""Of the rational function, whose relative error is 0.13 at :data:`SMALLEST_ROOT`; and Newton-Schulz steps after it."""
SMALLEST_ROOT = 1e-5
"""The smallest singular value that these are made for, relative to the bound of the largest."""
DOUBLINGS = 7
"""Of two shifts' work, enough for condition numbers of H up to 1e4, with Frobenius norms for the spectral ones."""


@torch.no_grad()
def polar_by_resolvents(
    v: Float[Tensor, "b p n"], largest: Float[Tensor, "b 1 1"] | float, smallest: float = SMALLEST_ROOT
) -> tuple[Float[Tensor, "b p n"], Float[Tensor, "b p p"], Float[Tensor, "b p p"]]:
    """The polar factor X of V, ``Z = (VVᴴ)^{-1/2}`` and ``M = VVᴴ``, in double.

        Z₀ = c₀ I + Σ_j c_j (N + s_j I)⁻¹,   N = M / largest,   X₀ = Z₀ V / √largest,   X = (X₀X₀ᴴ)^{-1/2} X₀

    with Zolotarev's c and s, for which ``Z₀ N^{1/2}`` is nearest to I for eigenvalues in [smallest², 1]; singular
    values below are raised as far as those at the end. The last root is of a matrix near I, by Newton-Schulz steps.

    Args:
        v: in double, p ≤ n.
        largest: an upper bound of M's eigenvalues.
        smallest: the smallest singular value, relative to the root of ``largest``.

    Source: Zolotarev (1877); Nakatsukasa and Freund (2016), SIAM Review 58.
    """
    gram = torch.bmm(v, v.mH)
    n = gram / largest
    constant, terms = _zolotarev(DEGREE, smallest)
    eye = torch.eye(n.shape[-1], dtype=n.dtype, device=n.device)
    z = constant * eye
    for (factor, _), inverse in zip(terms, inverses([torch.add(n, eye, alpha=s) for _, s in terms]), strict=True):
        z = torch.add(z, inverse, alpha=factor)
    z = z / largest**0.5
    x = torch.bmm(z, v)
    # Z V V^H Z would have lost the digits that X has: Z is as large as V is ill-conditioned.
    root = _root_near_one(torch.bmm(x, x.mH), eye)
    return torch.bmm(root, x), torch.bmm(root, z), gram


def _root_near_one(n: Tensor, eye: Tensor) -> Tensor:
    """``N^{-1/2}`` for eigenvalues within about a quarter of 1."""
    z = torch.add(1.5 * eye, n, alpha=-0.5)
    step = z
    for _ in range(POLISH - 1):
        half = torch.bmm(step, n)  # N commutes with its steps T = (3I − N)/2, so that the next one is T N T
        n = torch.bmm(half, step)
        step = torch.add(1.5 * eye, n, alpha=-0.5)
        z = torch.bmm(z, step)
    return z


@torch.no_grad()
def lyapunov_by_shifts(
    h: Float[Tensor, "b p p"], z: Float[Tensor, "b p p"], c: Float[Tensor, "b p p"], doublings: int = DOUBLINGS
) -> Float[Tensor, "b p p"]:
    """Solve ``H Ω + Ω H = C`` by two shifts and doubling.

        R_j = (H + μ_j I)⁻¹,   A_j = I − 2 μ_j R_j,   A = A₁A₂,   Ω₀ = 2μ₁ A₂R₁CR₁A₂ + 2μ₂ R₂CR₂
        Ω ← Ω + AΩA,   A ← A²

    k doublings sum the first 2^k terms of ``Ω = Σ Aʲ Ω₀ Aʲ``. The shifts are the best two for eigenvalues between
    ``1/‖Z‖_F`` and ``‖H‖_F``; at a ratio of 1e4 they make ‖A‖₂ at most 0.6.

    Args:
        h: Hermitian and positive definite, in double.
        z: its inverse.
        c: any right-hand side.
        doublings: k.

    Source: Wachspress (1988) for the shifts; Smith (1968), Matrix equation XA + BX = C, for the squared form.
    """
    high, low = torch.linalg.matrix_norm(h, keepdim=True), 1 / torch.linalg.matrix_norm(z, keepdim=True)
    middle, mean = (high * low).sqrt(), (high + low) / 2
    first = (mean * middle).sqrt() + ((mean - middle).clamp_min(0) * middle).sqrt()
    eye = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    mu = (first, middle.square() / first)
    r = inverses([h + m * eye for m in mu])
    a = [eye - 2 * m * inverse for m, inverse in zip(mu, r, strict=True)]
    omega = torch.bmm(torch.bmm(a[1], 2 * mu[0] * torch.bmm(torch.bmm(r[0], c), r[0])), a[1])
    omega = torch.baddbmm(omega, torch.bmm(r[1], c) * (2 * mu[1]), r[1])
    power = torch.bmm(a[0], a[1])
    for step in range(doublings):
        omega = torch.baddbmm(omega, torch.bmm(power, omega), power)
        if step < doublings - 1:
            power = torch.bmm(power, power)
    return omega


def inverses(matrices: list[Tensor]) -> tuple[Tensor, ...]:
    """The inverse of each batch, all computed in one call."""
    return one_by_one(lambda a: torch.linalg.inv_ex(a)[0], torch.stack(matrices)).unbind()


@cache
def _zolotarev(degree: int, smallest: float) -> tuple[float, tuple[tuple[float, float], ...]]:
    """c₀ and the pairs (c_j, s_j) of the best relative approximation of ``y^{-1/2}`` on [smallest², 1].

    y^{-1/2} ≈ c₀ ∏ (y + t_{2j}) / (y + t_{2j−1}),   t_i = smallest² (sn/cn)²(i K'/(2 degree + 1))
    """
    modulus = 1 - smallest**2
    i = np.arange(1, 2 * degree + 1)
    sn, cn, *_ = ellipj(i * ellipkm1(smallest**2) / (2 * degree + 1), modulus)
    t = smallest**2 * (sn / cn) ** 2
    poles, zeros = t[::2], t[1::2]
    # The error oscillates between its extremes; c₀ centres it.
    y = np.geomspace(smallest**2, 1, 4001)
    product = np.prod((y[:, None] + zeros) / (y[:, None] + poles), axis=1) * np.sqrt(y)
    constant = 2 / (product.max() + product.min())
    factors = [constant * np.prod(zeros - s) / np.prod(np.delete(poles, j) - s) for j, s in enumerate(poles)]
    return float(constant), tuple((float(f), float(s)) for f, s in zip(factors, poles, strict=True))
