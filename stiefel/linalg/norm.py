"""Largest eigenvalues and singular values, by products. Imports ``fill``, ``nested``, ``tracing``, ``devices``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stiefel.linalg.devices import may_wait
from stiefel.linalg.fill import fill_like
from stiefel.linalg.nested import nested_gradients
from stiefel.linalg.tracing import is_traced

if TYPE_CHECKING:
    from jaxtyping import Float

SQUARINGS = 22
"""After these a singular value that is smaller by 1e-6 counts for nothing."""


def spectral_radius(h: Float[Tensor, "*batch p p"], iterations: int = 40) -> Float[Tensor, "*batch"]:
    """``‖H‖₂`` of a Hermitian H by power iteration: ``v ← Hv/‖Hv‖``, then ``‖Hv‖``. Never above the true value.

    It starts at the sum of H's longest column, which is near the leading eigenspace unless that lies in another block
    of H, and a fixed vector in general position (:func:`fill_like`), which has a part in every block. k products give
    at least c^{1/k} ``‖H‖₂``, c about 1/√p the start's share of the leading eigenspace. H = 0 gives 0 with gradient 0,
    where plain normalization gives NaN. The result is ‖Hv‖ rather than vᴴHv, which vanishes where eigenvalues +σ and −σ
    both lead.

    Args:
        h: Hermitian.
        iterations: of the power method; on a random 64×64 H, 2 give about 0.9 of ``‖H‖₂`` and 16 give 0.98.

    Returns:
        One number per matrix; its gradient takes v as a constant, which is exact at convergence, and its second
        derivative is that of the iteration.
    """
    return _SpectralRadius.apply(h, iterations)


def largest_singular_value(v: Float[Tensor, "*batch p n"]) -> Float[Tensor, "*batch"]:
    """``‖V‖₂``; where several singular values share it, its gradient is the mean of theirs.

    On a CPU by an SVD. Elsewhere, where that would make the host wait, by the projection onto the leading eigenvectors
    of M = V Vᴴ, which 22 squarings ``P ← P²/tr P²`` from M have found to rounding: ``‖V‖₂² = tr(P M)``.

    Args:
        v: p ≤ n, with entries whose fourth powers are in range.
    """
    if may_wait(v) or is_traced():
        return _of_svd(v)
    return _Largest.apply(v)[0]


def _of_svd(v: Tensor) -> Tensor:
    sigma = torch.linalg.svd(v, full_matrices=False).S
    # Values that are equal to rounding count as tied.
    leads = sigma >= sigma[..., :1] * (1 - 1e3 * torch.finfo(sigma.dtype).eps)
    return (sigma * leads).sum(-1) / leads.sum(-1)


class _Largest(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor) -> tuple[Tensor, Tensor]:
        gram = v @ v.mH
        p = _of_unit_trace(gram)
        for _ in range(SQUARINGS):
            p = _of_unit_trace(p @ p)
        return (p * gram.mT).sum((-2, -1)).real.sqrt(), p

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, *output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor | None:
        v, sigma, p = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is that of the singular values
            return nested_gradients(_of_svd, [v], gradients[:1])[0]
        return (gradients[0] / sigma)[..., None, None] * (p @ v)


def _of_unit_trace(a: Tensor) -> Tensor:
    trace = a.diagonal(dim1=-2, dim2=-1).real.sum(-1)[..., None, None]
    return a / torch.where(trace > 0, trace, 1)


def _leading(h: Tensor, iterations: int) -> Tensor:
    # The longest column of H, (*batch, p, 1).
    lengths = torch.linalg.vector_norm(h.detach(), dim=-2, keepdim=True)
    v = torch.take_along_dim(h, lengths.argmax(dim=-1, keepdim=True), dim=-1)
    v = _normalized(v) + _normalized(fill_like(v)) / 2  # half, so that the sum is not 0 at p = 1
    for _ in range(iterations):
        v = h @ _normalized(v)
    return _normalized(v)


def _leading_norms(h: Tensor, iterations: int) -> Tensor:
    return torch.linalg.vector_norm(h @ _leading(h, iterations), dim=(-2, -1))


class _SpectralRadius(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, iterations: int) -> Tensor:
        return _leading_norms(h, iterations)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        h, ctx.iterations = inputs
        ctx.save_for_backward(h)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        (h,), scale = ctx.saved_tensors, gradients[0][..., None, None]
        if not torch.is_grad_enabled():
            # ∂‖Hv‖/∂H = (Hv/‖Hv‖) vᴴ
            v = _leading(h, ctx.iterations)
            return scale * _normalized(h @ v) @ v.mH, None
        # For a second derivative the whole iteration is differentiated, not v as a constant.
        return nested_gradients(lambda h: _leading_norms(h, ctx.iterations), [h], gradients)[0], None


def _normalized(v: Tensor) -> Tensor:
    return v / torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)
