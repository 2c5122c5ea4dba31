"""The sign of a square orthogonal matrix's determinant. Imports ``products``, ``whitening`` and below."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stiefel.linalg.precision import full_precision, widened
from stiefel.linalg.products import unit_sized
from stiefel.linalg.tracing import readable
from stiefel.linalg.whitening import once

if TYPE_CHECKING:
    from jaxtyping import Float

TIE = 1e-12
"""Width of a tie between squares of singular values, relative to the largest."""


def with_determinant(x: Float[Tensor, "b p p"], v: Float[Tensor, "b p p"], sign: int) -> Float[Tensor, "b p p"]:
    """X with a determinant of a sign: where it has the other one, ``X − 2 u uᵀ X``, u V's smallest direction.

    For X the polar factor of V this is the matrix of that sign nearest to V, and continuous in V: where V passes by
    a singular matrix, its smallest singular value changes sign, and the reflection follows it. Differentiable once
    where it is reflected.

    Args:
        x: orthogonal, or near it; computed from V.
        v: any.
        sign: 1 or −1.

    Source: Kabsch (1976); Umeyama (1991), lemma.
    """
    with torch.no_grad():
        wrong = torch.linalg.det(widened(x)).sign() != sign
    if readable(wrong):
        if not wrong.any():
            return x
        x = x.clone()
        x[wrong] = _reflected(x[wrong], v[wrong])
        return x
    return torch.where(wrong[:, None, None], _reflected(x, v), x)


def _reflected(x: Tensor, v: Tensor) -> Tensor:
    u = _Smallest.apply(unit_sized(v))[0]
    return x - 2 * u @ (u.mT @ x)


class _Smallest(torch.autograd.Function):
    """The left singular vector u of the smallest singular value, ``(b, p, 1)``.

    With ``V = U S Wᵀ`` and λ = s² its derivative is ``du = Σ_i u_i (u_iᵀ d(VVᵀ) u) / (λ − λ_i)``: gaps between other
    singular values do not matter, and one that is 0 gives no NaN.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with full_precision(v.device):
            u, s, wh = torch.linalg.svd(widened(v))
        return u[..., -1:].to(v.dtype), u, s, wh

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(inputs[0], *output[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        v, u, s, wh = ctx.saved_tensors
        with full_precision(v.device), torch.no_grad():
            values = s.square()
            gaps = values[..., -1:] - values
            width = TIE * values[..., :1]
            # 1/gap, bounded; 0 for the direction itself.
            inverse = gaps / (gaps.square() + width.square()).clamp_min(torch.finfo(s.dtype).tiny)
            c = (u.mT @ gradients[0].to(u.dtype))[..., 0] * inverse
            # ⟨g, du⟩ = Σ c_i u_iᵀ (dV Vᵀ + V dVᵀ) u, with Vᵀ u = s w.
            a = (u * c.unsqueeze(-2)).sum(-1, keepdim=True)  # Σ c_i u_i
            b = (wh * (c * s).unsqueeze(-1)).sum(-2, keepdim=True)  # Σ c_i s_i w_iᵀ
            found = a @ (s[..., -1:, None] * wh[..., -1:, :]) + u[..., -1:] @ b
        return once(found.to(v.dtype), v, gradients[0])
