"""Whitened activations: a batch times a matrix that is made of its own covariance. Imports ``linalg``, errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from stiefel.compat.torch_private import is_forward_mode
from stiefel.errors import BatchError
from stiefel.linalg.covariance import affine_map, covariance, moments
from stiefel.linalg.devices import may_wait
from stiefel.linalg.nested import nested_gradients
from stiefel.linalg.precision import full_precision, has_double, wide_dtype, widened
from stiefel.linalg.products import sym
from stiefel.linalg.tracing import is_traced, readable
from stiefel.linalg.whitening import newton_matrix, pca_matrix
from stiefel.linalg.zca import (
    NOT_FINITE,
    along,
    correction,
    eigenvectors,
    inverse_root,
    inverse_root_and_spectrum,
    zca_and_spectrum,
    zca_matrix_by_iteration,
)

if TYPE_CHECKING:
    from jaxtyping import Float

WHITENINGS = ("zca", "pca", "newton")
MODERATE = (1e-6, 1e6)
"""Root mean squares of samples, or variances, that are left as they are: powers of them stay in range."""
WELL = 0.1
"""Ratio of extreme eigenvalues of Σ^{1/2} down to which Σ has digits enough: of float32, 1e-7, to whiten to 1e-5."""

CLOSE = 9.0
"""Condition number of Σ up to which float32 eigenvectors whiten to 4e-6 as they are."""

FEW = 7
"""Steps of Newton's iteration up to which it loses no digits of float32, whatever the condition number: 1e-6."""


class Whitened(NamedTuple):
    """Whitened samples, and the batch's mean and covariance, without a gradient, where they were asked for."""

    y: Float[Tensor, "b p m"]
    mean: Float[Tensor, "b p"] | None = None
    covariance: Float[Tensor, "b p p"] | None = None


def whitened_samples(
    x: Float[Tensor, "b p m"],
    weight: Float[Tensor, "b p 1"] | None = None,
    bias: Float[Tensor, "b p 1"] | None = None,
    *,
    kind: str = "zca",
    eps: float = 0.0,
    iterations: int = 5,
    statistics: bool = False,
) -> Whitened:
    """Whiten m samples of p features: ``y = γ W (x − μ) + β`` with ``W (Σ + eps I) Wᵀ = I``.

    The covariance Σ and W are computed in float64; of float32 samples in float32 for ZCA on a CPU where the condition
    number of Σ is at most 100, and for up to 7 of Newton's steps. Samples whose squares would overflow or vanish are
    scaled by a power of two first, which changes no digit. Derivatives of any order are exact, one of them in forward
    mode at most; of PCA the first.

    Args:
        x: float32 or float64; each column a sample; b independent batches.
        weight, bias: γ and β.
        kind: one of ``WHITENINGS``: ``"zca"`` (:func:`zca_matrix`), ``"pca"`` (:func:`pca_matrix`) or ``"newton"``
            (:func:`newton_matrix`).
        eps: added to the variances.
        iterations: of ``"newton"``.
        statistics: return μ and Σ too.

    Raises:
        BatchError: samples that are not finite.
    """
    with full_precision(x.device):
        if kind == "zca" and readable(x) and not is_forward_mode():
            return _by_eigenvalues(x, weight, bias, eps, statistics)
        return _differentiable(x, weight, bias, kind, eps, iterations, statistics)


def whitening_of(
    sigma: Float[Tensor, "b p p"], kind: str = "zca", eps: float = 0.0, iterations: int = 5
) -> Float[Tensor, "b p p"]:
    """W of a covariance that is known, in float64, or in the dtype of a device without; for what is done once."""
    with full_precision(sigma.device):
        sigma = _ridged(widened(sigma), eps)
        if kind == "newton":
            return newton_matrix(sigma, iterations)
        return pca_matrix(sigma) if kind == "pca" else zca_and_spectrum(sigma)[0]


def _ridged(sigma: Tensor, ridge: Tensor | float) -> Tensor:
    """``Σ + ridge · I``, as a constant."""
    sigma = sigma.detach().clone()
    sigma.diagonal(dim1=-2, dim2=-1).add_(ridge)
    return sigma


