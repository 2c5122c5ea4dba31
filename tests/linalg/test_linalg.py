"""Linear algebra against scipy, dense formulas and finite differences, where singular values repeat or vanish too."""

import numpy as np
import pytest
import scipy.linalg
import torch
from common import gaussian
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

from stiefel.linalg import (
    balance,
    cayley_along,
    cayley_step,
    frobenius,
    full_precision,
    gram_residual,
    lyapunov,
    nearest_orthonormal,
    newton_schulz,
    polar,
    qf,
    skew,
    spectral_radius,
    sym,
)

SHAPES = [(1, 1), (1, 5), (3, 8), (4, 4), (5, 6)]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def orthonormal(*shape, seed=0):
    q, _ = torch.linalg.qr(gaussian(*shape, seed=seed).mT)
    return q.mT.contiguous()


def with_singular_values(p, n, s, seed=0):
    """A p×n matrix with given singular values and random singular vectors."""
    u = orthonormal(p, p, seed=seed + 1)
    return u @ (torch.as_tensor(s, dtype=torch.float64)[:, None] * orthonormal(p, n, seed=seed + 2))


def scipy_polar(v):
    return torch.from_numpy(scipy.linalg.polar(v.double().numpy(), side="left")[0])


def spectrum(kind, p):
    return {
        "random": torch.linspace(0.4, 2.1, p),
        "orthonormal": torch.ones(p),
        "repeated": torch.tensor([0.7, 0.7, 1.9, 1.9, 1.9])[:p],
        "nearly repeated": 0.7 + 1e-9 * torch.arange(p, dtype=torch.float64),
    }[kind]


SPECTRA = ["random", "orthonormal", "repeated", "nearly repeated"]


# --- polar: the map ---


@pytest.mark.parametrize("shape", SHAPES)
def test_polar_equals_scipy(shape):
    v = gaussian(*shape, seed=3)
    assert torch.allclose(polar(v), scipy_polar(v), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 6), (6, 20)])
@pytest.mark.parametrize("condition", [1, 1e2, 1e4, 1e5])
def test_polar_equals_scipy_when_ill_conditioned(shape, condition):
    p, n = shape
    v = with_singular_values(p, n, torch.logspace(0, -np.log10(condition), p, dtype=torch.float64))
    # The polar factor itself moves by ε·condition under rounding of V.
    assert torch.allclose(polar(v), scipy_polar(v), rtol=0, atol=1e-12 * max(1, condition / 1e3))
    assert torch.linalg.matrix_norm(gram_residual(polar(v))) < 1e-13


@pytest.mark.parametrize("shape", [(8, 8), (8, 24)])
@pytest.mark.parametrize("condition", [1, 1e1, 1e2, 1e3, 1e4])
def test_polar_in_float32_keeps_its_digits(shape, condition):
    p, n = shape
    v = with_singular_values(p, n, torch.logspace(0, -np.log10(condition), p, dtype=torch.float64)).float()
    x = polar(v)
    assert x.dtype == torch.float32
    assert torch.allclose(x.double(), scipy_polar(v), rtol=0, atol=1e-6)


