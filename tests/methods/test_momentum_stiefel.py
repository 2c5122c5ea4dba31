"""The momentum Stiefel optimizer against its dynamics, geodesics, and the paper's Algorithm 1 in numpy."""

import itertools
import math

import numpy as np
import pytest
import torch
from formulas import Bare, close, every_dtype, every_shape, gaussian, matrix, orthonormal, residual, stepped
from scipy.integrate import solve_ivp

import stiefel
from stiefel.linalg import polar, skew
from stiefel.manifold.geometry import project_tangent
from stiefel.manifold.retractions import exp_canonical, exp_euclidean

EXPONENTIALS = {"canonical": (0.5, exp_canonical), "euclidean": (0.0, exp_euclidean)}
"""For each metric a, and its geodesics."""

every_metric = pytest.mark.parametrize("metric", EXPONENTIALS)
MOVING = [(3, 8), (4, 4), (3, 5), (1, 6)]


def parts(x, u):
    """Y and V of the tangent part of U."""
    inside = u @ x.mH
    return skew(inside), u - inside @ x


def slopes(errors):
    """By how many powers of two an error falls where the step is halved."""
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]


@every_metric
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
@pytest.mark.parametrize("shape", [*MOVING, (2, 2), (1, 1)], ids=str)
def test_a_step_is_the_retraction_of_the_scaled_parts(shape, metric, dtype):
    """X⁺ = polar(X + YX/(1 − a) + V), and M⁺ a tangent at X⁺ whose Y is that of M (canonical) or which is P(M)."""
    method, a = stiefel.get("momentum_stiefel", metric=metric), EXPONENTIALS[metric][0]
    x, u, m = orthonormal(3, *shape, dtype=dtype), *(gaussian(3, *shape, seed=s, dtype=dtype) for s in (1, 2))
    for size in (1e-3, 1.0, 30.0):
        y, v = parts(x, size * u)
        moved = method.step(x, size * u, 0.1)
        assert close(moved, polar(x + y @ x / (1 - a) + v))
        tangent = project_tangent(x, m)
        carried = method.transport(x, moved, tangent)
        assert close(project_tangent(moved, carried), carried)
        if metric == "euclidean":
            assert close(carried, project_tangent(moved, tangent))
        else:
            assert close(skew(carried @ moved.mH), parts(x, tangent)[0])
            assert close(parts(moved, carried)[1], parts(moved, parts(x, tangent)[1])[1])
        longer = torch.linalg.matrix_norm(carried) / torch.linalg.matrix_norm(tangent).clamp_min(1e-300)
        assert (longer <= 1 + 1e-12).all()  # no step lengthens a momentum


def roll(method, x, m, count, more=0.0):
    """A ball without friction and forces, for a time of 1: the momentum M of a step is that of the one before."""
    for _ in range(count):
        moved = method.step(x, m / count, 1.0)
        y, v = parts(x, m)
        m, x = method.transport(x, moved, y @ x + v + more / count * (y @ v)), moved
    return x


@every_metric
@pytest.mark.parametrize("shape", MOVING, ids=str)
def test_a_ball_without_friction_and_forces_follows_a_geodesic(shape, metric):
    method, (a, exponential) = stiefel.get("momentum_stiefel", metric=metric), EXPONENTIALS[metric]
    x = orthonormal(2, *shape)
    y, v = parts(x, 0.5 * gaussian(2, *shape, seed=1))
    end = exponential(x, y @ x / (1 - a) + v)
    errors = [(roll(method, x, y @ x + v, count) - end).abs().max().item() for count in (40, 80, 160)]
    assert errors[-1] < 0.05
    assert min(slopes(errors)) > 0.8
    if metric == "euclidean" or shape[0] in (1, shape[1]):
        return
    # V̇ has (3a/2 − 1) · Y V / (1 − a) in the paper, Y that of M: at a = ½ this ends elsewhere, whatever the step.
    wrong = [(roll(method, x, y @ x + v, n, (1.5 * a - 1) / (1 - a)) - end).abs().max().item() for n in (40, 80, 160)]
    assert min(wrong) > 5 * errors[-1]
    assert slopes(wrong)[-1] < 0.3


