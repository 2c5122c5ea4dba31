"""The polar factor, the Lyapunov equation and QR by products: against decompositions in double, at any condition."""

import math

import pytest
import scipy.linalg
import torch
from common import PeakMemory
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stiefel.linalg import gram_residual, nearest_in_step, nearest_orthonormal, polar, qf, squared_residual, svd
from stiefel.linalg.inverse_root import SPREAD, inverse_root
from stiefel.linalg.lyapunov import lyapunov_by_doubling, lyapunov_by_products
from stiefel.linalg.polar import SOLVERS
from stiefel.linalg.qr import _by_reflections, _without_waiting

SHAPES = [(3, 1, 5), (2, 16, 144), (3, 64, 64), (2, 64, 576), (2, 128, 128)]
KINDS = ["even", "few_large", "few_small"]
DOUBLE = (torch.float64, torch.complex128)
LARGE = pytest.param(256, 256, marks=pytest.mark.slow)


def singular(kind: str, p: int, condition: float) -> Tensor:
    """Singular values from 1 to ``condition``: spread evenly in the logarithm, or all equal but for a few."""
    if kind == "even":
        return torch.logspace(0, math.log10(condition), p, dtype=torch.float64)
    s = torch.ones(p, dtype=torch.float64) * (condition if kind == "few_small" else 1)
    s[: max(1, p // 20)] = condition if kind == "few_large" else 1
    return s


def with_singular_values(s: Tensor, b: int, n: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices with these singular values, and their exact polar factor and Hermitian factor, in double."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float64)
    u, _ = torch.linalg.qr(torch.randn(b, len(s), len(s), generator=generator, dtype=wide))
    w, _ = torch.linalg.qr(torch.randn(b, n, len(s), generator=generator, dtype=wide))
    return (u * s) @ w.mH, u @ w.mH, (u * s) @ u.mH


def residual(x: Tensor) -> float:
    x = x.to(torch.promote_types(x.dtype, torch.float64))
    return torch.linalg.matrix_norm(gram_residual(x)).max().item() / x.shape[-2] ** 0.5


def distance(x: Tensor, y: Tensor) -> float:
    """Largest distance of two batches, relative to the second."""
    return (torch.linalg.matrix_norm(x.to(y.dtype) - y) / torch.linalg.matrix_norm(y)).max().item()


@pytest.mark.sampled(4)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("condition", [1, 1.01, 1.3, 2, 3, 7, 10, 30, 100, 1e3, 1e4])
@pytest.mark.parametrize(("b", "p", "n"), SHAPES)
def test_polar_is_accurate_to_float32_at_any_condition(
    solver: str, kind: str, condition: float, b: int, p: int, n: int
) -> None:
    v, _, _ = with_singular_values(singular(kind, p, condition), b, n, torch.float32, seed=p + n)
    v = v.float()
    reference = v.double().requires_grad_()
    exact = polar(reference)
    g = torch.randn(v.shape, generator=torch.Generator().manual_seed(1))
    exact.backward(g.double())
    v.requires_grad_()
    x = polar(v, solver=solver)
    x.backward(g)
    assert residual(x.detach()) <= 2e-6
    assert distance(x.detach(), exact.detach()) <= 1e-6
    assert distance(v.grad, reference.grad) <= 5e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("condition", [1, 1.1, 1.5, 2, 3, 4, 6])
def test_inverse_root_is_taken_and_right_where_training_is(dtype: torch.dtype, kind: str, condition: float) -> None:
    v, exact, h = with_singular_values(singular(kind, 48, condition), 3, 96, dtype, seed=3)
    root = inverse_root(v.to(dtype))
    assert root is not None
    assert distance(root[0] @ v.to(dtype), exact) <= 1e-6
    assert distance(root[1], h) <= 3e-6


@given(scale=st.floats(1e-6, 1e6), condition=st.floats(1, 5), p=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_inverse_root_at_any_scale(scale: float, condition: float, p: int, seed: int) -> None:
    v, exact, _ = with_singular_values(singular("even", p, condition), 2, p + seed, torch.float32, seed)
    root = inverse_root((scale * v).float())
    assert root is not None
    assert residual(root[0] @ (scale * v).float()) <= 2e-6
    assert distance(root[0] @ (scale * v).float(), exact) <= 1e-6


@pytest.mark.parametrize("condition", [SPREAD, 1e3, 1e6])
@pytest.mark.parametrize("kind", KINDS)
def test_inverse_root_leaves_ill_conditioned_matrices_alone(kind: str, condition: float) -> None:
    v, _, _ = with_singular_values(singular(kind, 32, condition), 2, 64, torch.float32, seed=5)
    assert inverse_root(v.float()) is None


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, 1e30, 1e-30])
def test_inverse_root_leaves_what_has_no_gram_matrix_in_float32_alone(value: float) -> None:
    assert inverse_root(torch.full((2, 3, 5), value)) is None


def test_one_bad_matrix_of_a_batch_does_not_spoil_the_others() -> None:
    good, exact, _ = with_singular_values(singular("even", 64, 2), 4, 128, torch.float32, seed=6)
    bad, _, _ = with_singular_values(singular("even", 64, 1e4), 1, 128, torch.float32, seed=7)
    v = torch.cat([good, bad]).float()
    x = polar(v, solver="products")
    assert distance(x, polar(v.double())) <= 1e-6
    assert distance(x[:4], exact) <= 1e-6


@pytest.mark.parametrize("solver", ["products", "iteration"])
def test_second_derivatives_of_every_solver_are_those_of_the_exact_one(solver: str) -> None:
    v, _, _ = with_singular_values(singular("even", 24, 2), 2, 40, torch.float32, seed=8)
    generator = torch.Generator().manual_seed(9)
    g, h = (torch.randn(v.shape, generator=generator) for _ in range(2))
    found = []
    for dtype, name in ((torch.float32, solver), (torch.float64, "eigen")):
        leaf = v.to(dtype).requires_grad_()
        (first,) = torch.autograd.grad(polar(leaf, solver=name), leaf, g.to(dtype), create_graph=True)
        found.append(torch.autograd.grad(first, leaf, h.to(dtype))[0])
    assert distance(found[0], found[1]) <= 1e-5


@pytest.mark.parametrize("solver", SOLVERS)
def test_zero_has_the_gradient_handed_in(solver: str) -> None:
    v = torch.zeros(2, 24, 40, requires_grad=True)
    g = torch.randn(v.shape, generator=torch.Generator().manual_seed(0))
    x = polar(v, solver=solver)
    x.backward(g)
    assert torch.equal(x.detach(), torch.zeros_like(x))
    torch.testing.assert_close(v.grad, g)


def test_small_gradients_keep_their_digits() -> None:
    v, _, _ = with_singular_values(singular("even", 48, 3), 2, 96, torch.float32, seed=10)
    g = torch.randn(v.shape, generator=torch.Generator().manual_seed(0))
    gradients = []
    for size in (1.0, 1e-25):
        leaf = v.float().requires_grad_()
        polar(leaf, solver="products").backward(g * size)
        gradients.append(leaf.grad / size)
    assert distance(gradients[1], gradients[0].double()) <= 1e-5


@pytest.mark.parametrize("condition", [1, 1.5, 4, 20, 1e4])
def test_lyapunov_without_eigenvalues_against_scipy(condition: float) -> None:
    _, _, h = with_singular_values(singular("even", 30, condition), 3, 40, torch.float64, seed=11)
    c = torch.randn(3, 30, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(12))
    c = c - c.mT
    c[1] = 0  # its direction vanishes while others go on
    solutions = [lyapunov_by_doubling(h, torch.linalg.inv(h), c)]
    if condition <= 100:  # it is for those
        solutions.append(lyapunov_by_products(h, c, tolerance=1e-12))
    for k in range(3):
        exact = torch.from_numpy(scipy.linalg.solve_sylvester(h[k].numpy(), h[k].numpy(), c[k].numpy()))
        for omega in solutions:
            assert (omega[k] - exact).norm() <= 1e-10 * condition * (1 + exact.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("condition", [1, 2, 10, 30, 100, 1e4])
@pytest.mark.parametrize(("b", "p", "n"), SHAPES)
def test_qr_by_cholesky_against_reflections(dtype: torch.dtype, condition: float, b: int, p: int, n: int) -> None:
    a, _, _ = with_singular_values(singular("even", p, condition), b, n, dtype, seed=13)
    a, eps = a.to(dtype), torch.finfo(dtype).eps
    exact = _by_reflections(a.to(torch.promote_types(dtype, torch.float64)))
    for factor in (qf, _without_waiting):
        q = factor(a)
        assert residual(q) <= 10 * eps
        assert distance(q, exact) <= 20 * eps * condition
        lower = (a @ q.mH).diagonal(dim1=-2, dim2=-1)
        assert bool((lower.real > 0).all())
        assert lower.imag.abs().max() <= 1e-4 * lower.abs().max() if dtype.is_complex else True


def test_qr_of_a_point_is_the_point() -> None:
    _, x, _ = with_singular_values(singular("even", 32, 1), 2, 64, torch.float64, seed=14)
    assert distance(qf(x), x) <= 1e-14


LACKING = {
    "a zero row": lambda a: a.index_fill(-2, torch.tensor([a.shape[-2] // 2]), 0),
    "zero rows": lambda a: a * (torch.arange(a.shape[-2]) % 2)[:, None],
    "equal rows": lambda a: torch.cat([a[:, :-1], a[:, :1]], dim=-2),
    "rank one": lambda a: a[:, :, :1] @ a[:, :1],
    "nothing": torch.zeros_like,
    "half of the identity": lambda a: torch.eye(*a.shape[-2:]).to(a) * (torch.arange(a.shape[-1]) < a.shape[-2] / 2),
    "the identity shifted": lambda a: torch.eye(*a.shape[-2:]).to(a).triu(1).roll(1, -1).expand_as(a),
    "small": lambda a: 1e-18 * a,
    "large": lambda a: 1e18 * a,
}


@pytest.mark.parametrize("kind", LACKING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize(("p", "n"), [(1, 1), (1, 10), (2, 2), (5, 5), (64, 64), (48, 200), LARGE])
def test_rows_that_lack_are_completed(dtype: torch.dtype, kind: str, p: int, n: int) -> None:
    """On a CPU and without reading anything back from the device, as on a GPU."""
    a = LACKING[kind](torch.randn(2, p, n, dtype=dtype, generator=torch.Generator().manual_seed(25)))
    maps = [qf, _without_waiting, nearest_in_step] + ([] if dtype == torch.float64 else [svd._by_iteration])
    for nearest in maps:
        x = nearest(a)
        assert x.dtype == dtype
        assert residual(x) <= 24 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("condition", [1, 1e2, 1e4, 1e6, 1e8])
@pytest.mark.parametrize(("p", "n"), [(5, 5), (64, 64), (48, 200), LARGE])
def test_the_nearest_without_reading_numbers(dtype, kind: str, condition: float, p: int, n: int) -> None:
    v, _, _ = with_singular_values(singular(kind, p, condition), 2, n, dtype, seed=26)
    v = v.to(dtype)
    x = svd._by_iteration(v)
    assert residual(x) <= torch.finfo(dtype).eps
    if condition <= 1e4:
        assert distance(x, nearest_orthonormal(v.to(torch.promote_types(dtype, torch.float64)))) <= 1e-5


@pytest.mark.parametrize("rank", [0, 3])
def test_qr_of_dependent_rows_is_still_orthonormal(rank: int) -> None:
    a = torch.zeros(2, 6, 9)
    a[:, :rank] = torch.randn(2, rank, 9, generator=torch.Generator().manual_seed(0))
    assert residual(qf(a)) <= 1e-6


def test_gradient_of_qr() -> None:
    a, _, _ = with_singular_values(singular("even", 4, 2), 2, 6, torch.float64, seed=15)
    assert torch.autograd.gradcheck(qf, (a.requires_grad_(),))
    assert torch.autograd.gradgradcheck(qf, (a,))
    assert torch.autograd.gradcheck(_without_waiting, (a,))


@pytest.mark.parametrize("condition", [1, 3, 1e3])
def test_nearest_in_step_is_the_nearest(condition: float) -> None:
    v, exact, _ = with_singular_values(singular("even", 64, condition), 2, 64, torch.float32, seed=16)
    assert distance(nearest_in_step(v.float()), exact) <= 1e-6 * (1 if condition < 10 else 100)
    assert residual(nearest_in_step(v.float())) <= 2e-6
    assert distance(nearest_orthonormal(v.float()), exact) <= 1e-7 * max(1, condition)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("size", [1e-12, 1e-9, 1e-7, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 0.1, 1.0])
@pytest.mark.parametrize(("p", "n"), [(1, 5), (5, 5), (64, 64), (32, 144)])
def test_nearest_in_step_is_scipys_polar_factor_near_the_set(monkeypatch, dtype, size: float, p: int, n: int) -> None:
    if size < 0.25 * 2**-0.5 or dtype in (torch.float32, torch.complex64):  # by products alone
        monkeypatch.setattr(svd, "nearest_orthonormal", None)
    s = torch.randn(p, generator=torch.Generator().manual_seed(27), dtype=torch.float64)
    s = (1 + 0.9 * size * s / s.norm()).sqrt()  # of which ‖VVᴴ − I‖ = 0.9 size
    v, _, _ = with_singular_values(s, 1, n, dtype, seed=28)
    v = v.to(dtype)
    exact, _ = scipy.linalg.polar(v[0].to(torch.promote_types(dtype, torch.float64)).numpy(), side="left")
    # LAPACK's own factors are off by some 10 epsilons in double.
    assert (
        distance(nearest_in_step(v)[0], torch.from_numpy(exact))
        <= (30 if dtype in DOUBLE else 4) * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradient_of_the_squared_residual(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 5, dtype=dtype, generator=torch.Generator().manual_seed(17)).requires_grad_()
    assert torch.autograd.gradcheck(squared_residual, (x,))
    assert torch.autograd.gradgradcheck(squared_residual, (x,))
    torch.testing.assert_close(squared_residual(x), torch.linalg.matrix_norm(gram_residual(x)) ** 2)


@pytest.mark.parametrize("solver", SOLVERS)
def test_memory_of_a_thin_polar_factor(solver: str) -> None:
    b, p, n = 3, 16, 3000
    v, _, _ = with_singular_values(singular("even", p, 2), b, n, torch.float32, seed=18)
    v = v.float().requires_grad_()
    with PeakMemory() as peak:
        polar(v, solver=solver).backward(torch.ones(b, p, n))
    assert peak.entries <= 12 * b * p * n


def test_a_batch_of_gradients() -> None:
    v = torch.randn(2, 60, 100, generator=torch.Generator().manual_seed(19)).requires_grad_()
    g = torch.randn(3, 2, 60, 100, generator=torch.Generator().manual_seed(20))
    (together,) = torch.autograd.grad(polar(v, solver="products"), v, g, is_grads_batched=True)
    for k in range(3):
        (alone,) = torch.autograd.grad(polar(v, solver="products"), v, g[k])
        assert distance(together[k], alone.double()) <= 1e-5


@pytest.mark.parametrize("size", [1e-18, 1e-19, 1e-20, 1e-22])
def test_denormal_gram_matrices_are_left_alone(size: float) -> None:
    v, _, _ = with_singular_values(singular("even", 60, 2), 2, 100, torch.float32, seed=21)
    assert residual(polar((size * v).float(), solver="products")) <= 2e-6


@pytest.mark.parametrize(("smallest", "p", "n"), [(1 / 38, 512, 600), (1 / 38, 512, 1100), (1 / 27, 256, 600)])
def test_qr_where_one_singular_value_is_small(smallest: float, p: int, n: int) -> None:
    s = torch.ones(p, dtype=torch.float64)
    s[0] = smallest
    a, _, _ = with_singular_values(s, 1, n, torch.float32, seed=22)
    q = qf(a.float()).double()
    assert torch.linalg.matrix_norm(gram_residual(q), 2).max() <= 3e-6  # LAPACK leaves 1.2e-6, a single pass 3e-5


def test_empty_batches() -> None:
    empty = torch.zeros(0, 3, 5)
    assert nearest_in_step(empty).shape == polar(empty).shape == qf(empty).shape == empty.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-6, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 0.1])
@pytest.mark.parametrize(("b", "p", "n"), SHAPES)
def test_qr_near_the_set(dtype: torch.dtype, size: float, b: int, p: int, n: int) -> None:
    _, x, _ = with_singular_values(singular("even", p, 1), b, n, dtype, seed=23)
    wide = x.dtype
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(24), dtype=wide) / n**0.5
    a = (x + size * noise).to(dtype)
    q, eps = qf(a), torch.finfo(dtype).eps
    assert residual(q) <= 5 * eps
    assert distance(q, _by_reflections(a.to(wide))) <= 10 * eps
