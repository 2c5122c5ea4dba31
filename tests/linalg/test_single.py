"""Polar factors in float32 alone, against the SVD in double."""

from __future__ import annotations

import pytest
import torch
from common import gaussian
from torch import Tensor

from stiefel.linalg import gram_residual
from stiefel.linalg.single import nearest_in_single, polar_in_single

SHAPES = [(1, 1), (1, 9), (5, 5), (64, 64), (16, 144), (64, 576), (60, 90)]
DECADES = [0, 1, 2, 3, 4]


def of_condition(p: int, n: int, decades: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(dtype, torch.float64)
    u, _, wh = torch.linalg.svd(gaussian(3, p, n, dtype=wide, seed=1), full_matrices=False)
    s = torch.logspace(0, -decades, p, dtype=torch.float64)
    v = ((u * s) @ wh).to(dtype)
    return v, *torch.linalg.svd(v.to(wide), full_matrices=False)


def relative(a: Tensor, b: Tensor) -> float:
    return float((torch.linalg.matrix_norm(a.to(b.dtype) - b) / torch.linalg.matrix_norm(b)).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("decades", [*DECADES, 5])
@pytest.mark.parametrize(("p", "n"), SHAPES)
def test_float32_alone_is_orthonormal_to_rounding(p, n, decades, dtype):
    if decades == 5 and p == 1:
        decades = 0
    v, u, s, wh = of_condition(p, n, decades, dtype)
    x, h, z = polar_in_single(v)
    wide = u.dtype
    for found in (x, nearest_in_single(v)):
        assert torch.linalg.matrix_norm(gram_residual(found.to(wide))).max() / p**0.5 <= 4e-7
        # Of rounding V itself moves its polar factor by ε times the condition number.
        assert relative(found, u @ wh) <= 1e-5 + 2e-7 * 10**decades
    assert relative(h, (u * s.unsqueeze(-2)) @ u.mH) <= 1e-5
    if decades <= 3:
        assert relative(z, (u / s.unsqueeze(-2)) @ u.mH) <= 5e-5 + 1e-6 * 10**decades


@pytest.mark.parametrize("kind", ["zero", "zero row", "equal rows"])
@pytest.mark.parametrize(("p", "n"), [(5, 5), (8, 24), (64, 576)])
def test_float32_alone_fills_what_is_missing(p, n, kind):
    v = gaussian(2, p, n, dtype=torch.float32)
    if kind == "zero":
        v.zero_()
    else:
        v[:, 1] = 0 if kind == "zero row" else v[:, 0]
    x = nearest_in_single(v).double()
    assert torch.linalg.matrix_norm(gram_residual(x)).max() / p**0.5 <= 1e-6
    if kind == "equal rows":
        u, s, wh = torch.linalg.svd(v.double(), full_matrices=False)
        kept = s > 1e-6 * s.amax(-1, keepdim=True)
        part = (u * kept.unsqueeze(-2)) @ wh
        assert relative(part @ x.mT @ part, part) <= 1e-3  # what V has is where its polar factor has it