def problem(p, n):
    """The gradient of ½ tr(XCXᵀ) − ⟨T, X⟩."""
    c, t = gaussian(n, n, seed=3), gaussian(p, n, seed=4)
    c = c @ c.mT / n
    return lambda x: x @ c - t


def rolled(x, gradient, friction, time, a):
    """The dynamics of the method's docstring from rest, by scipy."""
    p, n = x.shape
    cut = [p * n, p * n + p * p]

    def velocity(_, z):
        x, y, v = z[: cut[0]].reshape(p, n), z[cut[0] : cut[1]].reshape(p, p), z[cut[1] :].reshape(p, n)
        g = gradient(torch.from_numpy(x)).numpy()
        gx = g @ x.T
        force = -friction * y - (gx - gx.T) / 2 / (1 - a)
        out = -friction * v - (1 - 2 * a) * y @ v - v @ v.T @ x - (g - gx @ x)
        return np.concatenate([(y @ x + v).ravel(), force.ravel(), out.ravel()])

    start = np.concatenate([x.numpy().ravel(), np.zeros(p * p + p * n)])
    z = solve_ivp(velocity, (0, time), start, rtol=1e-11, atol=1e-12).y[:, -1]
    return torch.from_numpy(z[: cut[0]].reshape(p, n))


@every_metric
@pytest.mark.parametrize("shape", MOVING, ids=str)
def test_training_converges_to_the_dynamics_as_the_step_goes_to_zero(shape, metric):
    """SGD of momentum μ = exp(−γh) and rate h(1 − μ)/γ, for a time of 2."""
    gradient, x, friction, time, errors = problem(*shape), orthonormal(*shape), 1.0, 2.0, []
    end = rolled(x, gradient, friction, time, EXPONENTIALS[metric][0])
    assert residual(end) < 1e-9  # the dynamics keep the set
    for count in (50, 100, 200):
        h = time / count
        mu = math.exp(-friction * h)
        model = stiefel.constrain(Bare(x), "momentum_stiefel", layers=["w"], metric=metric)
        optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=h * (1 - mu) / friction, momentum=mu)
        for _ in range(count):
            model.w.grad = gradient(model.w.detach())
            optimizer.step()
        errors.append((model.w.detach() - end).abs().max().item())
    assert (end - x).abs().max() > 0.3
    assert errors[-1] < 0.02
    assert min(slopes(errors)) > 0.85


def as_published(x, y, v, rate, c):
    """Kong, Wang and Tao (2023), Algorithm 1 with its Euler step, columns, by numpy: X, Y and V after the gradient.

    c is the paper's (3a − 2)/2. Y stays as it is, and V orthogonal to X.
    """
    v = v + c * rate * v @ y
    half = x + rate * x @ y
    x = half + rate * v @ half.T @ half
    v = v - rate * half @ v.T @ v
    u, _, vh = np.linalg.svd(x, full_matrices=False)
    return u @ vh, v


@every_metric
@pytest.mark.parametrize("shape", MOVING, ids=str)
def test_a_step_equals_the_papers_algorithm_1(shape, metric):
    """With c = 2a − 1: X to O(h³), V to O(h²); in the Euclidean metric, where the paper turns V first, X to O(h²)."""
    method, a = stiefel.get("momentum_stiefel", metric=metric), EXPONENTIALS[metric][0]
    x = orthonormal(*shape)
    y, v = parts(x, gaussian(*shape, seed=1))
    points, momenta = [], []
    for h in (0.02, 0.01, 0.005):
        moved = method.step(x[None], h * (y @ x + v)[None], 1.0)
        carried = parts(moved, method.transport(x[None], moved, (y @ x + v)[None]))
        theirs = as_published(x.mT.numpy(), y.mT.numpy() / (1 - a), v.mT.numpy(), h, 2 * a - 1)
        end, out = (torch.from_numpy(t).mT for t in theirs)
        assert close(out @ end.mT, torch.zeros_like(y))
        points.append((moved[0] - end).abs().max().item())
        momenta.append(max((carried[0] - y).abs().max().item(), (carried[1] - out).abs().max().item()))
    if shape[0] in (1, shape[1]):  # Y or V is 0
        assert max(points) < 1e-14
    else:
        assert min(slopes(points)) > (2.9 if metric == "canonical" else 1.9)
    if shape[0] == shape[1] and metric == "canonical":
        assert max(momenta) < 1e-14
    else:
        assert min(slopes(momenta)) > 1.9


