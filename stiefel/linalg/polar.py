"""The polar factor, whose gradient is finite and exact where singular values repeat. Imports ``linalg``, ``compat``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stiefel.compat.torch_private import is_batched_gradient, is_forward_mode
from stiefel.linalg.devices import may_wait
from stiefel.linalg.inverse_root import inverse_root, inverse_root_by_iteration
from stiefel.linalg.lu import solve
from stiefel.linalg.lyapunov import lyapunov, lyapunov_by_doubling, lyapunov_by_products
from stiefel.linalg.precision import full_precision, in_double, real_dtype, widened
from stiefel.linalg.products import newton_schulz
from stiefel.linalg.single import polar_in_single
from stiefel.linalg.tracing import is_traced, readable, refuse_nested_forward_mode

if TYPE_CHECKING:
    from jaxtyping import Float


SMALL = 2**12
"""Total size b·p² of a batch's Gram matrices below which their eigendecompositions are faster (2 CPU cores)."""
ILL = 1e-5
"""Ratio of extreme singular values below which a Gram matrix, also in double, has lost the digits that X needs."""


def polar(
    v: Float[Tensor, "*batch p n"], eps: float | None = None, solver: str | None = None
) -> Float[Tensor, "*batch p n"]:
    """Orthonormal matrix nearest to V: ``X = (V Vᴴ)^{-1/2} V``, the polar factor.

    With ``V Vᴴ = D diag(s²) Dᴴ`` and ``A = Dᴴ (G Xᴴ) D``, the gradient is

        ∂L/∂V = D [ (A − Aᴴ)_ij / (s_i + s_j) ] Dᴴ X + D diag(1/s) Dᴴ G (I − XᴴX)

    It has no ``1/(s_i² − s_j²)``, the term that makes autograd through ``eigh`` or ``svd`` return NaN at an orthonormal
    V. Second and higher derivatives are exact too, one of them in forward mode at most.

    A rank-deficient V is completed: X is orthonormal, and one of the nearest. In the gradient singular values below
    ``eps · s_max`` are raised to it, which keeps it finite. V = 0 gives X = 0 with gradient G: a gradient step leaves
    that point. On a GPU, and under a compiler, where nothing is read back, X lacks the directions that V has lost.

    Args:
        v: p ≤ n.
        eps: relative floor of the singular values in the gradient; default 1e-6, and 1e-9 for float64.
        solver: one of ``SOLVERS``, or None for the fastest that is accurate for the dtype, device and size.
            ``"eigen"``: float64 by SVD, anything narrower by the eigenvalues of its Gram matrix in float64 (accurate to
            1e-8 for condition numbers up to 1e4, where a float32 Gram matrix loses everything). ``"products"``: float32
            on a CPU, :func:`inverse_root` and conjugate gradients, and ``"eigen"`` where V is ill-conditioned.
            ``"iteration"``: float32 on a GPU, a fixed number of products that the host need not wait for,
            for condition numbers up to 1e4, without ``eps``: in double (:func:`inverse_root_by_iteration`), or in
            float32 alone where double is slow or missing (:func:`polar_in_single`).

    Returns:
        X in the dtype of ``v``. Autocast and TF32 are off inside.

    Source: Huang, Liu, Lang, Yu, Wang and Li (AAAI 2018), equations 6 and 7, for the map; the gradient in this gap-free
    form follows from differentiating ``H X = V``, ``H² = V Vᴴ`` (Higham 2008, section 8.2).
    """
    if eps is None:
        eps = 1e-9 if v.dtype in _DOUBLE else 1e-6
    return SOLVERS[solver or _fastest(v)](v, eps)


def _fastest(v: Tensor) -> str:
    if v.dtype in _DOUBLE or is_traced() or is_forward_mode():
        return "eigen"
    if not may_wait(v):  # eigh and svd would make the host wait
        return "iteration"
    if v.dtype not in (torch.float32, torch.complex64):
        return "eigen"
    # b·p², the total size of the Gram matrices
    return "products" if v.numel() // v.shape[-1] * v.shape[-2] >= SMALL else "eigen"