def _scaled(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``2^k X`` of each batch, and 2^k (b, 1) in double, so that squares of X and eps · 4^k are in range."""
    fixed = x.detach()
    wide = wide_dtype(x) if has_double(x.device) else x.dtype
    if fixed.numel() and readable(fixed):
        sizes = torch.linalg.vector_norm(fixed, dim=(-2, -1)) / (x.shape[-2] * x.shape[-1]) ** 0.5
        smallest, largest = sizes.aminmax()
        if smallest > MODERATE[0] and largest < MODERATE[1]:
            return x, torch.ones(len(x), 1, dtype=wide, device=x.device)
    size = fixed.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(eps**0.5)
    exponent = torch.where(size > 0, -torch.frexp(size).exponent, 0)
    # 2^k may overflow where 2^k X does not: X is multiplied by two factors, one after the other.
    half = exponent.div(2, rounding_mode="floor")
    scaled = x * torch.exp2(half.to(x.dtype)) * torch.exp2((exponent - half).to(x.dtype))
    return scaled, torch.exp2(exponent.squeeze(-1).to(wide))


# --- any kind, on any device, to any order ---


def _differentiable(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
    iterations: int,
    statistics: bool = False,
) -> Whitened:
    mean = x.detach().mean(-1, keepdim=True)
    samples, factor = _scaled(x - mean, eps)
    ridge = _ridge(eps, factor)
    in_single = kind == "newton" and iterations <= FEW and x.dtype == torch.float32
    r, sigma = covariance(samples, double=not in_single)
    if kind == "newton" and readable(sigma) and not bool(sigma.isfinite().all()):  # the others look themselves
        raise BatchError(NOT_FINITE)
    ridged = sigma + torch.diag_embed(ridge.to(sigma.dtype).expand(sigma.shape[:-1]))
    if kind == "zca":
        w = _zca_matrix(samples, ridged, ridge)
    else:
        w = pca_matrix(ridged) if kind == "pca" else newton_matrix(ridged, iterations)
    if weight is not None:
        w = weight * w
    constant = -(w @ r.unsqueeze(-1))
    if bias is not None:
        constant = bias + constant
    y = affine_map(w.to(x.dtype), samples, constant.to(x.dtype))
    return Whitened(y, *_of_batch(mean, r, sigma, factor)) if statistics else Whitened(y)


def _ridge(eps: float, factor: Tensor) -> Tensor:
    """``eps · 4^k`` of each batch, where 4^k itself may overflow."""
    return eps * factor * factor if eps else torch.zeros_like(factor)


def _of_batch(mean: Tensor, r: Tensor, sigma: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the batch from those of its shifted and scaled samples."""
    scale = factor.unsqueeze(-1)
    return mean.squeeze(-1) + r.detach() / factor, sigma.detach() / scale / scale


def _zca_matrix(x: Tensor, sigma: Tensor, ridge: Tensor) -> Tensor:
    if x.dtype == torch.float32 and not may_wait(x) and has_double(x.device) and not is_traced():
        return zca_matrix_by_iteration(sigma)
    z, d, s = zca_and_spectrum(sigma)
    return z if x.dtype == torch.float32 else z + _by_samples(x.detach(), z.detach(), d, s, ridge)


def _by_samples(x: Tensor, z: Tensor, d: Tensor, s: Tensor, ridge: Tensor) -> Tensor:
    """:func:`correction` by the covariance of the whitened samples.

    Σ has the rounding of its largest eigenvalue, which Z magnifies by the condition number; theirs has not.
    """
    eye = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    return correction(sym(moments(z @ x)[1] - eye + ridge.unsqueeze(-1) * (z @ z)), d, s)


# --- ZCA where numbers can be read, as one operation ---


class _Statistics(NamedTuple):
    """Samples, shifted and scaled; their mean r and Σ; with the ridge Σ^{-1/2}, eigenvectors, roots of eigenvalues."""

    samples: Tensor
    r: Tensor
    sigma: Tensor
    z: Tensor
    d: Tensor
    s: Tensor


def _by_eigenvalues(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, statistics: bool) -> Whitened:
    with torch.no_grad():
        mean = x.mean(-1, keepdim=True)
        samples, factor = x - mean, None
        found = _in_single(samples, eps)
        if found is None:
            samples, factor = _scaled(samples, eps)
            found = _in_double(samples, _ridge(eps, factor))
    y = _Whitened.apply(x, weight, bias, mean, found, factor, eps)
    if not statistics:
        return Whitened(y)
    if factor is None:
        return Whitened(y, mean.squeeze(-1) + found.r, found.sigma)
    return Whitened(y, *_of_batch(mean, found.r, found.sigma, factor))


def _in_single(x: Tensor, eps: float) -> _Statistics | None:
    """In float32; None where that has too few digits, or is not asked for."""
    if x.dtype != torch.float32:
        return None
    r, sigma = moments(x, double=False)
    ridged = _ridged(sigma, eps)
    try:
        values, d = eigenvectors(ridged)
    except BatchError:  # squares may have overflowed
        return None
    # Read as numbers: comparisons of tensors would take as long as the products of a small batch.
    low, high = values[:, 0].tolist(), values[:, -1].tolist()
    if not all(MODERATE[0] < a <= b < MODERATE[1] and a >= WELL**2 * b for a, b in zip(low, high, strict=True)):
        return None  # also where some are NaN
    s = values.sqrt()
    corrected = any(b > CLOSE * a for a, b in zip(low, high, strict=True))
    return _Statistics(x, r, sigma, inverse_root(ridged, d, s, corrected), d, s)


def _in_double(x: Tensor, ridge: Tensor) -> _Statistics:
    r, sigma = moments(x)
    z, d, s = inverse_root_and_spectrum(_ridged(sigma, ridge))
    if x.dtype == torch.float64 and not bool((s[:, 0] >= WELL * s[:, -1]).all()):
        z = z + _by_samples(x, z, d, s, ridge)
    return _Statistics(x, r, sigma, z, d, s)


class _Whitened(torch.autograd.Function):
    """``y = γ Z (x − r) + β`` of known statistics, with the gradient through all of them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        found: _Statistics,
        factor: Tensor | None,
        eps: float,
    ) -> Tensor:
        w = found.z if weight is None else weight * found.z
        constant = -(w @ found.r.unsqueeze(-1))
        if bias is not None:
            constant = constant + bias
        ctx.factor, ctx.eps = factor, eps
        ctx.save_for_backward(x, weight, bias, mean, found.r, found.z, found.d, found.s)
        return affine_map(w.to(x.dtype), found.samples, constant.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, r, z, d, s = ctx.saved_tensors
        with full_precision(x.device):
            if torch.is_grad_enabled():  # under create_graph: the gradient as a function of all it depends on
                asked = nested_gradients(
                    lambda a, b, c: _differentiable(a, b, c, "zca", ctx.eps, 1).y, (x, weight, bias), gradients
                )
                return *asked, None, None, None, None
            samples = x - mean  # again: kept, they would take as much memory as the batch
            if ctx.factor is not None:
                samples, _ = _scaled(samples, ctx.eps)
            plain = _gradients(gradients[0], samples, r, z, d, s, weight, ctx.factor)
            pairs = zip(plain, (x, weight, bias), strict=True)
            return *(None if t is None or f is None else f.to(t.dtype) for f, t in pairs), None, None, None, None


def _gradients(
    g: Tensor, x: Tensor, r: Tensor, z: Tensor, d: Tensor, s: Tensor, weight: Tensor | None, factor: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """∂L/∂x, ∂L/∂γ and ∂L/∂β, G = ∂L/∂y; with W = γ Z and S = ∂L/∂Σ by :func:`along`:

    ``∂L/∂W = G (x − r)ᵀ``, ``∂L/∂x = Wᵀ (G − mean G) + (2/m) S (x − r)``.
    """
    column = r.unsqueeze(-1)
    total = g.sum(-1, keepdim=True).to(z.dtype)
    of_w = torch.baddbmm(torch.bmm(g, x.mT).to(z.dtype), total, column.mT, alpha=-1)
    w, of_z = (z, of_w) if weight is None else (weight * z, weight * of_w)
    twice = along(d, s, of_z) * (2 / x.shape[-1])
    constant = torch.baddbmm(w.mT @ total / -x.shape[-1], twice, column, alpha=-1)
    gradient = affine_map(w.mT.to(x.dtype), g, constant.to(x.dtype))
    if x.stride(-1) == 1:
        gradient = torch.baddbmm(gradient, twice.to(x.dtype), x)
    else:
        gradient = torch.baddbmm(gradient.mT, x.mT, twice.mT.to(x.dtype)).mT
    if factor is not None:
        gradient = gradient * factor.unsqueeze(-1).to(x.dtype)
    return gradient, None if weight is None else (of_w * z).sum(-1, keepdim=True), total
