"""The Q factor of a row-wise QR decomposition with a fixed sign convention. Imports ``linalg``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stiefel.linalg.precision import in_double
from stiefel.linalg.products import add_product
from stiefel.linalg.tracing import is_traced

if TYPE_CHECKING:
    from jaxtyping import Float

WELL_CONDITIONED = 16.0
"""κ² up to which one Cholesky pass leaves no more than rounding."""
MOST = 1e3
"""‖L‖_F² ‖L⁻¹‖_F²/p² up to which a second pass takes away what the first one leaves."""


def qf(a: Float[Tensor, "*batch p n"]) -> Float[Tensor, "*batch p n"]:
    """Orthonormal rows spanning the rows of ``A``: ``A = L Q`` with L lower triangular, diagonal positive; returns Q.

    The sign makes the factor unique and continuous, so that qf(X) = X for orthonormal X; LAPACK's own sign does not.

    Near orthonormal rows, where retractions work, ``L Lᴴ = A Aᴴ`` by Cholesky (or by a series, nearer still) and
    ``Q = L⁻¹ A`` is as accurate as Householder reflections and several times faster; a second pass on Q takes away what
    condition numbers up to 30 leave (CholeskyQR2). Everything else goes to LAPACK. On a GPU the choice would make the
    host wait: there, the first pass is in float64, with a shift that keeps it from breaking down, and others follow.

    Args:
        a: matrix of full row rank, p ≤ n, real or complex (L's diagonal is positive, Q is unitary).

    Returns:
        Q with Q Qᴴ = I, the dtype of ``a``.

    Source: Absil, Mahony and Sepulchre (2008), Example 4.1.3, transposed; Fukaya, Nakatsukasa, Yanagisawa and Yamamoto
    (2014) for CholeskyQR2; Fukaya, Kannan, Nakatsukasa, Yamamoto and Yanagisawa (2020) for the shift.
    """
    if is_traced():
        return _by_reflections(a)
    return _without_waiting(a) if a.is_cuda else _near(a)


def _near(a: Tensor) -> Tensor:
    """A series where A is almost orthonormal, Cholesky passes for thin A, as long as they hold, LAPACK otherwise."""
    p, gram = a.shape[-2], a @ a.mH
    if a.numel() and not (torch.is_grad_enabled() and a.requires_grad):  # a series' second derivative is another's
        correction = _series(gram)
        if correction is not None:
            return add_product(a, correction, a)
    if 2 * p > a.shape[-1]:  # LAPACK is quicker
        return _by_reflections(a)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed.any():
        return _by_reflections(a)
    inverse = _inverse(factor)
    squares = factor.detach().abs().square().sum((-2, -1)) * inverse.detach().abs().square().sum((-2, -1))
    spread = float(squares.max()) / p**2 if squares.numel() else 1.0
    if not spread <= MOST:
        return _by_reflections(a)
    q = inverse @ a
    return q if spread <= 1 + (WELL_CONDITIONED - 1) / p else _pass(q)  # one small singular value may hide in a mean


def _series(gram: Tensor) -> Tensor | None:
    """``L⁻¹ − I`` for ``L Lᴴ = I + E`` with small E, to rounding; None where E is larger.

    ``L = I + L₁ − Φ(L₁L₁ᴴ) + O(E³)`` with L₁ = Φ(E), the lower triangle and half of the diagonal. After a step of
    size t along the manifold E is of size t², so that most steps need the first term alone.
    """
    eps = torch.finfo(gram.dtype).eps
    e = gram.clone()
    e.diagonal(dim1=-2, dim2=-1).sub_(1)
    size = float(torch.linalg.vector_norm(e, dim=(-2, -1)).max())
    if not size**3 <= eps / 8:
        return None
    first = _half(e)
    if size**2 <= eps / 8:
        return first.neg_()
    return _half(first @ first.mH) + first @ first - first


def _half(a: Tensor) -> Tensor:
    """Φ: the lower triangle with half of the diagonal, of which ``Φ(A) + Φ(A)ᴴ = A`` for Hermitian A."""
    lower = a.tril()
    lower.diagonal(dim1=-2, dim2=-1).mul_(0.5)
    return lower


def _pass(a: Tensor) -> Tensor:
    return _inverse(torch.linalg.cholesky_ex(a @ a.mH)[0]) @ a


def _inverse(factor: Tensor) -> Tensor:
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)


def _without_waiting(a: Tensor) -> Tensor:
    wide = in_double(a)
    gram = wide @ wide.mH
    size = gram.diagonal(dim1=-2, dim2=-1).real.sum(-1, keepdim=True)
    shift = 11 * sum(a.shape[-2:]) * torch.finfo(wide.dtype).eps * size
    shifted = gram + torch.diag_embed(shift.expand(*shift.shape[:-1], a.shape[-2])).to(gram.dtype)
    q = (_inverse(torch.linalg.cholesky_ex(shifted)[0]) @ wide).to(a.dtype)
    return _pass(_pass(q))


def _by_reflections(a: Tensor) -> Tensor:
    q, r = torch.linalg.qr(a.mH, mode="reduced")
    phase = torch.sgn(r.diagonal(dim1=-2, dim2=-1))
    phase = torch.where(phase == 0, 1.0, phase)  # zero counts as positive: the factor must not vanish
    return (q * phase.unsqueeze(-2)).mH
