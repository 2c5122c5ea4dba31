"""ONI and Björck where the number of steps is left to them: the polar factor and its derivatives, at any condition."""

from __future__ import annotations

import math

import pytest
import torch
from common import gaussian
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import stiefel
from stiefel.constraint import Reparameterization
from stiefel.layout import Layout
from stiefel.linalg import gram_residual, polar

DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]
SHAPES = [(1, 4), (5, 5), (20, 40), (40, 900), (190, 190)]
METHODS = {
    "oni": stiefel.get("oni", center=False),
    "frobenius": stiefel.get("oni", center=False, bound="frobenius"),
    "bjorck": stiefel.get("bjorck"),
    "second order": stiefel.get("bjorck", order=2),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def limit(method: Reparameterization, v: Tensor) -> Tensor:
    return method.forward(v, Layout(tuple(v.shape[-2:])))


def with_singular_values(p: int, n: int, s: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float64)
    u, _, vh = torch.linalg.svd(gaussian(2, p, n, dtype=wide, seed=1), full_matrices=False)
    return ((u * s) @ vh).to(dtype)


def spread(p: int, n: int, condition: float, dtype: torch.dtype) -> Tensor:
    return with_singular_values(p, n, torch.logspace(0, -math.log10(condition), p, dtype=torch.float64), dtype)


def distance(x: Tensor, y: Tensor) -> float:
    return (torch.linalg.matrix_norm(x.to(y.dtype) - y) / torch.linalg.matrix_norm(y)).max().item()


@pytest.mark.sampled(4)
@every_method
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("p", "n", "condition"),
    [
        pytest.param(p, n, c, marks=[pytest.mark.slow] if p > 20 and c in (1, 10, 1e2) else [])
        for p, n in SHAPES
        for c in (1, 1.5, 10, 1e2, 1e4, 1e5)
    ],
)
def test_it_is_the_polar_factor_with_its_gradient(method, p, n, condition, dtype):
    """What rounding a V of that condition number moves them by, is the most that can be asked for."""
    wide, eps = torch.promote_types(dtype, torch.float64), torch.finfo(dtype).eps
    v, g = spread(p, n, condition, dtype), gaussian(2, p, n, dtype=dtype, seed=2)
    leaf, reference = v.clone().requires_grad_(), v.to(wide).clone().requires_grad_()
    x, exact = limit(method, leaf), polar(reference)
    x.backward(g)
    exact.backward(g.to(wide))
    assert torch.linalg.matrix_norm(gram_residual(x.detach().to(wide))).max() <= 16 * eps * p**0.5
    assert distance(x.detach(), exact.detach()) <= 16 * eps * condition
    assert distance(leaf.grad, reference.grad) <= 64 * eps * condition


@pytest.mark.sampled(4)
@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize(
    "values",
    [[1.0, 1.0, 1.0], [0.7, 0.7, 0.2], [1.0, 0.5, 1e-2], [1.0, 1.0, 1e-3]],
    ids=["orthonormal", "repeated", "ill-conditioned", "ill-conditioned and repeated"],
)
@pytest.mark.parametrize("n", [3, 8])
def test_derivatives(method, n, values, dtype):
    v = with_singular_values(3, n, torch.tensor(values, dtype=torch.float64), dtype)[:1].requires_grad_()
    fast = dtype.is_complex or values[-1] < 0.1
    scale = min(values)  # derivatives grow with the condition number, and differences lose as much
    f = lambda v: scale * limit(method, v)  # noqa: E731
    assert gradcheck(f, (v,), eps=1e-6 * scale, atol=1e-5, fast_mode=fast)
    if min(values) > 0.1:
        assert gradgradcheck(f, (v,), fast_mode=fast)


@every_method
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("p", "n"), SHAPES[1:])
def test_what_lacks_a_rank_is_completed_and_its_gradient_is_finite(method, p, n, dtype):
    v = with_singular_values(p, n, torch.tensor([0.0] + (p - 1) * [0.5], dtype=torch.float64), dtype)
    v[0, 0] = v[0, -1]  # exactly
    v.requires_grad_()
    x = limit(method, v)
    x.sum().abs().backward()
    wide = torch.promote_types(dtype, torch.float64)
    assert torch.linalg.matrix_norm(gram_residual(x.detach().to(wide))).max() <= 16 * torch.finfo(dtype).eps * p**0.5
    assert v.grad.abs().max() < 1e12


@every_method
def test_an_ill_conditioned_matrix_does_not_spoil_its_neighbours(method):
    good, bad = spread(40, 900, 3, torch.float32), spread(40, 900, 1e7, torch.float32)
    x = limit(method, torch.cat([good, bad]))
    assert distance(x[:2], polar(good.double())) <= 1e-6
    assert torch.linalg.matrix_norm(gram_residual(x.double())).max() <= 1e-5


@every_method
def test_functional_transforms(method):
    v = spread(3, 7, 5, torch.float64)
    found = torch.func.vmap(lambda v: limit(method, v[None])[0])(v)
    assert torch.allclose(found, polar(v), rtol=0, atol=1e-13)


@every_method
def test_forward_derivatives(method):
    v, t = spread(3, 7, 5, torch.float64), gaussian(2, 3, 7, dtype=torch.float64, seed=3)
    reference = torch.autograd.functional.jvp(polar, v, t)[1]
    found = torch.func.jvp(lambda v: limit(method, v), (v,), (t,))[1]
    assert torch.allclose(found, reference, rtol=0, atol=1e-12)
    with torch.autograd.forward_ad.dual_level():
        dual = limit(method, torch.autograd.forward_ad.make_dual(v, t))
        assert torch.allclose(torch.autograd.forward_ad.unpack_dual(dual).tangent, reference, rtol=0, atol=1e-12)
