"""PCA whitening with a gradient that stays finite where eigenvalues meet. Imports ``linalg``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stiefel.linalg.precision import full_precision, widened
from stiefel.linalg.products import newton_schulz, sym

if TYPE_CHECKING:
    from jaxtyping import Float


def whitened(v: Float[Tensor, "*batch p n"], eps: float = 1e-6) -> Float[Tensor, "*batch p n"]:
    """PCA-whitened rows ``X = Λ^{-1/2} Dᵀ V`` of ``V Vᵀ = D Λ Dᵀ``, eigenvalues ascending: V's right singular vectors.

    D is unique only where eigenvalues differ, and up to the signs of its columns, which are fixed by a positive largest
    entry. The derivative of an eigenvector has 1/(λ_i − λ_j); with δ = λ_i − λ_j it is ``δ/(δ² + (eps·λ_max)²)`` here,
    which differs only near a tie, where it is bounded instead of infinite.

    Args:
        v: p ≤ n, real; X is orthonormal whatever its rank.
        eps: width of a tie, relative to the largest eigenvalue.

    Returns:
        X in the dtype of ``v``. Differentiable once; a second derivative is an error.

    Source: Huang et al. (AAAI 2018), section 3.2 (OLM_var); Dang, Yi, Hu, Wang and Fua (2018) for the instability.
    """
    return _Whitened.apply(v, eps)[0]


class _Whitened(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with full_precision(v.device):
            d, s, x = torch.linalg.svd(widened(v), full_matrices=False)
            # torch's singular values descend; PCA's eigenvalues ascend here, as eigh returns them.
            d, s, x = d.flip(-1), s.flip(-1), x.flip(-2)
            # The sign of each column's entry of largest size, (*batch, 1, p).
            signs = torch.sgn(torch.take_along_dim(d, d.abs().argmax(dim=-2, keepdim=True), dim=-2))
            d, x = d * signs, newton_schulz(x * signs.mT)  # long rows of an SVD are orthonormal to 1e-13 only
            s = s.clamp_min(eps * s[..., -1:]).clamp_min(torch.finfo(s.dtype).tiny)
        # Two X: where V is in double, the second would be the first, which an output may not be.
        return x.to(v.dtype), x.clone(), d, s

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, ...]) -> None:
        v, ctx.eps = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:], v)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        x, d, s, v = ctx.saved_tensors
        return once(_gradient(x, d, s, gradients[0].detach(), ctx.eps).to(v.dtype), v, gradients[0]), None


def once(gradient: Tensor, v: Tensor, incoming: Tensor) -> Tensor:
    """A gradient with respect to V that raises an error wherever it would be differentiated again."""
    return _Once.apply(gradient, v, incoming)


class _Once(torch.autograd.Function):
    """torch's own ``once_differentiable`` leaves no edge to V in the graph: where V has another path, a second
    derivative would silently lack this term.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, v: Tensor, incoming: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            "singular vectors (PCA whitening, a determinant that is asked for) are differentiable once: their second "
            "derivative is unbounded where singular values meet; avoid create_graph=True, or use another method"
        )


@torch.no_grad()
def _gradient(x: Tensor, d: Tensor, s: Tensor, gradient: Tensor, eps: float) -> Tensor:
    """∂L/∂V where V = D S X.

    With E = Dᵀ d(VVᵀ) D and K_ij = 1/(λ_j − λ_i): dD = D (K∘E) and d(S²) = diag E, so that
    dX = −[½ S⁻² diag(E) + S⁻¹ (K∘E) S] X + S⁻¹ Dᵀ dV, and ⟨G, dX⟩ = ⟨H, E⟩ + ⟨D S⁻¹ G, dV⟩.
    """
    with full_precision(x.device):
        g = gradient.to(x.dtype)
        values = s.square()
        gaps = values.unsqueeze(-2) - values.unsqueeze(-1)
        # 1/δ, bounded; values ascend, so the last is λ_max.
        k = gaps / (gaps.square() + (eps * values[..., -1:, None]).square())
        a = g @ x.mT
        # ⟨G, −S⁻¹ (K∘E) S X⟩ = ⟨H, E⟩ with H_ij = −K_ij (GXᵀ)_ij s_j/s_i; then the part of d(S²) on the diagonal.
        h = -(a * s.unsqueeze(-2) / s.unsqueeze(-1)) * k
        h = sym(h - torch.diag_embed(a.diagonal(dim1=-2, dim2=-1) / (2 * values)))  # E is symmetric
        return d @ (2 * (h * s.unsqueeze(-2)) @ x + g / s.unsqueeze(-1))  # E = Dᵀ dV XᵀS + its transpose
