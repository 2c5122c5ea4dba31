"""Iterations towards an orthonormal matrix: a number of steps is that many, on X or on its Gram matrix."""

import math
import sys

import pytest
import torch
from common import gaussian
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from stiefel.linalg import gram_residual, iterated, polar, spectral_map

DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]
SHAPES = [(1, 4), (5, 5), (20, 40), (40, 900), (190, 190)]
"""On X itself and on its Gram matrix, and from (40, 900) on with a derivative of its own."""


def newton(gram: Tensor) -> Tensor:
    return 1.5 * torch.eye(gram.shape[-1], dtype=gram.dtype) - 0.5 * gram


def second_order(gram: Tensor) -> Tensor:
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype)
    q = eye - gram
    return eye + q / 2 + 3 / 8 * (q @ q)


STEPS = {"newton": newton, "second order": second_order}
every_step = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)


def with_singular_values(p: int, n: int, s: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float64)
    u, _, vh = torch.linalg.svd(gaussian(2, p, n, dtype=wide, seed=1), full_matrices=False)
    return ((u * s) @ vh).to(dtype)


def spread(p: int, n: int, condition: float, dtype: torch.dtype) -> Tensor:
    """Singular values from 1 down, evenly in the logarithm."""
    return with_singular_values(p, n, torch.logspace(0, -math.log10(condition), p, dtype=torch.float64), dtype)


def distance(x: Tensor, y: Tensor) -> float:
    return (torch.linalg.matrix_norm(x.to(y.dtype) - y) / torch.linalg.matrix_norm(y)).max().item()


@pytest.mark.sampled(8)
@every_step
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("p", "n"), SHAPES)
@pytest.mark.parametrize("condition", [1, 10, 1e3])
def test_many_steps_come_to_the_polar_factor_with_its_gradient(step, p, n, condition, dtype):
    """What rounding a V of that condition number moves them by, is the most that can be asked for."""
    wide, eps = torch.promote_types(dtype, torch.float64), torch.finfo(dtype).eps
    v, g = spread(p, n, condition, dtype), gaussian(2, p, n, dtype=dtype, seed=2)
    leaf, reference = v.clone().requires_grad_(), v.to(wide).clone().requires_grad_()
    x, exact = iterated(step, 24, leaf), polar(reference)
    x.backward(g)
    exact.backward(g.to(wide))
    assert torch.linalg.matrix_norm(gram_residual(x.detach().to(wide))).max() <= 16 * eps * p**0.5
    assert distance(x.detach(), exact.detach()) <= 16 * eps * condition
    assert distance(leaf.grad, reference.grad) <= 64 * eps * condition


@pytest.mark.sampled(8)
@every_step
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("values", [[1.0, 1.0, 1.0], [0.7, 0.7, 0.2], [1.0, 0.5, 1e-2]], ids=str)
@pytest.mark.parametrize(("count", "n"), [(1, 3), (4, 3), (4, 8)])
def test_derivatives(monkeypatch, step, count, n, values, small, dtype):
    if not small:
        monkeypatch.setattr(sys.modules[spectral_map.__module__], "SMALL", 0)
    v = with_singular_values(3, n, torch.tensor(values, dtype=torch.float64), dtype)[:1].requires_grad_()
    f = lambda v: iterated(step, count, v)  # noqa: E731
    assert gradcheck(f, (v,), fast_mode=dtype.is_complex)
    assert gradgradcheck(f, (v,), fast_mode=dtype.is_complex)


def test_forward_mode_and_functional_transforms():
    v, t = spread(3, 7, 5, torch.float64), gaussian(2, 3, 7, dtype=torch.float64, seed=3)

    def f(v: Tensor) -> Tensor:
        return iterated(newton, 30, v)

    reference = torch.autograd.functional.jvp(polar, v, t)[1]
    assert torch.allclose(torch.func.jvp(f, (v,), (t,))[1], reference, rtol=0, atol=1e-12)
    with torch.autograd.forward_ad.dual_level():
        dual = f(torch.autograd.forward_ad.make_dual(v, t))
        assert torch.allclose(torch.autograd.forward_ad.unpack_dual(dual).tangent, reference, rtol=0, atol=1e-12)
    assert torch.allclose(torch.func.vmap(f)(v), polar(v), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("p", "n"), SHAPES)
def test_a_number_of_steps_is_that_many(p, n):
    v = spread(p, n, 30, torch.float64)
    expected = v
    for count in range(1, 6):
        expected = newton(expected @ expected.mT) @ expected
        assert torch.allclose(iterated(newton, count, v), expected, rtol=0, atol=1e-13)
        assert torch.allclose(iterated(newton, count, v.float()).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("p", "n"), SHAPES)
def test_nan_is_handed_on(p, n):
    v = torch.full((1, p, n), math.nan)
    assert iterated(newton, 3, v).isnan().any()


def test_empty_batches():
    assert iterated(newton, 3, torch.zeros(0, 3, 5)).shape == (0, 3, 5)
