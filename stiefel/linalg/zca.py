"""The symmetric inverse root of a covariance, which whitens by ZCA, and its gradient. Imports ``linalg``, errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stiefel.errors import BatchError
from stiefel.linalg.devices import may_wait
from stiefel.linalg.inverse_root import ITERATIONS, SMALLEST_ROOT, iterated_inverse_root
from stiefel.linalg.lyapunov import lyapunov, lyapunov_by_doubling
from stiefel.linalg.precision import full_precision, in_double
from stiefel.linalg.products import sym
from stiefel.linalg.tracing import readable, refuse_nested_forward_mode

if TYPE_CHECKING:
    from jaxtyping import Float

NOT_FINITE = (
    "the covariance of a batch has entries that are NaN or infinite, since the samples have; look for a loss that "
    "diverged, or for inputs that are not finite"
)


def zca_matrix(sigma: Float[Tensor, "b p p"]) -> Float[Tensor, "b p p"]:
    """Symmetric inverse square root ``Z = Σ^{-1/2}``: of all matrices that whiten, the one nearest to I on the data.

    With ``Σ = D diag(s²) Dᵀ`` and ``G = ∂L/∂Z``, the gradient is

        ∂L/∂Σ = −D [ (Dᵀ sym(G) D)_ij / (s_i s_j (s_i + s_j)) ] Dᵀ

    It has no ``1/(s_i² − s_j²)``, the term that makes autograd through ``eigh`` return NaN where eigenvalues repeat.
    Derivatives of any order are exact, one of them in forward mode at most (torch.func.jvp).

    Args:
        sigma: symmetric, positive semidefinite. Eigenvalues below the rounding of the largest, ``p ε λ_max``, are
            raised to it, which keeps Z and its gradient finite; Σ = 0 counts as I.

    Returns:
        Z, to the rounding of its dtype; computed on the CPU, in float64, where the device has none.

    Raises:
        BatchError: Σ is not finite.
        RuntimeError: a forward derivative of a forward derivative.

    Source: Huang, Yang, Lang and Deng, Decorrelated Batch Normalization, CVPR 2018, for the map; the gradient has the
    divided differences of ``λ^{-1/2}`` (Daleckii and Krein; Higham 2008, chapter 3) without their cancellation.
    """
    return zca_and_spectrum(sigma)[0]


def zca_and_spectrum(sigma: Float[Tensor, "b p p"]) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`zca_matrix`, eigenvectors D (columns) and the roots s of Σ's eigenvalues, these two without a gradient."""
    z, *spectrum = _Root.apply(sigma)
    d, s = (t.detach() for t in spectrum)
    return z, d, s


def zca_matrix_by_iteration(sigma: Float[Tensor, "b p p"]) -> Float[Tensor, "b p p"]:
    """:func:`zca_matrix` of a float64 Σ by a fixed number of products, for condition numbers up to 1e8.

    Nothing is read back: this is for GPUs. Directions with smaller eigenvalues are whitened in part.
    """
    with torch.no_grad(), full_precision(sigma.device):
        size = torch.linalg.matrix_norm(sigma, keepdim=True)
        eye = torch.eye(sigma.shape[-1], dtype=sigma.dtype, device=sigma.device)
        positive = torch.where(size > 0, sigma, eye)
        largest = 1.01 * torch.linalg.matrix_norm(positive, keepdim=True)
        z = iterated_inverse_root(positive, largest, ITERATIONS, SMALLEST_ROOT)
        h = positive @ z
    return _RootOfProducts.apply(sigma, z, h)


def eigenvectors(sigma: Float[Tensor, "*batch p p"]) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors; in float64 where the device of Σ has no eigenvectors of its own.

    Raises:
        BatchError: LAPACK has found that Σ is not finite, which it does not in every case.
    """
    try:
        return torch.linalg.eigh(sigma if may_wait(sigma) else in_double(sigma))
    except torch.linalg.LinAlgError as error:
        raise BatchError(NOT_FINITE) from error


def decomposed(sigma: Float[Tensor, "*batch p p"]) -> tuple[Tensor, Tensor]:
    """:func:`eigenvectors`, and eigenvalues floored at the rounding of the largest.

    Raises:
        BatchError: Σ is not finite; where nothing is read back, the result is NaN instead.
    """
    values, d = eigenvectors(sigma)
    if readable(values) and not bool(values.isfinite().all()):
        raise BatchError(NOT_FINITE)
    floor = (sigma.shape[-1] * torch.finfo(values.dtype).eps) * values[..., -1:]
    return torch.where(floor <= 0, 1.0, torch.maximum(values, floor)), d


def correction(e: Float[Tensor, "b p p"], d: Float[Tensor, "b p p"], s: Float[Tensor, "b p"]) -> Float[Tensor, "b p p"]:
    """The symmetric Δ for which ``Z + Δ`` whitens to second order in ``E = Z Σ Z − I``: ``HΔ + ΔH = −E``.

    Args:
        e: E, symmetric. Directions in which it is above 0.1 have no variance, or that of rounding, and are left out.
        d, s: eigenvectors (columns) and eigenvalues of ``H = Σ^{1/2}``.
    """
    e = d.mT @ e @ d
    there = (e.diagonal(dim1=-2, dim2=-1).abs() < 0.1).to(e.dtype)
    e = e * there.unsqueeze(-1) * there.unsqueeze(-2)
    return -(d @ (e / (s.unsqueeze(-1) + s.unsqueeze(-2))) @ d.mT)


def inverse_root_and_spectrum(sigma: Float[Tensor, "b p p"]) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`zca_and_spectrum` without a gradient, in the precision that is set."""
    values, d = decomposed(sigma)
    s = values.sqrt()
    return inverse_root(sigma, d, s).to(sigma), d.to(sigma), s.to(sigma)