@pytest.mark.parametrize("n", [2, 5])
def test_training_of_a_square_weight_equals_the_papers_algorithm_1(n):
    """V = 0 there, and no choice is left: 50 steps of SGD with momentum in the canonical metric."""
    gradient, rate, mu = problem(n, n), 0.05, 0.9
    model = stiefel.constrain(Bare(orthonormal(n, n)), "momentum_stiefel", layers=["w"])
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=rate, momentum=mu)
    x, y = model.w.detach().mT.numpy().copy(), np.zeros((n, n))
    for _ in range(50):
        g = gradient(torch.from_numpy(x.T)).mT.numpy()
        y = mu * y - (x.T @ g - g.T @ x)
        x, _ = as_published(x, y, np.zeros((n, n)), rate, 0.0)
        model.w.grad = gradient(model.w.detach())
        optimizer.step()
        assert close(model.w, torch.from_numpy(x).mT, 1e-11)


def test_momentum_stiefel_by_hand():
    """X = (1, 0), U = (9, h): the angle atan h; a momentum (0, k) is then k cos h of the tangent there."""
    method, x, h, k = stiefel.get("momentum_stiefel"), matrix([[[1.0, 0.0]]]), 0.75, 3.0
    moved = method.step(x, matrix([[[9.0, h]]]), 0.1)
    assert close(moved, matrix([[[0.8, 0.6]]]))
    assert close(method.transport(x, moved, matrix([[[0.0, k]]])), 0.8 * k * matrix([[[-0.6, 0.8]]]))


@pytest.mark.sampled(4, values=False)
@every_dtype
@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 5, 5), (3, 1, 6)], ids=str)
@every_metric
def test_momentum_stiefel_stays_orthonormal_for_thousands_of_wild_steps(metric, shape, dtype):
    method, x = stiefel.get("momentum_stiefel", metric=metric), orthonormal(*shape).to(dtype)
    m, generator = torch.zeros_like(x), torch.Generator().manual_seed(5)
    for _ in range(2000):
        size = 10 ** (6 * torch.rand(shape[0], 1, 1, generator=generator) - 3)
        m = 0.9 * m + (size * torch.randn(shape, generator=generator)).to(dtype)
        moved = stepped(method, x, m, 0.1)
        m, x = method.transport(x, moved, m), moved
        assert residual(x).max() <= 64 * torch.finfo(dtype).eps * shape[1] ** 0.5
        assert torch.isfinite(m).all()


@every_shape
def test_a_momentum_never_grows_by_long_steps(shape):
    """As published V would grow by its own cube, and be infinite after some steps."""
    model = stiefel.constrain(Bare(orthonormal(*shape)), "momentum_stiefel", layers=["w"])
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=1e6, momentum=0.9)
    for step in range(100):
        g = gaussian(*shape, seed=step)
        model.w.grad = g / torch.linalg.norm(g)
        optimizer.step()
        assert torch.linalg.norm(optimizer.state[model.w]["momentum_buffer"]) < 10 + 1e-9


@pytest.mark.parametrize("metric", ["Canonical", None, 0.5])
def test_a_metric_is_one_of_two(metric):
    with pytest.raises(stiefel.OptionError, match="metric="):
        stiefel.get("momentum_stiefel", metric=metric)
