"""Maps that act on singular values alone, differentiated without storing steps. Imports ``linalg`` and ``compat``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stiefel.compat.torch_private import is_forward_mode
from stiefel.linalg.precision import full_precision
from stiefel.linalg.tracing import is_traced

if TYPE_CHECKING:
    from jaxtyping import Float

Map = Callable[[Tensor], Tensor]

SMALL = 2**15
"""Largest number of entries at which autograd through f, operation by operation, is faster and its memory small."""


def spectral_map(f: Callable[[Tensor], tuple[Tensor, Map]], x: Float[Tensor, "*batch p n"]) -> Tensor:
    """``f(X)`` for an f that takes singular values to singular values, ``U diag(s) Wᴴ ↦ U diag(φ(s)) Wᴴ``.

    Such a map is the gradient of ``Σ Φ(sᵢ)``, Φ' = φ, so that its derivative is self-adjoint: the backward pass is the
    directional derivative along the incoming gradient. That takes as many products as autograd through f, and stores X
    alone, not the steps of an iteration.

    Args:
        f: returns f(X), and the same map with its decisions fixed (such as numbers of steps), to be differentiated.
        x: p ≤ n.

    Source: Lewis, Derivatives of spectral functions, 1996, for the scalar function.
    """
    small = x.numel() <= SMALL
    return f(x)[0] if small or is_forward_mode() or is_traced() else _SpectralMap.apply(f, x)


def gram_factor(polynomials: Iterable[Map], gram: Float[Tensor, "*batch p p"]) -> Tensor:
    """The Z for which ``Z X`` is X after steps ``X ← T(X Xᴴ) X``, from ``M = X Xᴴ`` alone.

        Z ← T(M) Z,   M ← T(M) M T(M)

    Args:
        polynomials: T of each step, of a Hermitian matrix; at least one.
        gram: M, in double where its condition number, the square of X's, must not cost digits.
    """
    first, *others = polynomials
    t = z = first(gram)
    for polynomial in others:
        # T commutes with M, so that the Gram matrix of T X is T M T.
        gram = t @ gram @ t
        t = polynomial(gram)
        z = t @ z
    return z


class _SpectralMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, f: Callable[[Tensor], tuple[Tensor, Map]], x: Tensor) -> Tensor:
        # The map of the backward pass must take the same number of steps as this one, and decide nothing anew.
        y, ctx.repeated = f(x)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (x,) = ctx.saved_tensors
        with full_precision(x.device):
            # Self-adjoint: the vector-Jacobian product is a Jacobian-vector product.
            return None, torch.func.jvp(ctx.repeated, (x,), (gradients[0],))[1]