def test_polar_of_a_batch_is_that_of_each_matrix():
    v = gaussian(2, 3, 4, 7)
    batch = polar(v)
    for i in range(2):
        for j in range(3):
            assert torch.allclose(batch[i, j], scipy_polar(v[i, j]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
def test_polar_is_scale_invariant_and_its_gradient_inversely_so(dtype, scale):
    v, g = gaussian(4, 9).to(dtype), gaussian(4, 9, seed=1).to(dtype)
    a, b = v.clone().requires_grad_(), (scale * v).requires_grad_()
    xa, xb = polar(a), polar(b)
    (ga,), (gb,) = torch.autograd.grad(xa, a, g), torch.autograd.grad(xb, b, g)
    tolerance = 50 * torch.finfo(dtype).eps
    assert torch.allclose(xa, xb, rtol=0, atol=tolerance)
    assert torch.allclose(ga, gb * scale, rtol=0, atol=tolerance * ga.abs().max().item())


def test_polar_under_autocast_stays_accurate():
    v = gaussian(16, 40).float().requires_grad_()
    g = gaussian(16, 40, seed=1).float()
    (reference,) = torch.autograd.grad(polar(v), v, g)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (v @ v.mT).dtype == torch.bfloat16  # otherwise this test shows nothing
        x = polar(v)
        (inside,) = torch.autograd.grad(x, v, g, create_graph=True)
    assert x.dtype == torch.float32
    assert torch.allclose(x.detach().double(), scipy_polar(v.detach()), rtol=0, atol=1e-6)
    assert torch.allclose(inside, reference, rtol=0, atol=1e-5)


def test_full_precision_restores_autocast():
    a = gaussian(4, 4).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with full_precision(a.device):
            assert (a @ a).dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16


# --- polar: the gradient ---


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("shape", [(1, 4), (3, 5), (4, 4), (1, 1)])
def test_polar_first_and_second_derivative(kind, shape):
    p, n = shape
    v = with_singular_values(p, n, spectrum(kind, p), seed=5).requires_grad_()
    assert gradcheck(polar, (v,))
    assert gradgradcheck(polar, (v,))


def test_polar_derivatives_of_a_batch_with_different_spectra():
    v = torch.stack([with_singular_values(3, 4, spectrum(kind, 3), seed=i) for i, kind in enumerate(SPECTRA)])
    v.requires_grad_()
    assert gradcheck(polar, (v,))
    assert gradgradcheck(polar, (v,))


@pytest.mark.parametrize("shape", [(3, 8), (5, 5), (1, 6), (2, 4, 7)])
def test_polar_gradient_at_an_orthonormal_matrix_is_the_tangent_projection(shape):
    v, g = orthonormal(*shape).requires_grad_(), gaussian(*shape, seed=9)
    (grad,) = torch.autograd.grad(polar(v), v, g)
    x = v.detach()
    assert torch.allclose(grad, g - sym(g @ x.mT) @ x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("condition", [1, 1e2, 1e4])
def test_polar_float32_gradient_against_float64(condition):
    v = with_singular_values(5, 11, torch.logspace(0, -np.log10(condition), 5, dtype=torch.float64)).float()
    g = gaussian(5, 11, seed=4).float()
    a, b = v.clone().requires_grad_(), v.double().requires_grad_()
    (low,), (high,) = torch.autograd.grad(polar(a), a, g), torch.autograd.grad(polar(b), b, g.double())
    assert torch.linalg.norm(low.double() - high) <= 1e-5 * torch.linalg.norm(high)


def test_polar_of_zero_is_zero_with_the_gradient_passed_through():
    v, g = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True), gaussian(3, 5)
    x = polar(v)
    (grad,) = torch.autograd.grad(x, v, g)
    assert torch.equal(x, torch.zeros_like(x))
    assert torch.allclose(grad, g, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(4, 7), (4, 4)])
@pytest.mark.parametrize("smallest", [0.0, 1e-12, 1e-8, 1e-6])
def test_polar_of_a_rank_deficient_matrix_is_completed(shape, dtype, smallest):
    p, n = shape
    singular_values = [2.0, 1.0, 0.5, smallest]
    v = with_singular_values(p, n, singular_values).to(dtype).requires_grad_()
    x = polar(v)
    (grad,) = torch.autograd.grad(x, v, gaussian(p, n, seed=2).to(dtype))
    assert torch.isfinite(grad).all()
    x = x.detach()
    assert torch.linalg.matrix_norm(gram_residual(x.double())) < 20 * torch.finfo(dtype).eps
    expected = sum((s - 1) ** 2 for s in singular_values) ** 0.5  # of a nearest orthonormal matrix
    assert torch.linalg.norm(x - v.detach()).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "singular_values", [[2.0, 1.0, 0.5, 0.0], [2.0, 1.0, 0.5, 1e-9], [0.0] * 4], ids=["zero", "tiny", "all zero"]
)
def test_polar_gradient_is_the_same_with_and_without_a_graph(singular_values):
    v = with_singular_values(4, 7, singular_values).requires_grad_()
    g = gaussian(4, 7, seed=2)
    (plain,) = torch.autograd.grad(polar(v), v, g)
    (graphed,) = torch.autograd.grad(polar(v), v, g, create_graph=True)
    assert torch.allclose(plain, graphed, rtol=1e-6, atol=1e-6 * plain.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_polar_under_functional_transforms(dtype):
    v, g = gaussian(6, 3, 5).to(dtype), gaussian(6, 3, 5, seed=1).to(dtype)
    reference = v.clone().requires_grad_()
    x = polar(reference)
    (grad,) = torch.autograd.grad(x, reference, g)
    mapped = torch.func.vmap(polar)(v)
    mapped_grad = torch.func.vmap(torch.func.grad(lambda a, b: (polar(a) * b).sum()))(v, g)
    tolerance = 100 * torch.finfo(dtype).eps
    assert torch.allclose(mapped, x, rtol=0, atol=tolerance)
    assert torch.allclose(mapped_grad, grad, rtol=0, atol=tolerance * grad.abs().max().item())


def test_polar_hessian_by_functional_transforms_is_that_of_finite_differences():
    v, g, d = gaussian(2, 3), gaussian(2, 3, seed=1), gaussian(2, 3, seed=2)

    def gradient(a):
        return torch.func.grad(lambda b: (polar(b) * g).sum())(a)

    product = torch.func.vjp(gradient, v)[1](d)[0]  # the Hessian is symmetric: vjp and jvp agree
    step = 1e-5
    difference = (gradient(v + step * d) - gradient(v - step * d)) / (2 * step)
    assert torch.allclose(product, difference, rtol=0, atol=1e-7)


# --- lyapunov ---


def positive_definite(p, seed=0):
    a = gaussian(p, p, seed=seed)
    return a @ a.mT + 0.5 * torch.eye(p, dtype=torch.float64)


def solve(h, c):
    s, d = torch.linalg.eigh(h.detach())
    return lyapunov(h, c, d, s)


@pytest.mark.parametrize("p", [1, 2, 6])
def test_lyapunov_equals_scipy(p):
    h, c = positive_definite(p), gaussian(p, p, seed=1)
    expected = scipy.linalg.solve_continuous_lyapunov(h.numpy(), c.numpy())
    assert np.allclose(solve(h, c).numpy(), expected, rtol=0, atol=1e-11)
    assert np.allclose(solve(h, c).numpy(), scipy.linalg.solve_sylvester(h.numpy(), h.numpy(), c.numpy()), atol=1e-11)


@pytest.mark.parametrize("repeated", [False, True])
def test_lyapunov_derivatives(repeated):
    h = 1.3 * torch.eye(3, dtype=torch.float64) if repeated else positive_definite(3)
    h, c = h.requires_grad_(), gaussian(3, 3, seed=1).requires_grad_()
    assert gradcheck(lambda a, b: solve(sym(a), b), (h, c))
    assert gradgradcheck(lambda a, b: solve(sym(a), b), (h, c))


def test_lyapunov_of_a_batch():
    h = torch.stack([positive_definite(4, seed=i) for i in range(3)])
    c = gaussian(3, 4, 4, seed=7)
    omega = solve(h, c)
    assert torch.allclose(h @ omega + omega @ h, c, rtol=0, atol=1e-11)


# --- qf ---


@pytest.mark.parametrize("shape", SHAPES)
def test_qf_equals_scipy_with_signs_fixed(shape):
    a = gaussian(*shape, seed=2)
    q, r = scipy.linalg.qr(a.T.numpy(), mode="economic")
    expected = (q * np.sign(np.diag(r))).T
    assert np.allclose(qf(a).numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 8), (4, 4), (2, 3, 5)])
