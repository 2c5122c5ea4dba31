"""Whitened activations as one operation of a compiled graph. Imports ``activations``, ``precision``, ``compat``.

Traced through, an eigendecomposition is one that a compiler cannot choose the precision of, in float32 or float64, by
the numbers that it finds. As one operation it is computed as it is without a compiler. The backward pass computes it
again, since between the two an operation keeps nothing but tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stiefel.compat.torch_private import recording_within
from stiefel.linalg.activations import Whitened, whitened_samples
from stiefel.linalg.precision import full_precision, has_double


def whitened_batch(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kind: str = "zca",
    eps: float = 0.0,
    iterations: int = 5,
    statistics: bool = False,
) -> Whitened:
    """:func:`whitened_samples`, in a graph too."""
    if not torch.compiler.is_compiling():
        return whitened_samples(x, weight, bias, kind=kind, eps=eps, iterations=iterations, statistics=statistics)
    gain = torch.ones_like(x[..., :1]) if weight is None else weight
    offset = torch.zeros_like(x[..., :1]) if bias is None else bias
    return Whitened(*whitened_in_graph(x, gain, offset, kind, float(eps), iterations))


@torch.library.custom_op("stiefel::whitened", mutates_args=())
def whitened_in_graph(
    x: Tensor, weight: Tensor, bias: Tensor, kind: str, eps: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The operation: whitened samples, their mean and covariance; arguments as of :func:`whitened_samples`."""
    with torch.no_grad():
        found = whitened_samples(x, weight, bias, kind=kind, eps=eps, iterations=iterations, statistics=True)
    assert found.mean is not None
    assert found.covariance is not None
    wide = torch.float64 if has_double(x.device) else x.dtype
    return found.y, found.mean.to(wide), found.covariance.to(wide)


@whitened_in_graph.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, kind: str, eps: float, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    b, p, m = x.shape
    # Of strided samples the computation makes dense ones, laid out as torch lays out a result: by the larger stride.
    y = x.new_empty(b, p, m) if torch.empty_like(x).stride(-1) == 1 else x.new_empty(b, m, p).mT
    wide = torch.float64 if has_double(x.device) else x.dtype
    return y, x.new_empty(b, p, dtype=wide), x.new_empty(b, p, p, dtype=wide)


@torch.library.custom_op("stiefel::whitened_backward", mutates_args=())
def whitened_backward(
    g: Tensor, x: Tensor, weight: Tensor, bias: Tensor, kind: str, eps: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    with recording_within(), full_precision(g.device):
        y = whitened_samples(*leaves, kind=kind, eps=eps, iterations=iterations).y
        of_x, of_weight, of_bias = torch.autograd.grad(y, leaves, g)
    return of_x.contiguous(), of_weight.contiguous(), of_bias.contiguous()


@whitened_backward.register_fake
def _(
    g: Tensor, x: Tensor, weight: Tensor, bias: Tensor, kind: str, eps: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    return *whitened_backward(gradients[0], *ctx.saved_tensors, *ctx.options), None, None, None


whitened_in_graph.register_autograd(_backward, setup_context=_setup)
