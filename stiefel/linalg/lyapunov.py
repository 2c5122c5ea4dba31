"""The Lyapunov equation with a given eigendecomposition, differentiable to any order. Imports only torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


class _Lyapunov(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, c: Tensor, d: Tensor, s: Tensor) -> Tensor:
        gaps = s.unsqueeze(-1) + s.unsqueeze(-2)  # sums, not differences: no trouble where eigenvalues repeat
        return d @ ((d.mH @ c @ d) / gaps) @ d.mH

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        h, _, d, s = inputs
        ctx.save_for_backward(h, d, s, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        h, d, s, omega = ctx.saved_tensors
        z = lyapunov(h, grads[0], d, s)
        return -(z @ omega.mH + omega.mH @ z), z, None, None


def lyapunov(
    h: Float[Tensor, "*batch p p"],
    c: Float[Tensor, "*batch p p"],
    d: Float[Tensor, "*batch p p"],
    s: Float[Tensor, "*batch p"],
) -> Float[Tensor, "*batch p p"]:
    """Solve ``H Ω + Ω H = C`` for Ω, where ``H = D diag(s) Dᴴ`` is positive definite.

    ``Ω = D [ (Dᴴ C D)_ij / (s_i + s_j) ] Dᴴ``. The derivative with respect to H and C solves the same equation again,
    so it is exact to any order and never differentiates the eigendecomposition.

    Args:
        h: the positive definite matrix, as the graph knows it.
        c: the right-hand side.
        d, s: eigenvectors (columns) and eigenvalues of ``h``, taken as constants.

    Source: Higham, Functions of Matrices (2008), section B.14.
    """
    return _Lyapunov.apply(h, c, d, s)