def test_qf_factor_is_lower_triangular_with_positive_diagonal(shape):
    a = gaussian(*shape, seed=2)
    q = qf(a)
    lower = a @ q.mT
    assert torch.allclose(lower @ q, a, rtol=0, atol=1e-12)
    assert torch.allclose(lower.triu(1), torch.zeros_like(lower), rtol=0, atol=1e-12)
    assert (lower.diagonal(dim1=-2, dim2=-1) > 0).all()
    assert torch.linalg.matrix_norm(gram_residual(q)).max() < 1e-13


@pytest.mark.parametrize("shape", SHAPES)
def test_qf_leaves_an_orthonormal_matrix(shape):
    x = orthonormal(*shape, seed=4)
    assert torch.allclose(qf(x), x, rtol=0, atol=1e-13)
    assert torch.allclose(qf(-x), -x, rtol=0, atol=1e-13)


# --- Cayley ---


def dense_cayley(x, b):
    x, b = x.double(), b.double()
    a = x.mT @ b - b.mT @ x
    eye = torch.eye(x.shape[-1], dtype=torch.float64)
    return x @ (eye + a / 2) @ torch.linalg.inv(eye - a / 2)


@pytest.mark.parametrize("shape", [(3, 10), (3, 7), (3, 6), (3, 5), (4, 4), (1, 1), (1, 2), (1, 5), (2, 3, 9)])
def test_cayley_equals_the_dense_formula(shape):
    x, b = orthonormal(*shape), gaussian(*shape, seed=1)
    y = cayley_step(x, b)
    assert torch.allclose(y, dense_cayley(x, b), rtol=0, atol=1e-12)
    assert torch.linalg.matrix_norm(gram_residual(y)).max() < 1e-13


