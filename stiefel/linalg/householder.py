"""Products of Householder reflections, n×p and never n×n. Imports only torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


def householder_rows(v: Float[Tensor, "*batch p n"]) -> Float[Tensor, "*batch p n"]:
    """First p rows of ``H_p ⋯ H_1`` with ``H_i = I − 2 v_i v_iᵀ/‖v_i‖²``, v_i the i-th row of V.

    In the compact WY form, with ``T = striu(VVᵀ) + ½ diag(VVᵀ)`` (upper triangular, p×p) and E the first p columns,

        X = [I, 0] − Eᵀ T⁻ᵀ V,   E = V[:, :p]

    Args:
        v: p ≤ n, real, no row zero. O(n p²) work and O(n p) memory.

    Source: Schreiber and Van Loan (1989); Joffrain, Low, Quintana-Ortí, van de Geijn and Van Zee (2006) for T⁻¹.
    """
    p, n = v.shape[-2:]
    gram = v @ v.mT
    # T⁻¹ is never formed: one p×p triangular solve replaces p successive reflections.
    t = gram.triu(1) + torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1) / 2)
    e = v[..., :p]
    eye = torch.eye(p, n, dtype=v.dtype, device=v.device)
    return eye - e.mT @ torch.linalg.solve_triangular(t.mT, v, upper=False)


def householder_vectors(
    x: Float[Tensor, "*batch p n"],
) -> tuple[Float[Tensor, "*batch p n"], Float[Tensor, "*batch p"]]:
    """Rows v_i = (0 … 0, 1, *) and signs d with ``diag(d) · householder_rows(V) = X``, for orthonormal X.

    The inverse of :func:`householder_rows` up to the signs of rows, by LAPACK's QR decomposition.
    """
    p, n = x.shape[-2:]
    # Xᵀ = QR with Qᵀ = householder_rows(V); for orthonormal X, R is diagonal with entries ±1: the signs.
    packed, tau = torch.geqrf(x.mT)
    signs = torch.sgn(packed.diagonal(dim1=-2, dim2=-1))
    # geqrf stores v_i below R's diagonal, without its leading 1.
    vectors = packed.mT.triu(1) + torch.eye(p, n, dtype=x.dtype, device=x.device)
    # LAPACK's tau = 0 stands for no reflection; householder_rows reflects along e_i, which changes the row's sign.
    return vectors, torch.where(tau == 0, -signs, signs)
