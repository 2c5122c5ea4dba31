"""The Q factor of a row-wise QR decomposition with a fixed sign convention. Imports only torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


def qf(a: Float[Tensor, "*batch p n"]) -> Float[Tensor, "*batch p n"]:
    """Orthonormal rows spanning the rows of ``A``: ``A = L Q`` with L lower triangular, diagonal positive; returns Q.

    The sign makes the factor unique and continuous, so that qf(X) = X for orthonormal X; LAPACK's own sign does not.

    Args:
        a: matrix of full row rank, p ≤ n, real or complex (L's diagonal is positive, Q is unitary).

    Returns:
        Q with Q Qᴴ = I, the dtype of ``a``.

    Source: Absil, Mahony and Sepulchre (2008), Example 4.1.3, transposed.
    """
    q, r = torch.linalg.qr(a.mH, mode="reduced")
    phase = torch.sgn(r.diagonal(dim1=-2, dim2=-1))
    phase = torch.where(phase == 0, 1.0, phase)  # zero counts as positive: the factor must not vanish
    return (q * phase.unsqueeze(-2)).mH
