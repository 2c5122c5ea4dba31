"""The manifold's geometry from its definitions: tangents, metrics, the order of retractions, and geodesics."""

import numpy as np
import pytest
import torch
from common import gaussian

from stiefel.compat.geoopt import geoopt
from stiefel.linalg import cayley_along, gram_residual, skew, sym
from stiefel.manifold.geometry import (
    canonical_gradient,
    canonical_inner,
    euclidean_gradient,
    euclidean_inner,
    project_tangent,
    random_stiefel,
)
from stiefel.manifold.retractions import (
    exp_canonical,
    exp_euclidean,
    retract_cayley,
    retract_exp_canonical,
    retract_exp_euclidean,
    retract_polar,
    retract_qr,
)

SHAPES = [(3, 8), (3, 6), (4, 5), (4, 4), (1, 6), (1, 1), (2, 3, 7)]
RETRACTIONS = [
    retract_qr,
    retract_polar,
    retract_cayley,
    exp_euclidean,
    exp_canonical,
    retract_exp_euclidean,
    retract_exp_canonical,
]
EXPONENTIALS = {"euclidean": exp_euclidean, "canonical": exp_canonical}

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_retraction = pytest.mark.parametrize("retract", RETRACTIONS, ids=lambda f: f.__name__)


def point(*shape, seed=10):
    return random_stiefel(*shape, generator=torch.Generator().manual_seed(seed))


def tangent(x, seed=20):
    """A tangent vector built from its definition, K X + N with K skew and N Xᵀ = 0, not by the projection tested."""
    k, b = gaussian(*x.shape[:-1], x.shape[-2], seed=seed), gaussian(*x.shape, seed=seed + 1)
    return (k - k.mT) / 2 @ x + b - b @ x.mT @ x


def inner(metric, x, u, v):
    return euclidean_inner(u, v) if metric == "euclidean" else canonical_inner(x, u, v)


def close(a, b, tolerance=1e-12):
    return torch.allclose(a, b, rtol=0, atol=tolerance)


# --- tangent vectors and gradients ---


@every_shape
def test_projection_is_the_orthogonal_projection_on_the_tangent_space(shape):
    x, u, v = point(*shape), gaussian(*shape, seed=1), gaussian(*shape, seed=2)
    pu = project_tangent(x, u)
    assert close(sym(pu @ x.mT), torch.zeros_like(pu @ x.mT))
    assert close(project_tangent(x, pu), pu)
    assert close(euclidean_inner(pu, v), euclidean_inner(u, project_tangent(x, v)))
    assert close(project_tangent(x, tangent(x)), tangent(x))
    s = gaussian(*shape[:-1], shape[-2], seed=3)
    assert close(project_tangent(x, (s + s.mT) @ x), torch.zeros_like(x))


@every_shape
@pytest.mark.parametrize("metric", ["euclidean", "canonical"])
def test_normal_vectors_are_orthogonal_to_tangents_in_both_metrics(shape, metric):
    x = point(*shape)
    s = gaussian(*shape[:-1], shape[-2], seed=3)
    assert close(inner(metric, x, (s + s.mT) @ x, tangent(x)), torch.zeros(shape[:-2], dtype=torch.float64))


@every_shape
@pytest.mark.parametrize(("metric", "gradient"), [("euclidean", euclidean_gradient), ("canonical", canonical_gradient)])
def test_gradient_represents_the_differential_in_its_metric(shape, metric, gradient):
    x, g = point(*shape), gaussian(*shape, seed=4)
    r = gradient(x, g)
    assert close(sym(r @ x.mT), torch.zeros_like(r @ x.mT))
    for seed in range(5):
        u = tangent(x, seed=100 + 2 * seed)
        assert close(inner(metric, x, r, u), euclidean_inner(g, u))


@every_shape
def test_gradients_split_into_rotation_and_normal_part(shape):
    x, g = point(*shape), gaussian(*shape, seed=4)
    rotation, outside = skew(g @ x.mT) @ x, g - g @ x.mT @ x
    assert close(euclidean_gradient(x, g), rotation + outside)
    assert close(canonical_gradient(x, g), 2 * rotation + outside)


def test_canonical_inner_is_its_definition():
    x, u, v = point(3, 8), gaussian(3, 8, seed=1), gaussian(3, 8, seed=2)
    expected = torch.trace(u @ (torch.eye(8, dtype=torch.float64) - 0.5 * x.mT @ x) @ v.mT)
    assert close(canonical_inner(x, u, v), expected)


# --- retractions ---


