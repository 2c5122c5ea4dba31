"""The nearest orthonormal matrix, without a gradient: by singular values, or by products alone. Imports ``linalg``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stiefel.linalg.devices import may_wait
from stiefel.linalg.fill import fill_like
from stiefel.linalg.inverse_root import ITERATIONS, SMALLEST_ROOT, inverse_root_of_gram, iterated_inverse_root
from stiefel.linalg.precision import in_double, widened
from stiefel.linalg.products import balance, gram_residual, newton_schulz
from stiefel.linalg.single import nearest_in_single
from stiefel.linalg.tracing import is_traced, readable

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

SERIES = (-1 / 2, 3 / 8, -5 / 16, 35 / 128, -63 / 256)
"""Coefficients of ``(1 + e)^{-1/2} − 1``."""
NEAR = 0.25
"""Largest ‖VVᴴ − I‖_F at which a pass of four terms is worthwhile in double: it leaves at most 2e-4."""
ILL_CONDITIONED = 1e-8
"""Smallest ratio of VVᴴ's extreme eigenvalues at which double leaves the eight digits of float32."""
LARGEST = 16.0
"""Bound of ‖X₂X₂ᴴ‖₂ in :func:`_by_iteration`: ‖X₁‖₂ ≤ 1, ‖I − X₁X₁ᴴ‖₂ ≤ 1 and ‖F‖₂ ≤ 3."""


@torch.no_grad()
def nearest_orthonormal(v: Float[Tensor, "*batch p n"]) -> Float[Tensor, "*batch p n"]:
    """Nearest matrix with orthonormal rows in the Frobenius norm: ``U Vᴴ`` of the SVD ``V = U S Vᴴ``.

    Args:
        v: any finite matrix with p ≤ n, also rank-deficient (then the nearest point is not unique, and the one
            returned completes the row space orthonormally).

    Returns:
        X with X Xᴴ = I to rounding, in the dtype of ``v``; computed in double precision.

    Source: Fan and Hoffman (1955); Higham, Functions of Matrices (2008), Theorem 8.4.
    """
    wide = in_double(v)
    in_single = wide.dtype != v.dtype and readable(v) and v.numel() > 0
    x = _by_eigenvectors(wide) if in_single else _by_singular_vectors(wide)
    return newton_schulz(x).to(v)  # LAPACK's long null vectors are orthonormal to 1e-13 only


@torch.no_grad()
def nearest_in_step(v: Float[Tensor, "*batch p n"]) -> Float[Tensor, "*batch p n"]:
    """:func:`nearest_orthonormal` for methods that call it in each step: by products alone where these are accurate.

    Near the set they are accurate to rounding. Further away they serve float32, to 1e-6: on a CPU where V is not
    ill-conditioned, on a GPU always, so that the host need not wait. A rank-deficient V is completed in every case.
    """
    if v.numel() and readable(v):
        x = _by_products(v.reshape(-1, *v.shape[-2:]))
        return nearest_orthonormal(v) if x is None else x.reshape(v.shape)
    if may_wait(v) or is_traced():
        return nearest_orthonormal(v)
    if v.dtype in (torch.float32, torch.complex64):
        return _by_iteration(v)
    # LAPACK's kernels would raise an error of their own, before the one of divergence, which comes some steps later.
    finite = v.isfinite().flatten(-2).all(-1)[..., None, None]
    return torch.where(finite, nearest_orthonormal(torch.where(finite, v, 0)), torch.nan)


@torch.no_grad()
def nearest_where(
    lost: Bool[Tensor, "*batch"],
    x: Float[Tensor, "*batch p n"],
    otherwise: Float[Tensor, "*batch p n"],
    residual: Float[Tensor, "*batch"],
) -> Float[Tensor, "*batch p n"]:
    """The matrix nearest to X where it is ``lost``, and ``otherwise`` elsewhere.

    On a GPU, where testing ``lost.any()`` would make the host wait, a lost matrix takes one Newton-Schulz step towards
    the nearest one instead, and arrives after several steps of the method.

    Args:
        lost: which matrices to replace.
        x: p ≤ n, with finite entries.
        otherwise: the result for the others.
        residual: ``‖X Xᴴ − I‖_F``, which bounds ‖X‖₂².
    """
    mask = lost[..., None, None]
    if may_wait(x):
        return torch.where(mask, nearest_orthonormal(x), otherwise) if lost.any() else otherwise
    # ‖X‖₂² ≤ 1 + residual: divided by the root, singular values are in [0, 1], where the step raises them towards 1.
    return torch.where(mask, newton_schulz(x / (1 + residual[..., None, None]).sqrt()), otherwise)