def _by_eigenvalues(v: Tensor, eps: float) -> Tensor:
    return _Polar.apply(v, eps)[0]


def _by_products(v: Tensor, eps: float) -> Tensor:
    batch = v.reshape(-1, *v.shape[-2:])
    with full_precision(v.device):
        root = inverse_root(batch.detach())
        if root is None:
            return _by_eigenvalues(v, eps)
        z, h = root
        return _PolarOfRoot.apply(batch, torch.bmm(z, batch.detach()), z, h, eps, True).reshape(v.shape)


def _by_iteration(v: Tensor, eps: float) -> Tensor:
    batch = v.reshape(-1, *v.shape[-2:])
    with full_precision(v.device), torch.no_grad():
        wide = widened(batch)
        if wide.dtype == batch.dtype:
            x, h, z = polar_in_single(batch)
        else:
            z, h = inverse_root_by_iteration(wide)
            x = torch.bmm(z, wide).to(v.dtype)
    return _PolarOfRoot.apply(batch, x, z, h, eps, False).reshape(v.shape)


SOLVERS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "eigen": _by_eigenvalues,
    "products": _by_products,
    "iteration": _by_iteration,
}
_DOUBLE = (torch.float64, torch.complex128)


def _decompose(v: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Polar factor X, left singular vectors D and floored singular values s of V, in double precision."""
    wide = in_double(v)  # on the CPU where the device has no double: second derivatives alone come here then
    if v.dtype not in _DOUBLE:
        # Faster than an SVD; a Gram matrix squares the condition number, so the SVD takes over below ILL.
        values, d = torch.linalg.eigh(wide @ wide.mH)
        s = values.clamp_min(0).sqrt()
        if not readable(s) or bool((s[..., 0] >= ILL * s[..., -1]).all()):
            s = _floor(s, eps)
            return ((d / s.unsqueeze(-2)) @ d.mH) @ wide, d, s
    d, s, wh = torch.linalg.svd(wide, full_matrices=False)
    # D is kept unless s_max = 0: V = 0 gives X = 0 instead of whatever vectors LAPACK returns.
    x = (d * (s[..., None, :1] > 0)) @ wh
    return newton_schulz(x), d, _floor(s, eps)  # long rows of an SVD are orthonormal to 1e-13 only


def _floor(s: Tensor, eps: float) -> Tensor:
    largest = s.amax(dim=-1, keepdim=True)
    return torch.where(largest > 0, torch.maximum(s, eps * largest), torch.ones_like(s))


class _Polar(torch.autograd.Function):
    """D and s are outputs so as to be saved; their derivative is taken as 0.

    torch.func has no outputs without a derivative where a jvp surrounds a vmap.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        with full_precision(v.device):
            x, d, s = _decompose(v, eps)
        # D and s are stored for the gradient: in V's precision, but not below float32.
        work = torch.promote_types(v.dtype, torch.float32)
        return x.to(v), d.to(v.device, work), s.to(v.device, real_dtype(work))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, Tensor, Tensor]) -> None:
        v, ctx.eps = inputs
        x, d, s = output
        ctx.save_for_backward(v, x, d, s)
        # The same for both: torch.func keeps one list of batch dimensions, of what is saved last.
        ctx.save_for_forward(v, x, d, s)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        v, x, d, s = ctx.saved_tensors
        with full_precision(v.device):
            g = grads[0].to(d.dtype)
            if torch.is_grad_enabled():  # under create_graph
                gradient = _differentiable_gradient(v.to(d.dtype), g, d, s, ctx.eps)
            else:
                gradient = _along(x.to(d.dtype), d, s, g)
        return gradient.to(v.dtype), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        refuse_nested_forward_mode()
        v, x, d, s = ctx.saved_tensors
        assert tangents[0] is not None
        with full_precision(v.device):  # the derivative is self-adjoint; as a function of V, for a gradient of it
            tangent = _differentiable_gradient(v.to(d.dtype), tangents[0].to(d.dtype), d, s, ctx.eps)
        return tangent.to(x.dtype), torch.zeros_like(d), torch.zeros_like(s)