@every_shape
@every_retraction
@pytest.mark.parametrize("size", [0.1, 1.0, 10.0])
def test_retraction_stays_on_the_manifold(shape, retract, size):
    x = point(*shape)
    y = retract(x, size * tangent(x))
    assert y.shape == x.shape
    assert torch.linalg.matrix_norm(gram_residual(y)).max() < 1e-12 * (1 + size**2)


@every_shape
@every_retraction
def test_retraction_of_zero_is_the_point(shape, retract):
    x = point(*shape)
    assert close(retract(x, torch.zeros_like(x)), x, 1e-14)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s != (1, 1)], ids=str)  # St(1, 1) is two points
@every_retraction
def test_retraction_is_of_first_order(shape, retract):
    x = point(*shape)
    u = tangent(x)
    u = u / torch.linalg.norm(u)
    times = np.logspace(-1, -4, 7)
    errors = [torch.linalg.norm(retract(x, t * u) - x - t * u).item() for t in times]
    assert np.polyfit(np.log(times), np.log(errors), 1)[0] >= 1.9


@pytest.mark.parametrize("shape", [(3, 8), (4, 4), (2, 3, 7)], ids=str)
@pytest.mark.parametrize(
    ("retract", "metric"),
    [(retract_polar, "euclidean"), (retract_cayley, "canonical")],
    ids=["polar", "cayley"],
)
def test_polar_and_cayley_follow_geodesics_to_second_order(shape, retract, metric):
    x = point(*shape)
    u = tangent(x)
    u = u / torch.linalg.norm(u)
    times = np.logspace(-1, -3, 5)
    errors = [torch.linalg.norm(retract(x, t * u) - EXPONENTIALS[metric](x, t * u)).item() for t in times]
    assert np.polyfit(np.log(times), np.log(errors), 1)[0] >= 2.9


# --- exponentials ---


def derivatives(exp, x, u, t, h=1e-3):
    """Position, velocity and acceleration at time t, by central differences of fourth order."""
    y = {k: exp(x, (t + k * h) * u) for k in (-2, -1, 0, 1, 2)}
    velocity = (y[-2] - 8 * y[-1] + 8 * y[1] - y[2]) / (12 * h)
    acceleration = (-y[-2] + 16 * y[-1] - 30 * y[0] + 16 * y[1] - y[2]) / (12 * h * h)
    return y[0], velocity, acceleration


@every_shape
@pytest.mark.parametrize("metric", EXPONENTIALS)
def test_geodesics_solve_their_equation_at_constant_speed(shape, metric):
    x = point(*shape)
    u = tangent(x)
    start = inner(metric, x, u, u)
    u = u / start.max().sqrt().clamp_min(1e-300) if start.max() > 0 else u
    speed = inner(metric, x, u, u)
    for t in (0.0, 0.5, 1.7):
        y, v, a = derivatives(EXPONENTIALS[metric], x, u, t)
        assert close(inner(metric, y, v, v), speed, 1e-8)
        if metric == "euclidean":  # the acceleration is normal: no tangential part
            residual = project_tangent(y, a)
        else:  # Edelman, Arias and Smith (1998), eq. 2.41, in rows form
            residual = a + y @ v.mT @ v + ((v @ y.mT) @ (v @ y.mT) + v @ v.mT) @ y
        assert residual.abs().max() < 1e-7


@every_shape
@pytest.mark.parametrize("metric", EXPONENTIALS)
def test_geodesics_compose(shape, metric):
    exp, x = EXPONENTIALS[metric], point(*shape)
    u = tangent(x) / 2
    y, velocity, _ = derivatives(exp, x, u, 0.6)
    assert close(exp(y, 0.9 * velocity), exp(x, 1.5 * u), 1e-8)


@every_shape
def test_euclidean_exponential_equals_geoopt(shape):
    x = point(*shape)
    u = tangent(x)
    expected = geoopt.EuclideanStiefel().expmap(x.mT, u.mT).mT
    assert close(exp_euclidean(x, u), expected, 1e-11)


@pytest.mark.parametrize("shape", [(3, 10), (2, 6), (3, 5)], ids=str)
def test_canonical_exponential_equals_the_dense_formula(shape):
    x = point(*shape)
    u = tangent(x)
    p = torch.eye(shape[-1], dtype=torch.float64) - 0.5 * x.mT @ x
    a = x.mT @ u @ p
    assert close(exp_canonical(x, u), x @ torch.linalg.matrix_exp(a - a.mT))


