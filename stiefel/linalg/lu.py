"""Solves and inverses by LU factorization, over batches. Imports ``tracing``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stiefel.linalg.tracing import refuse_nested_forward_mode

TOGETHER = 128
"""Largest matrix size of a batch that torch gets in one call on a CPU: with the MKL tried, calls fail from 150 on."""


def one_by_one(function: Callable[..., Tensor], *batches: Tensor) -> Tensor:
    """A function of matrices that factorizes its first argument by LU, applied to ``(*batch, m, k)``.

    On a CPU torch factorizes a batch in several threads, in which MKL starts threads of its own for larger matrices:
    factors are wrong, an error is raised, or the call never returns (pytorch issue 142815, torch 2.5 to 2.13). So
    larger matrices are factorized one after the other, each by all threads.

    Args:
        function: takes one matrix of each of ``batches``, or the whole batches.
        batches: with equal batch dimensions.
    """
    first = batches[0]
    outer = first.shape[:-2]
    if first.device.type != "cpu" or max(first.shape[-2:]) <= TOGETHER or outer.numel() < 2:
        return function(*batches)
    # One tuple for each matrix of the batch, with its counterpart of every argument.
    matrices = zip(*(b.reshape(-1, *b.shape[-2:]).unbind() for b in batches), strict=True)
    results = torch.stack([function(*m) for m in matrices])
    return results.reshape(*outer, *results.shape[1:])


def solve(a: Tensor, b: Tensor) -> Tensor:
    """``A⁻¹ B`` for nonsingular A, without the test for singularity, for which the host would wait on a GPU."""
    if torch.compiler.is_compiling():  # no compiler traces the derivatives that _Solve defines
        return torch.linalg.solve_ex(a, b)[0]
    outer = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return _Solve.apply(a.expand(*outer, *a.shape[-2:]), b.expand(*outer, *b.shape[-2:]))


def solve_from_the_right(b: Tensor, a: Tensor) -> Tensor:
    """``B A⁻¹`` likewise."""
    return solve(a.mH, b.mH).mH


def inverse_of(a: Tensor) -> Tensor:
    """``A⁻¹`` likewise."""
    return solve(a, torch.eye(a.shape[-1], dtype=a.dtype, device=a.device))


class _Solve(torch.autograd.Function):
    """torch's solve, with :func:`one_by_one` also where torch.func adds a batch dimension, and in the derivatives."""

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return one_by_one(lambda a, b: torch.linalg.solve_ex(a, b)[0], a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        # With Y = ∂L/∂X: ∂L/∂B = A⁻ᴴ Y and ∂L/∂A = −(∂L/∂B) Xᴴ.
        a, x = ctx.saved_tensors
        b = solve(a.mH, gradients[0])
        return -b @ x.mH, b

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        refuse_nested_forward_mode()
        # From A X = B: A dX = dB − dA X.
        a, x = ctx.saved_tensors
        da, db = tangents
        right = torch.zeros_like(x) if db is None else db
        return solve(a, right if da is None else right - da @ x)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], a: Tensor, b: Tensor) -> tuple[Tensor, int]:
        # Added in front, the new dimension is one more of the batch; an argument without it is broadcast by solve.
        a, b = (t if d is None else t.movedim(d, 0) for t, d in zip((a, b), in_dims, strict=True))
        return solve(a, b), 0