@pytest.mark.parametrize("shape", [(3, 10), (3, 4)])
def test_cayley_with_nothing_to_do(shape):
    x = orthonormal(*shape)
    assert torch.equal(cayley_step(x, torch.zeros_like(x)), x)


@pytest.mark.parametrize("shape", [(4, 20), (4, 8), (4, 6)])
@pytest.mark.parametrize("size", [1e-8, 1e-4, 1e-2, 1.0, 1e2, 1e4])
def test_cayley_in_float32(shape, size):
    x, b = orthonormal(*shape).float(), (size * gaussian(*shape, seed=1)).float()
    y = cayley_step(x, b)
    # Rounding of A is relative to ‖A‖, and directions that A leaves alone see it in full.
    tolerance = 2e-6 * (1 + size)
    assert (y.double() - dense_cayley(x, b)).abs().max() <= tolerance


@pytest.mark.parametrize("size", [1.0, 1e2, 1e4, 1e6])
def test_low_rank_cayley_in_float32_does_not_depend_on_the_size(size):
    """Without balancing B against X the 2p×2p system loses a digit or more: 2e-6 and above here."""
    x = torch.stack([orthonormal(4, 20, seed=100 + i) for i in range(20)]).float()
    b = torch.stack([size * gaussian(4, 20, seed=i) for i in range(20)]).float()
    assert (cayley_step(x, b).double() - dense_cayley(x, b)).abs().max() <= 1e-6


def test_cayley_of_a_batch_with_mixed_magnitudes():
    x = orthonormal(6, 3, 12).float()
    sizes = torch.tensor([0.0, 1e-12, 1e-6, 1e-2, 1.0, 1e3])[:, None, None]
    b = gaussian(6, 3, 12, seed=1).float() * sizes
    y = cayley_step(x, b)
    for i in range(6):  # a neighbour in the batch must not cost accuracy
        assert torch.allclose(y[i], cayley_step(x[i], b[i]), rtol=0, atol=2e-6 * (1 + sizes[i].item()))
        assert (y[i].double() - dense_cayley(x[i], b[i])).abs().max() <= 2e-6 * (1 + sizes[i].item())
    moved = (y[2] - x[2]).double()
    # No cancellation: even a tiny displacement is the right one, up to the rounding of X + Δ.
    assert torch.allclose(moved, dense_cayley(x[2], b[2]) - x[2].double(), rtol=0, atol=1e-7)


# --- products and the nearest point ---


def test_symmetric_and_skew_parts():
    a = gaussian(2, 4, 4)
    assert torch.allclose(sym(a) + skew(a), a, rtol=0, atol=1e-15)
    assert torch.equal(sym(a), sym(a).mT)
    assert torch.equal(skew(a), -skew(a).mT)


def test_gram_residual_by_hand():
    x = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    assert torch.equal(gram_residual(x), torch.tensor([[4.0, 6.0], [6.0, 8.0]]))


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4])
def test_newton_schulz_squares_the_residual(size):
    p, n = 5, 9
    deviation = torch.linspace(-1, 1, p, dtype=torch.float64)
    x = with_singular_values(p, n, torch.sqrt(1 + size * deviation))
    before = torch.linalg.matrix_norm(gram_residual(x), ord=2)
    after = torch.linalg.matrix_norm(gram_residual(newton_schulz(x)), ord=2)
    assert before == pytest.approx(size, rel=1e-6)
    assert after == pytest.approx(0.75 * size**2, rel=2 * size)
    assert torch.allclose(polar(newton_schulz(x)), polar(x), rtol=0, atol=1e-13)  # same polar factor


@pytest.mark.parametrize("shape", SHAPES)
def test_nearest_orthonormal_equals_scipy(shape):
    v = gaussian(*shape, seed=6)
    assert torch.allclose(nearest_orthonormal(v), scipy_polar(v), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 4), (64, 64), (64, 576), (256, 2304)])