@pytest.mark.parametrize("metric", EXPONENTIALS)
def test_geodesics_along_degenerate_directions(metric):
    """Directions without a part outside the span of X, and of rank one: the basis must not need full rank."""
    exp, x = EXPONENTIALS[metric], point(3, 9)
    k = skew(gaussian(3, 3, seed=5))
    assert close(exp(x, k @ x), torch.linalg.matrix_exp(k) @ x)
    e = gaussian(1, 9, seed=6)
    e = e - e @ x.mT @ x
    e = e / torch.linalg.norm(e)
    u = torch.zeros_like(x)
    u[:1] = 0.7 * e  # rotates the first row towards e by 0.7 rad, in both metrics
    expected = x.clone()
    expected[:1] = np.cos(0.7) * x[:1] + np.sin(0.7) * e
    assert close(exp(x, u), expected)


@pytest.mark.parametrize("metric", EXPONENTIALS)
@pytest.mark.parametrize("size", [1.0, 10.0, 100.0, 1000.0])
def test_long_geodesics_lose_accuracy_no_faster_than_their_length(metric, size):
    """One large gradient must not throw a float32 weight off the manifold: the error is ε·length, not ε·length²."""
    x = point(4, 12)
    y = EXPONENTIALS[metric](x.float(), (size * tangent(x)).float())
    assert torch.linalg.matrix_norm(gram_residual(y.double())) < 1e-5 * (1 + size)


# --- random points ---


def test_random_points_are_reproducible_and_on_the_manifold():
    a, b, c = point(5, 3, 7, seed=1), point(5, 3, 7, seed=1), point(5, 3, 7, seed=2)
    assert torch.equal(a, b)
    assert not close(a, c, 1e-3)
    assert torch.linalg.matrix_norm(gram_residual(a)).max() < 1e-13
    low = random_stiefel(3, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    assert low.dtype == torch.float32


def test_random_points_have_the_moments_of_the_uniform_distribution():
    count, p, n = 20_000, 2, 4
    x = point(count, p, n, seed=3)
    assert x.mean(0).abs().max() < 5 / (n * count) ** 0.5
    second = torch.einsum("bij,bkl->ijkl", x, x) / count
    expected = torch.einsum("ik,jl->ijkl", torch.eye(p), torch.eye(n)).double() / n
    assert close(second, expected, 5 / count**0.5)
    # Fourth moment of one entry of a uniform unit vector: 3/(n(n+2)).
    assert close((x**4).mean(0), torch.full((p, n), 3 / (n * (n + 2)), dtype=torch.float64), 5 / count**0.5)


def test_random_square_points_have_both_determinants():
    determinants = torch.linalg.det(point(400, 3, 3, seed=4))
    assert 0.4 < (determinants > 0).double().mean() < 0.6


@pytest.mark.parametrize(("p", "n"), [(16, 64), (64, 200), (64, 64)])
@pytest.mark.parametrize("size", [1e-3, 1e-2])
def test_many_short_cayley_steps_keep_their_digits(p: int, n: int, size: float) -> None:
    k = torch.randn(n, n, dtype=torch.float64) / n**0.5
    x = torch.linalg.qr(torch.randn(1, n, p, dtype=torch.float64))[0].mT
    exact, rounded = x, x.float()
    for _ in range(200):
        exact = retract_cayley(exact, size * project_tangent(exact, exact @ k))
        rounded = retract_cayley(rounded, size * project_tangent(rounded, rounded @ k.float()))
    assert (rounded.double() - exact).norm() < 2e-5


@pytest.mark.parametrize("n", [64, 256])
def test_tiny_cayley_steps_of_square_matrices_are_taken(n: int) -> None:
    x = torch.linalg.qr(torch.randn(1, n, n))[0]
    u = project_tangent(x, torch.randn(1, n, n))
    u = u * (1e-7 * x.norm() / u.norm())
    moved = cayley_along(x, u) - x
    assert ((moved * u).sum() / u.square().sum() - 1).abs() < 0.05


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(("p", "n"), [(1, 5), (3, 8), (16, 40), (16, 24), (6, 6)])
@pytest.mark.parametrize("size", [0.0, 1e-8, 0.1, 3.9, 4.1, 100.0])
def test_cayley_along_a_tangent_is_the_transform_in_full(dtype: torch.dtype, p: int, n: int, size: float) -> None:
    x = torch.linalg.qr(torch.randn(3, n, p, dtype=dtype))[0].mH
    g = torch.randn(3, p, n, dtype=dtype)
    u = g - (x @ g.mH) @ x
    u = u * (size / u.abs().square().sum((-2, -1), keepdim=True).sqrt())
    b = u - 0.5 * (u @ x.mH) @ x
    a = x.mH @ b - b.mH @ x
    eye = torch.eye(n, dtype=dtype)
    expected = x @ (eye + a / 2) @ torch.linalg.inv(eye - a / 2)
    torch.testing.assert_close(cayley_along(x, u), expected, rtol=1e-10, atol=1e-13)