def _along(x: Tensor, d: Tensor, s: Tensor, g: Tensor) -> Tensor:
    """The derivative of the polar factor along G, or its adjoint, which is the same: the formula of :func:`polar`."""
    rows = s.unsqueeze(-1)
    e, f = d.mH @ x, d.mH @ g  # X and G in the basis of D
    a = f @ e.mH
    # D [K E + diag(1/s)(F − A E)] with A E = Dᴴ G XᴴX, in fewer products
    k = (a - a.mH) / (rows + rows.mT)
    return d @ ((k - a / rows) @ e + f / rows)


class _PolarOfRoot(torch.autograd.Function):
    """X, the polar factor of V, from which the gradient follows with Z = (VVᴴ)^{-1/2} and H = (VVᴴ)^{1/2}.

    It takes five products of p×n, and some of p×p, in the precision of Z and H. ``waits``: whether the host may read
    numbers back from the device.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, x: Tensor, z: Tensor, h: Tensor, eps: float, waits: bool) -> Tensor:
        ctx.eps, ctx.waits = eps, waits
        ctx.save_for_backward(v, z, h, x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        v, z, h, x = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _gradient_by_eigenvalues(v, grads[0].to(v.dtype), ctx.eps), *5 * [None]
        with full_precision(v.device):
            g, x = grads[0].to(z.dtype), x.to(z.dtype)
            a = g @ x.mH
            c = a - a.mH  # HΩ + ΩH = C
            # A batch of gradients (is_grads_batched) has no single number to read.
            waits = ctx.waits and not is_traced() and not is_batched_gradient(g)
            omega = lyapunov_by_products(h, c) if waits else lyapunov_by_doubling(h, z, c)
            if v.shape[-2] == v.shape[-1]:  # then I − XᴴX = 0
                gradient = torch.bmm(omega, x)
            else:
                # Ω X + Z G (I − XᴴX) = Z G + (Ω − Z A) X
                gradient = torch.baddbmm(z @ g, torch.baddbmm(omega, z, a, alpha=-1), x)
        return gradient.to(v.dtype), *5 * [None]


def _gradient_by_eigenvalues(v: Tensor, g: Tensor, eps: float) -> Tensor:
    with full_precision(v.device):
        _, d, s = _decompose(v.detach(), eps)
        return _differentiable_gradient(v, g, d.to(v), s.to(v.device, real_dtype(v.dtype)), eps)


def _differentiable_gradient(v: Tensor, g: Tensor, d: Tensor, s: Tensor, eps: float) -> Tensor:
    """The gradient as a function of V and G, for ``create_graph``: ``Ω X + H⁻¹ G (I − XᴴX)``, HΩ + ΩH = GXᴴ − XGᴴ."""
    # X anew, as a function of V whose own gradient is this one: so derivatives of any order are exact.
    x = polar(v, eps)
    a = g @ x.mH
    h = _hermitian_factor(v, x, d, s)
    return lyapunov(h, a - a.mH, d, s) @ x + solve(h, g - a @ x)


def _hermitian_factor(v: Tensor, x: Tensor, d: Tensor, s: Tensor) -> Tensor:
    """``H = V Xᴴ`` with its derivative, and with the floored value ``D diag(s) Dᴴ`` that the plain gradient uses."""
    h = v @ x.mH
    h = (h + h.mH) / 2
    # h − h.detach() has the value 0 and the derivative of H.
    return h + ((d * s.unsqueeze(-2)) @ d.mH - h).detach()