def _by_singular_vectors(v: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(v, full_matrices=False)
    return u @ vh


def _by_eigenvectors(v: Tensor) -> Tensor:
    """``(VVᴴ)^{-1/2} V`` in double, right to 1e-8: half the time of the singular vectors, a fifth where p ≪ n.

    A Gram matrix squares the condition number; those matrices for which that is too much get their singular vectors.
    """
    values, vectors = torch.linalg.eigh(v @ v.mH)
    x = (vectors * values[..., None, :].rsqrt()) @ (vectors.mH @ v)
    lost = ~(values[..., 0] > ILL_CONDITIONED * values[..., -1])  # also where they are NaN
    if lost.any():
        x[lost] = _by_singular_vectors(v[lost])
    return x


def _by_products(v: Tensor) -> Tensor | None:
    """``V + ((I + E)^{-1/2} − I) V``, E = VVᴴ − I, by one, two or four terms where these suffice; None far away.

    After a step of size t along the manifold E is of size t², so that most steps need the first term alone: two
    products. Where four are too few, float32 uses :func:`inverse_root_of_gram`, and float64 a second pass.
    """
    eps = torch.finfo(v.dtype).eps
    e = gram_residual(v)
    size = float(torch.linalg.vector_norm(e, dim=(-2, -1)).max())
    for terms in (1, 2, 4):
        # The first term left out, |c| sizeᵏ⁺¹, is to be below ε/8; solved for the size, since its power may overflow.
        if size <= (eps / 8 / abs(SERIES[terms])) ** (1 / (terms + 1)):
            return torch.baddbmm(v, _series(e, terms), v)
    if v.dtype in (torch.float32, torch.complex64):
        root = inverse_root_of_gram(v)
        return None if root is None else torch.bmm(root[0], v)
    return _by_products(torch.baddbmm(v, _series(e, 4), v)) if size <= NEAR else None


def _series(e: Tensor, terms: int) -> Tensor:
    """So many terms of ``(I + E)^{-1/2} − I``; E is overwritten."""
    if terms == 1:
        return e.mul_(SERIES[0])
    square = torch.bmm(e, e)
    if terms == 2:
        return e.mul_(SERIES[0]).add_(square, alpha=SERIES[1])
    # c₁E + c₂E² + E²(c₃E + c₄E²): two products for four terms
    higher = torch.add(SERIES[2] * e, square, alpha=SERIES[3])
    return e.mul_(SERIES[0]).add_(square, alpha=SERIES[1]).baddbmm_(square, higher)


def _by_iteration(v: Tensor) -> Tensor:
    """In double, by a fixed number of products, right in float32: nothing is read back from the device.

        X₁ = Z V,   X₂ = X₁ + (I − X₁X₁ᴴ) F,   X = (X₂X₂ᴴ)^{-1/2} X₂

    with Z = (VVᴴ)^{-1/2} for singular values above 1e-5 ‖V‖_F. Where V has no others, I − X₁X₁ᴴ is rounding, and the
    second iteration removes the error of V's Gram matrix. Smaller or missing ones are filled from F =
    :func:`fill_like`: singular values of X₂ are above 1e-6 whatever V lacked, and two more steps suffice for those.

    Source: :func:`inverse_root_by_iteration`.
    """
    wide = widened(v)
    if wide.dtype == v.dtype:
        return nearest_in_single(v.reshape(-1, *v.shape[-2:])).reshape(v.shape)
    wide = wide / (balance(wide) * v.shape[-2] ** 0.5)  # ‖V‖_F = 1, so that eigenvalues of VVᴴ are at most 1
    x = iterated_inverse_root(wide @ wide.mH, 1.01, ITERATIONS, SMALLEST_ROOT) @ wide
    x = x - gram_residual(x) @ fill_like(x)  # X₂ = X₁ + (I − X₁X₁ᴴ) F
    return (iterated_inverse_root(x @ x.mH, LARGEST, ITERATIONS + 2, SMALLEST_ROOT / 16) @ x).to(v.dtype)
