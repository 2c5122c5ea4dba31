"""The polar factor with a gradient that is finite and exact where singular values repeat. Imports ``linalg``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stiefel.linalg.lyapunov import lyapunov
from stiefel.linalg.precision import full_precision, in_double

if TYPE_CHECKING:
    from jaxtyping import Float


def polar(v: Float[Tensor, "*batch p n"], eps: float | None = None) -> Float[Tensor, "*batch p n"]:
    """Orthonormal matrix nearest to V: ``X = (V Vᴴ)^{-1/2} V``, the polar factor.

    With ``V Vᴴ = D diag(s²) Dᴴ`` and ``A = Dᴴ (G Xᴴ) D``, the gradient is

        ∂L/∂V = D [ (A − Aᴴ)_ij / (s_i + s_j) ] Dᴴ X + D diag(1/s) Dᴴ G (I − XᴴX)

    It has no ``1/(s_i² − s_j²)``, the term that makes autograd through ``eigh`` or ``svd`` return NaN at an orthonormal
    V. Second and higher derivatives are exact too.

    Singular values below ``eps · s_max`` are raised to it; where V = 0 they count as 1. A rank-deficient V thus gives
    a finite X whose lost directions have singular values below 1 (visible in the report), with a finite gradient, and
    V = 0 gives X = 0 with gradient G: a gradient step leaves that point.

    Args:
        v: p ≤ n; float64 is decomposed by SVD, anything narrower by the eigenvalues of its Gram matrix in float64
            (accurate to 1e-8 for condition numbers up to 1e4, where a float32 Gram matrix loses everything).
        eps: relative floor of the singular values; default 1e-6, and 1e-9 for float64.

    Returns:
        X in the dtype of ``v``. Autocast and TF32 are off inside.

    Source: Huang, Liu, Lang, Yu and Li (AAAI 2018), equations 6 and 7, for the map; the gradient in this gap-free form
    follows from differentiating ``H X = V``, ``H² = V Vᴴ`` (Higham 2008, section 8.2).
    """
    if eps is None:
        eps = 1e-9 if v.dtype in (torch.float64, torch.complex128) else 1e-6
    return _Polar.apply(v, eps)[0]


def _decompose(v: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Polar factor X, left singular vectors D and floored singular values s of V, in double precision."""
    if v.dtype in (torch.float64, torch.complex128):
        d, s, wh = torch.linalg.svd(v, full_matrices=False)
        floored = _floor(s, eps)
        return d @ ((s / floored).unsqueeze(-1) * wh), d, floored
    wide = in_double(v)
    values, d = torch.linalg.eigh(wide @ wide.mH)
    s = _floor(values.clamp_min(0).sqrt(), eps)
    return ((d / s.unsqueeze(-2)) @ d.mH) @ wide, d, s


def _floor(s: Tensor, eps: float) -> Tensor:
    largest = s.amax(dim=-1, keepdim=True)
    return torch.where(largest > 0, torch.maximum(s, eps * largest), torch.ones_like(s))


class _Polar(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        with full_precision(v.device):
            x, d, s = _decompose(v, eps)
        work = torch.promote_types(v.dtype, torch.float32)
        return x.to(v.dtype), d.to(work), s.to(work.to_real())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, Tensor, Tensor]) -> None:
        v, ctx.eps = inputs
        x, d, s = output
        ctx.mark_non_differentiable(d, s)
        ctx.save_for_backward(v, x, d, s)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        v, x, d, s = ctx.saved_tensors
        with full_precision(v.device):
            g = grads[0].to(d.dtype)
            if torch.is_grad_enabled():
                gradient = _differentiable_gradient(v.to(d.dtype), g, d, s, ctx.eps)
            else:
                rows = s.unsqueeze(-1)
                e, f = d.mH @ x.to(d.dtype), d.mH @ g  # X and G in the basis of D
                a = f @ e.mH
                k = (a - a.mH) / (rows + rows.mT)
                gradient = d @ ((k - a / rows) @ e + f / rows)
        return gradient.to(v.dtype), None


def _differentiable_gradient(v: Tensor, g: Tensor, d: Tensor, s: Tensor, eps: float) -> Tensor:
    """The gradient as a function of V and G, for ``create_graph``: ``Ω X + H⁻¹ G (I − XᴴX)``, HΩ + ΩH = GXᴴ − XGᴴ."""
    x = polar(v, eps)
    a = g @ x.mH
    h = _hermitian_factor(v, x, d, s)
    return lyapunov(h, a - a.mH, d, s) @ x + torch.linalg.solve(h, g - a @ x)


def _hermitian_factor(v: Tensor, x: Tensor, d: Tensor, s: Tensor) -> Tensor:
    """``H = V Xᴴ`` with its derivative, and with the floored value ``D diag(s) Dᴴ`` that the plain gradient uses."""
    h = v @ x.mH
    h = (h + h.mH) / 2
    return h + ((d * s.unsqueeze(-2)) @ d.mH - h).detach()