def inverse_root(sigma: Tensor, d: Tensor, s: Tensor, corrected: bool = True) -> Tensor:
    """``D diag(1/s) Dᵀ``, in float32 corrected: its eigenvectors have an error of 1e-6, which 1/s magnifies."""
    z = torch.bmm(d / s.unsqueeze(-2), d.mT)
    if z.dtype != torch.float32 or not corrected:
        return z
    return z + correction(sym(z @ sigma @ z - torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)), d, s)


def along(d: Float[Tensor, "b p p"], s: Float[Tensor, "b p"], g: Float[Tensor, "b p p"]) -> Float[Tensor, "b p p"]:
    """The derivative of ``Σ^{-1/2}`` along G, or its adjoint, which is the same: the formula of :func:`zca_matrix`."""
    scaled = d / s.unsqueeze(-2)
    sums = s.unsqueeze(-1) + s.unsqueeze(-2)
    inner = torch.bmm(torch.bmm(scaled.mT, g + g.mT), scaled) / (-2 * sums)
    return torch.bmm(torch.bmm(d, inner), d.mT)


class _Root(torch.autograd.Function):
    """D and s are outputs so as to be saved; their derivative is taken as 0.

    torch.func has no outputs without a derivative where a jvp surrounds a vmap.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with full_precision(sigma.device):
            return inverse_root_and_spectrum(sigma)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, *output[1:])
        # The same for both: torch.func keeps one list of batch dimensions, of what is saved last.
        ctx.save_for_forward(*inputs, *output[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        sigma, d, s = ctx.saved_tensors
        with full_precision(sigma.device):
            if torch.is_grad_enabled():  # under create_graph
                return _differentiable_gradient(sigma, gradients[0], d, s)
            return along(d, s, gradients[0])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        refuse_nested_forward_mode()
        sigma, d, s = ctx.saved_tensors
        assert tangents[0] is not None
        with full_precision(d.device):  # the derivative is self-adjoint; as a function of Σ, for a gradient of it
            tangent = _differentiable_gradient(sigma, tangents[0], d, s)
        return tangent, torch.zeros_like(d), torch.zeros_like(s)


class _RootOfProducts(torch.autograd.Function):
    """``Z = Σ^{-1/2}`` that is known already, with ``H = Σ^{1/2}``, from which the gradient follows by products.

    With ``H dH + dH H = dΣ`` and ``dZ = −Z dH Z``: ``∂L/∂Σ = −Ω``, where ``HΩ + ΩH = Z sym(G) Z``.
    """

    @staticmethod
    def forward(ctx: Any, sigma: Tensor, z: Tensor, h: Tensor) -> Tensor:
        ctx.save_for_backward(sigma, z, h)
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        sigma, z, h = ctx.saved_tensors
        with full_precision(sigma.device):
            if torch.is_grad_enabled():
                values, d = decomposed(sigma.detach())
                return _differentiable_gradient(sigma, gradients[0], d, values.sqrt()), None, None
            return -lyapunov_by_doubling(h, z, z @ sym(gradients[0]) @ z), None, None


def _differentiable_gradient(sigma: Tensor, g: Tensor, d: Tensor, s: Tensor) -> Tensor:
    """``−Ω`` with ``HΩ + ΩH = Z sym(G) Z`` as a function of Σ and G, for ``create_graph``."""
    # Z anew, as a function of Σ whose own gradient is this one: so derivatives of any order are exact.
    z = zca_matrix(sigma)
    h = sym(sigma @ z)
    # h − h.detach() has the value 0 and the derivative of H, and D diag(s) Dᵀ the value that the plain gradient uses.
    h = h + ((d * s.unsqueeze(-2)) @ d.mT - h).detach()
    return -lyapunov(h, z @ sym(g) @ z, d, s)
