"""The largest eigenvalue in magnitude of a Hermitian matrix, by products with a vector. Imports ``fill``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stiefel.linalg.fill import fill_like

if TYPE_CHECKING:
    from jaxtyping import Float


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


def _leading(h: Tensor, iterations: int) -> Tensor:
    # The longest column of H, (*batch, p, 1).
    lengths = torch.linalg.vector_norm(h.detach(), dim=-2, keepdim=True)
    v = torch.take_along_dim(h, lengths.argmax(dim=-1, keepdim=True), dim=-1)
    v = _normalized(v) + _normalized(fill_like(v)) / 2  # half, so that the sum is not 0 at p = 1
    for _ in range(iterations):
        v = h @ _normalized(v)
    return _normalized(v)


class _SpectralRadius(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, iterations: int) -> Tensor:
        return torch.linalg.vector_norm(h @ _leading(h, iterations), dim=(-2, -1))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        h, ctx.iterations = inputs
        ctx.save_for_backward(h)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (h,), scale = ctx.saved_tensors, gradients[0][..., None, None]
        if not torch.is_grad_enabled():
            # ∂‖Hv‖/∂H = (Hv/‖Hv‖) vᴴ
            v = _leading(h, ctx.iterations)
            return scale * _normalized(h @ v) @ v.mH, None
        # For a second derivative the whole iteration is differentiated, not v as a constant.
        norms = torch.linalg.vector_norm(h @ _leading(h, ctx.iterations), dim=(-2, -1))
        return torch.autograd.grad(norms, h, gradients[0], create_graph=True)[0], None


def _normalized(v: Tensor) -> Tensor:
    return v / torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)
