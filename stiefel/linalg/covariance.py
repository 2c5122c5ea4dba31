"""Mean and covariance of samples, chunk by chunk, with their gradients. Imports ``precision``, ``compat``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stiefel.compat.torch_private import is_forward_mode
from stiefel.linalg.precision import full_precision, widened
from stiefel.linalg.tracing import is_traced, refuse_nested_forward_mode

if TYPE_CHECKING:
    from jaxtyping import Float

ENTRIES, SAMPLES = 2**18, 1024
"""Entries of a chunk in double, which then stays in a cache; and samples whose products are summed in float32."""


def covariance(x: Float[Tensor, "b p m"], double: bool = True) -> tuple[Float[Tensor, "b p"], Float[Tensor, "b p p"]]:
    """Mean ``r = (1/m) X 1`` and covariance ``Σ = (1/m) X Xᵀ − r rᵀ`` of m samples, the columns of X.

    The mean should be small beside the deviations: subtract a constant near it first, such as a rounded mean.

    Args:
        x: real. No tensor of its size is made.
        double: the products in float64, where the device has it; otherwise in the dtype of ``x``, 1024 samples at a
            time, and the sums of those in float64: to 1e-7 of the largest variance.

    Returns:
        r and Σ, in float64 or, without ``double``, in the dtype of ``x``. Differentiable to any order.
    """
    return _Covariance.apply(x, double)


def affine_map(
    w: Float[Tensor, "b p p"], x: Float[Tensor, "b p m"], constant: Float[Tensor, "b p 1"]
) -> Float[Tensor, "b p m"]:
    """``W X + c 1ᵀ``, laid out in memory as X is: samples one after the other, or features.

    Its gradient too is computed without autocast and reduced products, where no compiler or transform is at work.
    """
    return _product(w, x, constant) if is_traced() or is_forward_mode() else _AffineMap.apply(w, x, constant)


def _product(w: Tensor, x: Tensor, constant: Tensor) -> Tensor:
    if x.stride(-1) == 1:
        return torch.baddbmm(constant, w, x)
    return torch.baddbmm(constant.mT, x.mT, w.mT).mT


class _AffineMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, x: Tensor, constant: Tensor) -> Tensor:
        ctx.save_for_backward(w, x)
        return _product(w, x, constant)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        w, x = ctx.saved_tensors
        (g,) = gradients
        needed = ctx.needs_input_grad
        with full_precision(x.device):
            return (
                torch.bmm(g, x.mT) if needed[0] else None,
                affine_map(w.mT, g, torch.zeros_like(g[..., :1])) if needed[1] else None,
                g.sum(-1, keepdim=True) if needed[2] else None,
            )


def moments(x: Tensor, double: bool = True) -> tuple[Tensor, Tensor]:
    """:func:`covariance` without a gradient, in the precision that is set."""
    b, p, m = x.shape
    total, gram = _summed(x, max(ENTRIES // max(b * p, 1), 64) if double else SAMPLES, double)
    mean = total / m
    sigma = torch.addcmul(gram / m, mean.unsqueeze(-1), mean.unsqueeze(-2), value=-1)
    return (mean, sigma) if double else (mean.to(x.dtype), sigma.to(x.dtype))


def _summed(x: Tensor, size: int, double: bool) -> tuple[Tensor, Tensor]:
    """``X 1`` and ``X Xᵀ``."""
    if not double and x.shape[-1] <= size:
        return x.sum(-1), torch.bmm(x, x.mT)
    total = gram = None
    for part in x.split(size, dim=-1):
        part = widened(part) if double else part
        new = widened(part.sum(-1)), widened(torch.bmm(part, part.mT))
        total, gram = new if total is None or gram is None else (total + new[0], gram + new[1])
    assert total is not None
    assert gram is not None
    return total, gram


class _Covariance(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, double: bool) -> tuple[Tensor, Tensor]:
        with full_precision(x.device):
            return moments(x, double)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, bool], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(inputs[0], output[0])
        ctx.save_for_forward(inputs[0], output[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """``∂L/∂X = (1/m) [(S + Sᵀ) X + (g − (S + Sᵀ) r) 1ᵀ]`` with S = ∂L/∂Σ and g = ∂L/∂r."""
        x, mean = ctx.saved_tensors
        g, s = gradients
        twice = (s + s.mT) / x.shape[-1]
        constant = (g / x.shape[-1]).unsqueeze(-1) - twice @ mean.unsqueeze(-1)
        with full_precision(x.device):
            return affine_map(twice.to(x.dtype), x, constant.to(x.dtype)), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        refuse_nested_forward_mode()
        x, mean = ctx.saved_tensors
        assert tangents[0] is not None
        dx = tangents[0].to(mean.dtype)
        with full_precision(x.device):
            product = dx @ (x.to(mean.dtype) - mean.unsqueeze(-1)).mT / x.shape[-1]
        return dx.mean(-1), product + product.mT
