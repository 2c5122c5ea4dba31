"""Directions that turn the span of a matrix's rows, and none within it. Imports ``products``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stiefel.linalg.products import add_product

if TYPE_CHECKING:
    from jaxtyping import Float


def project_horizontal(x: Float[Tensor, "*batch p n"], u: Float[Tensor, "*batch p n"]) -> Float[Tensor, "*batch p n"]:
    """The part of U that turns the span of the orthonormal rows of X, and not the rows within it: ``U − U Xᴴ X``.

    Source: Edelman, Arias and Smith (1998), section 2.5, in rows form.
    """
    return add_product(u, u @ x.mH, x, alpha=-1)


def with_horizontal_gradient(x: Float[Tensor, "*batch p n"]) -> Float[Tensor, "*batch p n"]:
    """X itself, whose gradient is that of a function of the rows' span alone: G becomes ``G − G Xᴴ X``."""
    return _Horizontal.apply(x)


class _Horizontal(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return project_horizontal(x, gradients[0])
