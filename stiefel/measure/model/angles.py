"""Angles between subspaces. Imports ``linalg``."""

from __future__ import annotations

import torch
from torch import Tensor

from stiefel.errors import LayoutError
from stiefel.linalg import in_double


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """The angles between the spans of two matrices, in radians, ascending; small ones keep their digits.

    The cosines are the singular values of Q_a Q_bᵀ. The cosine of an angle below 1e-8 is 1 in double precision: such an
    angle is taken from its sine, the singular values of Q_b − (Q_b Q_aᵀ) Q_a.

    Args:
        a: ``(…, p, n)``; its rows span a subspace where p ≤ n, its columns otherwise. Not necessarily orthonormal.
        b: ``(…, q, n)`` likewise, of the same ambient dimension.

    Returns:
        ``(…, min(p, q))`` in float64.

    Raises:
        LayoutError: the ambient dimensions differ, one is no matrix, or its vectors are linearly dependent.

    Source: Björck and Golub (1973); Knyazev and Argentati (2002), algorithm 3.1.
    """
    qa, qb = _basis(a), _basis(b)
    if qa.shape[-1] != qb.shape[-1]:
        raise LayoutError(
            f"the subspaces are of dimensions {qa.shape[-1]} and {qb.shape[-1]}: expected one ambient space; rows span "
            "where there are at most as many as columns, columns otherwise"
        )
    if qa.shape[-2] < qb.shape[-2]:
        qa, qb = qb, qa
    products = qb @ qa.mH
    cosines = torch.linalg.svdvals(products).clamp(max=1)
    sines = torch.linalg.svdvals(qb - products @ qa).clamp(max=1).flip(-1)
    return torch.where(cosines**2 < 0.5, cosines.arccos(), sines.arcsin())


def _basis(x: Tensor) -> Tensor:
    if x.ndim < 2:
        raise LayoutError(f"a subspace of shape {tuple(x.shape)}: expected (…, p, n); a vector is x[None]")
    rounding = torch.finfo(x.dtype).eps
    x = in_double(x.detach())
    rows = x if x.shape[-2] <= x.shape[-1] else x.mT
    left, s, right = torch.linalg.svd(rows, full_matrices=False)
    if bool((s[..., -1:] <= max(rows.shape[-2:]) * rounding * s[..., :1]).any()):
        raise LayoutError(
            f"a subspace is given by {rows.shape[-2]} vectors that are linearly dependent: expected independent ones"
        )
    return left @ right
