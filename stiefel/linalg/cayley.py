"""The Cayley transform applied to a point, never building n×n where p is small. Imports only torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stiefel.linalg.products import skew

if TYPE_CHECKING:
    from jaxtyping import Float


def cayley_step(x: Float[Tensor, "*batch p n"], b: Float[Tensor, "*batch p n"]) -> Float[Tensor, "*batch p n"]:
    """Rotate the rows of X by a Cayley transform: ``X (I + ½A)(I − ½A)⁻¹`` with ``A = XᵀB − BᵀX``.

    A has rank 2p, so wherever 2p < n the Sherman-Morrison-Woodbury form is used: with ``U = [Xᵀ, B̂ᵀ]`` (n×2p),
    ``Z = [B̂; −X]`` (2p×n), ``B = c B̂``, c = ‖B‖_F/√p:

        X⁺ = X + c · XU (I₂ₚ − (c/2) ZU)⁻¹ Z

    Without the balancing by c the 2p×2p system mixes entries of very different size, and float32 loses four digits.

    Args:
        x: the point, p ≤ n; orthonormal rows are kept orthonormal.
        b: the direction. For a tangent U take ``B = U(I − ½XᵀX)``, which makes X A = U
            (:func:`stiefel.geometry.retract_cayley`).

    Returns:
        X⁺, the same shape and dtype.

    Source: Wen and Yin (2013), Lemma 4, in rows form.
    """
    p, n = x.shape[-2:]
    if 2 * p >= n:
        a = 2 * skew(x.mT @ b)
        eye = torch.eye(n, dtype=x.dtype, device=x.device)
        # X + XA (I − ½A)⁻¹; the right-hand solve is a solve with the transpose.
        return x + torch.linalg.solve(eye - 0.5 * a, x @ a, left=False)
    largest = b.abs().amax(dim=(-2, -1), keepdim=True)  # first, since squares of large entries overflow
    largest = torch.where(largest > 0, largest, 1.0)
    c = largest * torch.linalg.matrix_norm(b / largest, keepdim=True) / p**0.5
    b = b / torch.where(c > 0, c, 1.0)
    u = torch.cat([x.mT, b.mT], dim=-1)
    z = torch.cat([b, -x], dim=-2)
    eye = torch.eye(2 * p, dtype=x.dtype, device=x.device)
    return x + c * ((x @ u) @ torch.linalg.solve(eye - (0.5 * c) * (z @ u), z))
