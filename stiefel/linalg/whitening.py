"""Whitening by PCA, with a gradient that stays finite where eigenvalues meet, and by Newton's iteration.

Imports ``linalg``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stiefel.linalg.precision import full_precision, widened
from stiefel.linalg.products import newton_schulz, sym
from stiefel.linalg.spectral_map import gram_factor, spectral_map
from stiefel.linalg.tracing import refuse_nested_forward_mode
from stiefel.linalg.zca import decomposed

if TYPE_CHECKING:
    from jaxtyping import Float

TIE = 1e-6
"""Width of a tie of eigenvalues, relative to the largest, in the gradient of PCA."""


def whitened(v: Float[Tensor, "*batch p n"], eps: float = TIE) -> Float[Tensor, "*batch p n"]:
    """PCA-whitened rows ``X = Λ^{-1/2} Dᵀ V`` of ``V Vᵀ = D Λ Dᵀ``, eigenvalues ascending: V's right singular vectors.

    D is unique only where eigenvalues differ, and up to the signs of its columns, which are fixed by a positive largest
    entry. The derivative of an eigenvector has 1/(λ_i − λ_j); with δ = λ_i − λ_j it is ``δ/(δ² + (eps·λ_max)²)`` here,
    which differs only near a tie, where it is bounded instead of infinite.

    Args:
        v: p ≤ n, real; X is orthonormal whatever its rank.
        eps: width of a tie, relative to the largest eigenvalue.

    Returns:
        X in the dtype of ``v``. Differentiable once; a second derivative is an error.

    Source: Huang et al. (AAAI 2018), section 3.2 (OLM_var); Dang, Yi, Hu, Wang, Fua and Salzmann (ECCV 2018) and Wang,
    Dang, Hu, Fua and Salzmann (NeurIPS 2019) for the instability.
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

    jvp = backward


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


def pca_matrix(sigma: Float[Tensor, "*batch p p"], tie: float = TIE) -> Float[Tensor, "*batch p p"]:
    """``W = Λ^{-1/2} Dᵀ`` of ``Σ = D Λ Dᵀ``, eigenvalues ascending, columns of D with a positive largest entry.

    The derivative of an eigenvector has 1/(λ_i − λ_j); with δ = λ_i − λ_j it is ``δ/(δ² + (tie · λ_max)²)`` here, which
    differs only near a tie, where it is bounded instead of infinite.

    Args:
        sigma: symmetric, positive semidefinite; eigenvalues are floored as in :func:`zca_matrix`.
        tie: width of a tie, relative to the largest eigenvalue.

    Returns:
        W. Differentiable once, also forwards; a second derivative is an error.

    Raises:
        BatchError: Σ is not finite.
    """
    return _PCA.apply(sigma, tie)[0]


class _PCA(torch.autograd.Function):
    """D and Λ are outputs so as to be saved; their derivative is taken as 0.

    torch.func has no outputs without a derivative where a jvp surrounds a vmap.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(sigma: Tensor, tie: float) -> tuple[Tensor, Tensor, Tensor]:
        with full_precision(sigma.device):
            values, d = decomposed(sigma)
            # The sign of each column's entry of largest size, (*batch, 1, p).
            d = d * torch.sgn(torch.take_along_dim(d, d.abs().argmax(dim=-2, keepdim=True), dim=-2))
            w = (d / values.sqrt().unsqueeze(-2)).mT
        return w.to(sigma), d.to(sigma), values.to(sigma)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, Tensor, Tensor]) -> None:
        sigma, ctx.tie = inputs
        ctx.save_for_backward(sigma, *output[1:])
        # The same for both: torch.func keeps one list of batch dimensions, of what is saved last.
        ctx.save_for_forward(sigma, *output[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """``D sym(H) Dᵀ``, ``H = −K∘(S⁻¹ G D) − ½ diag(S⁻³ G D)``, ``K_ij = 1/(λ_j − λ_i)``: the adjoint of jvp."""
        sigma, d, values = ctx.saved_tensors
        with torch.no_grad(), full_precision(sigma.device):
            g = gradients[0].to(d.dtype) @ d
            scaled = g / values.sqrt().unsqueeze(-1)
            h = -scaled * _gaps(values, ctx.tie)
            h = h - torch.diag_embed(scaled.diagonal(dim1=-2, dim2=-1) / (2 * values))
            gradient = (d @ sym(h) @ d.mT).to(sigma.dtype)
        return once(gradient, sigma, gradients[0]), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor, Tensor]:
        """With ``E = Dᵀ dΣ D``: ``dD = D (K∘E)``, ``dΛ = diag E``, ``dW = −[½ S⁻³ diag E + S⁻¹ (K∘E)] Dᵀ``."""
        refuse_nested_forward_mode()
        sigma, d, values = ctx.saved_tensors
        with full_precision(d.device):
            e = d.mT @ sym(tangents[0]).to(d.dtype) @ d
            inner = e * _gaps(values, ctx.tie)
            inner = inner + torch.diag_embed(e.diagonal(dim1=-2, dim2=-1) / (2 * values))
            tangent = -((inner / values.sqrt().unsqueeze(-1)) @ d.mT).to(tangents[0].dtype)
        return once(tangent, sigma, tangents[0]), torch.zeros_like(d), torch.zeros_like(values)


def _gaps(values: Tensor, tie: float) -> Tensor:
    """``1/(λ_j − λ_i)``, bounded; 0 on the diagonal."""
    gaps = values.unsqueeze(-2) - values.unsqueeze(-1)
    return gaps / (gaps.square() + (tie * values[..., -1:, None]).square())


def newton_matrix(sigma: Float[Tensor, "b p p"], iterations: int) -> Float[Tensor, "b p p"]:
    """``Σ^{-1/2}`` in part: ``P ← ½ (3 P − P³ N)`` from ``P = I``, T times; ``N = Σ/tr Σ``, ``W = P/√(tr Σ)``.

    An eigenvalue ν of N becomes a variance near 1 where ν · 1.5^{2T} is above 1, and stays small below: T trades
    whiteness for noise. Computed as ``P ← T P``, ``N ← T N T`` with ``T = ½ (3 I − N)``: the same in exact arithmetic,
    where the published form lets rounding grow.

    Args:
        sigma: symmetric, positive semidefinite; Σ = 0 gives P = 1.5^T I.
        iterations: T.

    Source: Huang, Zhou, Zhu, Liu and Shao, Iterative Normalization, CVPR 2019.
    """
    with full_precision(sigma.device):
        trace = sigma.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        trace = torch.where(trace > 0, trace, 1.0)
        steps = _steps(iterations)
        return spectral_map(lambda n: (steps(n), steps), sigma / trace) / trace.sqrt()


def _steps(iterations: int) -> Callable[[Tensor], Tensor]:
    def factor(n: Tensor) -> Tensor:
        return 1.5 * torch.eye(n.shape[-1], dtype=n.dtype, device=n.device) - 0.5 * n

    return lambda n: gram_factor(iterations * [factor], n)
