"""Polar factors in float32 alone, where float64 is slow or missing: nothing is read back. Imports ``linalg``.

A Gram matrix squares the condition number, of which float32 has digits for 1e3 only. So steps act on V itself, or,
where V is not square, on its triangular factor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stiefel.linalg.fill import fill_like
from stiefel.linalg.lu import inverse_of
from stiefel.linalg.lyapunov import lyapunov_by_doubling
from stiefel.linalg.msign import msign
from stiefel.linalg.products import gram_residual, newton_schulz, sym
from stiefel.linalg.qr import qf

if TYPE_CHECKING:
    from jaxtyping import Float

STEPS, SMALLEST, SAFETY = 12, 1e-5, 1.01
"""Polynomial steps, the smallest singular value that they are made for, relative to ‖V‖_F, and their safety."""
FLOOR = 2e-7
"""Added to H, relative to ‖H‖_F."""
DAMPED = 1e-3
"""The same where X is turned back: directions that V hardly has are not turned by its rounding."""
TURNS = 7
"""Doublings of the equation that turns X back: to 1e-3 of the turn at condition numbers of 1e3."""


@torch.no_grad()
def polar_in_single(
    v: Float[Tensor, "b p n"],
) -> tuple[Float[Tensor, "b p n"], Float[Tensor, "b p p"], Float[Tensor, "b p p"]]:
    """X, H and H⁻¹ of the polar decomposition ``V = H X``, up to condition numbers of 1e5.

    Source: Amsel, Persson, Musco and Gower, The Polar Express, ICLR 2026 (arXiv 2505.16932).
    """
    x = _turned_back(v, newton_schulz(_steps(v)))
    return x, *_factors(v, x, FLOOR)


@torch.no_grad()
def nearest_in_single(v: Float[Tensor, "b p n"]) -> Float[Tensor, "b p n"]:
    """The nearest orthonormal matrix; directions that V lacks are filled from :func:`fill_like`."""
    x = newton_schulz(_steps(v))
    missing = gram_residual(x) @ fill_like(x)
    x = x - (missing - (missing @ x.mH) @ x)  # X + (I − XXᴴ) F (I − XᴴX)
    return _turned_back(v, newton_schulz(newton_schulz(_steps(x))))


def _turned_back(v: Tensor, x: Tensor) -> Tensor:
    """``X + ΩX``, orthonormal, with ``HΩ + ΩH = VXᴴ − XVᴴ``.

    Polynomials that raise the smallest singular values quickly let large ones become small on the way, and the rounding
    of those turns X by up to 1e-3. To first order this takes it back.
    """
    h, z = _factors(v, x, DAMPED)
    turned = v @ x.mH
    return newton_schulz(x + lyapunov_by_doubling(h, z, turned - turned.mH, TURNS) @ x)


def _steps(v: Tensor) -> Tensor:
    if v.shape[-2] == v.shape[-1]:
        return msign(v, STEPS, SMALLEST, SAFETY)
    q = qf(v)
    return msign(v @ q.mH, STEPS, SMALLEST, SAFETY) @ q  # V = LQ: p×p instead of p×n


def _factors(v: Tensor, x: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """H, floored so that it has an inverse, and that."""
    h = sym(v @ x.mH)
    size = torch.linalg.matrix_norm(h, keepdim=True)
    h = h + (floor * torch.where(size > 0, size, 1)) * torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    return h, inverse_of(h)
