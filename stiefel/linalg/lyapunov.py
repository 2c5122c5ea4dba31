"""The Lyapunov equation: with a given eigendecomposition, differentiable to any order; and by products alone.

Imports ``lu``, ``products`` and ``tracing``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stiefel.linalg.lu import inverse_of
from stiefel.linalg.products import add_product, inner
from stiefel.linalg.tracing import refuse_nested_forward_mode

if TYPE_CHECKING:
    from jaxtyping import Float


class _Lyapunov(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, c: Tensor, d: Tensor, s: Tensor) -> Tensor:
        gaps = s.unsqueeze(-1) + s.unsqueeze(-2)  # sums, not differences: repeated eigenvalues do no harm
        return d @ ((d.mH @ c @ d) / gaps) @ d.mH

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        h, _, d, s = inputs
        ctx.save_for_backward(h, d, s, output)
        ctx.save_for_forward(h, d, s, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        h, d, s, omega = ctx.saved_tensors
        # Ω ↦ HΩ + ΩH is self-adjoint: Z = ∂L/∂C solves the same equation with ∂L/∂Ω on the right.
        z = lyapunov(h, grads[0], d, s)
        return -(z @ omega.mH + omega.mH @ z), z, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        refuse_nested_forward_mode()
        h, d, s, omega = ctx.saved_tensors
        dh, dc = tangents[:2]
        right = torch.zeros_like(omega) if dc is None else dc
        return lyapunov(h, right if dh is None else right - dh @ omega - omega @ dh, d, s)


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
        h: the positive definite matrix, with its place in the autograd graph.
        c: the right-hand side.
        d, s: eigenvectors (columns) and eigenvalues of ``h``, taken as constants.

    Source: Higham, Functions of Matrices (2008), section B.14.
    """
    return _Lyapunov.apply(h, c, d, s)


@torch.no_grad()
def lyapunov_by_products(
    h: Float[Tensor, "b p p"], c: Float[Tensor, "b p p"], tolerance: float = 3e-6, most: int = 100
) -> Float[Tensor, "b p p"]:
    """Solve ``H Ω + Ω H = C`` for skew-Hermitian C by conjugate gradients, one product for each step.

    ``Ω ↦ HΩ + ΩH`` is symmetric positive definite like H, with the same condition number, and Ω stays skew-Hermitian,
    so that ``ΩH = −(HΩ)ᴴ`` costs nothing. At condition number 1 no step is needed, at 3 about six. Reads one number
    back from the device for each step: this is for the CPU.

    Args:
        h: positive definite.
        c: skew-Hermitian.
        tolerance: residual to stop at, relative to ‖C‖_F of each matrix.
        most: steps at most; with H's condition number κ, CG needs about √κ for each digit.

    Source: Hestenes and Stiefel (1952).
    """
    scale = c.abs().amax(dim=(-2, -1), keepdim=True)
    c = c / torch.where(scale > 0, scale, 1)  # otherwise squares of small gradients would vanish
    tiny = torch.finfo(h.dtype).tiny  # a matrix with C = 0 has direction 0: 0/tiny instead of 0/0
    # Start at the solution for H = (tr H/p) I, which is exact at condition number 1.
    omega = c / (2 * h.diagonal(dim1=-2, dim2=-1).real.mean(-1)[:, None, None])
    product = torch.bmm(h, omega)
    residual = c - (product - product.mH)
    direction, image = residual.clone(), torch.empty_like(residual)
    size, goal = inner(residual, residual), tolerance**2 * inner(c, c)
    for _ in range(most):
        if not bool((size > goal).any()):
            break
        torch.bmm(h, direction, out=product)  # in place: fresh memory costs as much as a product at p = 512
        length = size / (2 * inner(direction, product) + tiny)  # ⟨D, HD + DH⟩ = 2⟨D, HD⟩ for skew D
        torch.sub(product, product.mH, out=image)
        omega.addcmul_(length, direction)
        residual.addcmul_(length, image, value=-1)
        # The next direction: the residual + (size / before) · direction.
        before, size = size, inner(residual, residual)
        direction.mul_(size / (before + tiny)).add_(residual)
    return omega.mul_(scale)


@torch.no_grad()
def lyapunov_by_doubling(
    h: Float[Tensor, "*batch p p"], z: Float[Tensor, "*batch p p"], c: Float[Tensor, "*batch p p"], steps: int = 10
) -> Float[Tensor, "*batch p p"]:
    """Solve ``H Ω + Ω H = C`` in a fixed number of products, without reading anything back; for double.

        A = (H − μI)(H + μI)⁻¹,   Ω₀ = 2μ (H + μI)⁻¹ C (H + μI)⁻¹,   Ω ← Ω + AΩA,   A ← A²

    k steps sum the first 2^k terms of ``Ω = Σ Aʲ Ω₀ Aʲ``, each smaller by ((√κ − 1)/(√κ + 1))² at the best μ; with μ²
    the ratio of ‖H‖_F to ‖H⁻¹‖_F, 10 steps suffice for condition numbers κ up to 1e4.

    Args:
        h: Hermitian and positive definite.
        z: its inverse.
        c: any right-hand side.

    Source: Smith (1968), Matrix equation XA + BX = C, for the squared form.
    """
    # μ lies between the extreme eigenvalues of H, near their geometric mean.
    mu = (torch.linalg.matrix_norm(h, keepdim=True) / torch.linalg.matrix_norm(z, keepdim=True)).sqrt()
    shift = mu * torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    inverse = inverse_of(h + shift)
    omega, a = 2 * mu * (inverse @ c @ inverse), (h - shift) @ inverse
    for step in range(steps):
        omega = add_product(omega, a @ omega, a)
        if step < steps - 1:
            a = a @ a
    return omega
