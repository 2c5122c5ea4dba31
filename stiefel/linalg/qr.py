"""The Q factor of a row-wise QR decomposition with a fixed sign convention. Imports ``linalg``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stiefel.linalg.devices import may_wait
from stiefel.linalg.fill import fill_like
from stiefel.linalg.precision import widened
from stiefel.linalg.products import add_product, gram_matrix
from stiefel.linalg.tracing import is_traced, readable

if TYPE_CHECKING:
    from jaxtyping import Float

WELL_CONDITIONED = 16.0
"""κ² up to which one Cholesky pass leaves no more than rounding."""
MOST = 1e3
"""‖L‖_F² ‖L⁻¹‖_F²/p² up to which a second pass removes the error that the first one leaves."""
PASSES = {(32, 64): (2.0**14, 1), (64, 64): (2.0**14, 4), (32, 32): (8.0, 6)}
"""Of :func:`_without_waiting`, by the bits of A's numbers and of those computed with: δ in units of A's epsilon, and
the shifted passes that make δ times a singular value of 1e-6 large enough for the last one."""


def qf(a: Float[Tensor, "*batch p n"]) -> Float[Tensor, "*batch p n"]:
    """Orthonormal rows spanning the rows of ``A``: ``A = L Q`` with L lower triangular, diagonal positive; returns Q.

    The sign makes the factor unique and continuous, so that qf(X) = X for orthonormal X; LAPACK's own sign does not.

    Near orthonormal rows, where retractions work, ``L Lᴴ = A Aᴴ`` by Cholesky (or by a series, nearer still) and
    ``Q = L⁻¹ A`` is as accurate as Householder reflections and several times faster; a second pass on Q removes the
    error at condition numbers up to 30 (CholeskyQR2). Everything else goes to LAPACK. On a GPU the choice would make
    the host wait: there, passes are in float64 if it is fast, with a shift that keeps them from breaking down.

    Args:
        a: p ≤ n, real or complex (L's diagonal is positive, Q is unitary). Where a row depends on those above it, Q is
            not unique, and its row there is an arbitrary orthonormal one.

    Returns:
        Q with Q Qᴴ = I, the dtype of ``a``.

    Source: Absil, Mahony and Sepulchre (2008), Example 4.1.3, transposed; Fukaya, Nakatsukasa, Yanagisawa and Yamamoto
    (2014) for CholeskyQR2; Fukaya, Kannan, Nakatsukasa, Yamamoto and Yanagisawa (2020) for the shift.
    """
    if is_traced():
        return _by_reflections(a)
    return _near(a) if may_wait(a) else _without_waiting(a)


def _near(a: Tensor) -> Tensor:
    """A series where A is almost orthonormal, Cholesky passes for thin A, as long as they hold, LAPACK otherwise."""
    p, n = a.shape[-2:]
    gram = gram_matrix(a)
    # A truncated series has another second derivative than the factor, so it is not used where derivatives are taken.
    if a.numel() and not (torch.is_grad_enabled() and a.requires_grad):
        e = gram - torch.eye(p, dtype=a.dtype, device=a.device)
        size, rounding = float(torch.linalg.vector_norm(e, dim=(-2, -1)).max()), torch.finfo(a.dtype).eps / 8
        if size <= rounding ** (1 / 3):  # not size³ ≤ …, which may overflow
            return add_product(a, _series(e, size <= rounding**0.5), a)
    if 2 * p > n:  # LAPACK is quicker
        return _by_reflections(a)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed.any():
        return _by_reflections(a)
    inverse = _inverse(factor)
    # ‖L‖_F² ‖L⁻¹‖_F², which is p² for orthonormal rows and bounds κ² from above.
    squares = factor.detach().abs().square().sum((-2, -1)) * inverse.detach().abs().square().sum((-2, -1))
    spread = float(squares.max()) / p**2 if squares.numel() else 1.0
    if not spread <= MOST:
        return _by_reflections(a)
    q = inverse @ a
    # A single singular value of 1/κ beside p − 1 of 1 gives a spread of only about 1 + (κ² − 1)/p.
    return q if spread <= 1 + (WELL_CONDITIONED - 1) / p else _pass(q)


def _series(e: Tensor, short: bool) -> Tensor:
    """``L⁻¹ − I`` for ``L Lᴴ = I + E`` with small E, to the second order, or to the first.

    ``L = I + F − Φ(FFᴴ) + O(E³)`` with F = Φ(E), the lower triangle and half of the diagonal, of which the inverse is
    ``I − F + F² + Φ(FFᴴ)``; E = F + Fᴴ makes the last two the lower triangle of FE, less half of FFᴴ's diagonal. After
    a step of size t along the manifold E is of size t², so that most steps need the first order alone.
    """
    first = _half(e)
    if short:
        return first.neg_()
    second = (first @ e).tril_()
    second.diagonal(dim1=-2, dim2=-1).sub_(torch.linalg.vector_norm(first, dim=-1).square(), alpha=0.5)
    return second.sub_(first)


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
    """Cholesky passes, in double if it is fast, all but the last with a shift; rows that the first lacks are filled in.

    With ``L Lᴴ = AAᴴ + sI`` the rows of ``Q₁ = L⁻¹A`` are orthonormal where A's are independent, and lack
    ``I − Q₁Q₁ᴴ = s L⁻¹L⁻ᴴ``. To Q₁ is added δ times this matrix times F of :func:`fill_like`, δ small: that changes
    ``A = LQ`` by δ√s at most, less than rounding, and gives every row a direction. Each further pass with a shift s
    makes short directions 1/√s, or 1e5, times as long, until they are orthonormal.
    """
    wide = widened(a)
    lengths = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    wide = wide / torch.where(lengths > 0, lengths, 1)  # Q does not depend on the lengths of rows
    inverse, shift = _shifted(wide)
    lacking = shift * (inverse @ inverse.mH)
    fill, passes = PASSES[torch.finfo(a.dtype).bits, torch.finfo(wide.dtype).bits]
    q = inverse @ wide + fill * torch.finfo(a.dtype).eps * (lacking @ fill_like(wide))
    for _ in range(passes):
        q = _shifted(q)[0] @ q
    return _pass(q).to(a.dtype)


def _shifted(a: Tensor) -> tuple[Tensor, Tensor]:
    """L⁻¹ and s, of the Cholesky factorization ``L Lᴴ = AAᴴ + sI`` that rounding cannot break."""
    gram = a @ a.mH
    # (p + n) ε tr(AAᴴ) is above the rounding errors of the product and of the factorization.
    size = gram.diagonal(dim1=-2, dim2=-1).real.sum(-1)[..., None, None]
    shift = sum(a.shape[-2:]) * torch.finfo(a.dtype).eps * torch.where(size > 0, size, 1)
    eye = torch.eye(a.shape[-2], dtype=a.dtype, device=a.device)
    return _inverse(torch.linalg.cholesky_ex(gram + shift * eye)[0]), shift


def _by_reflections(a: Tensor) -> Tensor:
    # Aᴴ = QR, so that A = RᴴQᴴ with L = Rᴴ.
    q, r = torch.linalg.qr(a.mH, mode="reduced")
    if a.is_complex() and readable(q) and not q.isfinite().all():  # LAPACK may give NaN for dependent rows
        sizes = a.detach().abs().amax(-1, keepdim=True)
        rounding = 2 * a.shape[-1] ** 0.5 * torch.finfo(a.dtype).eps * sizes * fill_like(a)
        q, r = torch.linalg.qr((a + rounding).mH, mode="reduced")
    # R's diagonal is real in LAPACK, of complex matrices too; MKL with several threads leaves its last entry complex.
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    size = diagonal.abs()
    zero = size < torch.finfo(size.dtype).tiny  # counts as positive: the factor must not vanish
    phase = torch.where(zero, 1.0, diagonal * torch.where(zero, 1.0, size).reciprocal())
    return (q * phase.unsqueeze(-2)).mH