def test_nearest_orthonormal_in_float32_equals_scipy_at_any_condition(shape):
    """Also in a batch of several, of which one at most is too ill-conditioned for its Gram matrix."""
    p, n = shape
    conditions = [1e3] if p == 256 else [1, 3e3, 1e5, 1e7]
    v = torch.stack([
        with_singular_values(p, n, torch.logspace(0, -np.log10(c), p, dtype=torch.float64), seed=k)
        for k, c in enumerate(conditions)
    ]).float()  # fmt: skip
    x = nearest_orthonormal(v)
    for a, b in zip(x, v, strict=True):
        torch.testing.assert_close(a, scipy_polar(b).float(), rtol=0, atol=6e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("singular_values", [[2.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0] * 4])
def test_nearest_orthonormal_of_a_rank_deficient_matrix(singular_values, dtype):
    v = with_singular_values(4, 6, singular_values).to(dtype)
    x = nearest_orthonormal(v)
    assert x.dtype == dtype
    assert torch.linalg.matrix_norm(gram_residual(x)) < 20 * torch.finfo(dtype).eps
    # The distance of a nearest point is known: Σ (σ_i − 1)².
    expected = sum((s - 1) ** 2 for s in singular_values) ** 0.5
    assert torch.linalg.norm(x - v).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float64, 1e-300), (torch.float64, 1.0), (torch.float64, 1e300),
        (torch.float32, 1e-38), (torch.float32, 1e37), (torch.complex128, 1e300), (torch.complex64, 1e-37),
        (torch.complex128, 1e-308),
    ],
)  # fmt: skip
def test_the_frobenius_norm_neither_overflows_nor_vanishes(dtype, size):
    unit = torch.randn(2, 3, 5, dtype=dtype, generator=generator(0))
    expected = unit.abs().double().square().sum((-2, -1)).sqrt()
    found = frobenius(unit * size)
    assert found.shape == (2, 1, 1)
    assert torch.allclose(found[:, 0, 0].double() / size, expected, rtol=1e-5)
    assert torch.equal(frobenius(torch.zeros(1, 2, 3, dtype=dtype)), torch.zeros(1, 1, 1, dtype=dtype.to_real()))
    assert torch.equal(balance(torch.zeros(1, 2, 3, dtype=dtype)), torch.ones(1, 1, 1, dtype=dtype.to_real()))


def test_shapes_alone_can_be_had():
    with FakeTensorMode():
        assert frobenius(torch.randn(2, 3, 5)).shape == (2, 1, 1)
        assert cayley_along(torch.randn(2, 3, 9), torch.randn(2, 3, 9)).shape == (2, 3, 9)
    assert frobenius(torch.randn(2, 3, 5, device="meta")).shape == (2, 1, 1)
    assert cayley_along(*torch.randn(2, 2, 3, 5, device="meta")).shape == (2, 3, 5)


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(64, 576), (256, 256), (512, 4608)], ids=str)
def test_the_nearest_point_of_a_matrix_of_low_rank_is_on_the_set_to_rounding(shape, value):
    x = nearest_orthonormal(torch.full((1, *shape), value, dtype=torch.float64))
    # Not X Xᵀ − I itself, whose sums of thousands of nearly equal squares lose more than that on some processors.
    residual = torch.linalg.matrix_norm(gram_residual(x)).item()
    assert residual / shape[0] ** 0.5 < 64 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("m", [4, 16, 40])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_spectral_radius_of_blocks_is_that_of_the_largest(m, sign):
    """Where another block has the longest column, and none of its powers leaves it."""
    h = torch.zeros(m + 1, m + 1, dtype=torch.float64)
    h[:m, :m] = 1 + 0.1 * torch.eye(m, dtype=torch.float64)  # columns of length √m, of which the norm is m
    h[m, m] = sign * 1.05 * m**0.5
    assert spectral_radius(h) == pytest.approx(m + 0.1, rel=1e-6)
    assert spectral_radius(torch.diag(torch.tensor([1.0, sign * 3.0, 2.0]))) == pytest.approx(3, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("p", [2, 8, 24, 32])
def test_qf_of_equal_complex_rows_is_orthonormal(p, dtype):
    """What is left of a row may be a number too small to be divided by its size."""
    q = qf(torch.ones(2, p, p, dtype=dtype))
    assert torch.linalg.matrix_norm(gram_residual(q)).max() < 64 * torch.finfo(dtype).eps * p**0.5
