"""Cayley SGD against the paper's equations, in numpy with n×n matrices and columns, as they are printed."""

import math

import numpy as np
import pytest
import torch
from formulas import Bare, close, every_dtype, every_shape, gaussian, matrix, orthonormal, residual, stepped

import stiefel
from stiefel.manifold.geometry import project_tangent
from stiefel.manifold.retractions import retract_cayley


def iterated_cayley(x, m, rate, iterations, q=0.5):
    """Li, Fuxin and Todorovic (2020), lines 6 to 14 of Algorithm 1, columns: X⁺, the tangent momentum, and α."""
    w = m @ x.conj().T - 0.5 * x @ (x.conj().T @ m @ x.conj().T)
    w = w - w.conj().T
    m = w @ x
    alpha = min(rate, 2 * q / max(np.linalg.norm(w), 1e-300))
    y = x + alpha * m
    for _ in range(iterations):
        y = x + alpha / 2 * w @ (x + y)
    return y, m, alpha


def polar(x):
    u, _, vh = np.linalg.svd(x, full_matrices=False)
    return u @ vh


def columns(rows):
    """A matrix of rows as one of columns, in numpy."""
    return rows.detach().mH.resolve_conj().numpy()


def quadratic(n, dtype, seed=3):
    """The gradient of ½ tr(XᵀCX) − Re⟨T, X⟩ of columns X, C positive."""
    c, t = gaussian(n, n, seed=seed, dtype=dtype).numpy(), gaussian(n, n, seed=seed + 1, dtype=dtype).numpy()
    c = c @ c.conj().T / n
    return lambda x: c @ x - t[:, : x.shape[1]]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
@pytest.mark.parametrize("iterations", [1, 2, 5])
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("shape", [(3, 8), (4, 4), (4, 5), (1, 6)], ids=str)
def test_training_equals_the_papers_algorithm_1(shape, scale, iterations, dtype):
    """With momentum, for 30 steps of which some are shortened; the polar factor, which is added here, after each."""
    start, gradient, rate, beta = orthonormal(*shape, dtype=dtype), quadratic(shape[1], dtype), 0.5 * scale, 0.9
    model = stiefel.constrain(Bare(scale * start), "cayley_sgd", layers=["w"], scale=scale, iterations=iterations)
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=rate, momentum=beta)
    x, m = columns(start), np.zeros(shape[::-1])
    shortened = 0
    for _ in range(30):
        model.w.grad = torch.from_numpy(gradient(columns(model.w)).conj().T.copy())
        optimizer.step()
        y, m, alpha = iterated_cayley(x, beta * m - gradient(scale * x), rate / scale, iterations)
        shortened += alpha < rate / scale
        x = polar(y)
        assert close(model.w, scale * torch.from_numpy(x).mH, 1e-11)
    tally = next(stiefel.attach.weights.constrained_weights(model)).binding.tally
    assert int(tally.shortened) == shortened > 0


@every_shape
@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
def test_iterations_approach_the_cayley_transform_by_an_order_each(shape, iterations):
    """Y misses it by 2(A/2)^{s+2}; the polar factor removes what is off the set, of no lower order."""
    method = stiefel.get("cayley_sgd", iterations=iterations)
    x = orthonormal(4, *shape)
    u = project_tangent(x, gaussian(4, *shape, seed=1))
    u = u / torch.linalg.matrix_norm(u, keepdim=True).clamp_min(1e-300)
    sizes = [0.3, 0.15]
    errors = [(stepped(method, x, t * u, 0.1) - retract_cayley(x, t * u)).abs().max().item() for t in sizes]
    if shape == (1, 1):
        assert errors == [0, 0]
    else:
        assert errors[1] > 1e-11
        assert math.log2(errors[0] / errors[1]) > iterations + 1.8


def test_cayley_sgd_by_hand():
    """X = (1, 0), U = (9, h): Y = (1 − h²/2, h − h³/4), and ‖A‖_F = √2 h."""
    method, x = stiefel.get("cayley_sgd"), matrix([[[1.0, 0.0]]])
    for given, h, long in ((0.5, 0.5, False), (-80.0, -(0.5**0.5), True)):
        y = matrix([[[1 - h**2 / 2, h - h**3 / 4]]])
        moved, shortened = method.step(x, matrix([[[9.0, given]]]), 0.1)
        assert close(moved, y / torch.linalg.norm(y))
        assert shortened.tolist() == [long]


@every_shape
def test_a_long_step_is_as_long_as_the_longest(shape):
    x = orthonormal(5, *shape)
    u = project_tangent(x, gaussian(5, *shape, seed=1))
    s = u @ x.mT
    length = (2 * u.square().sum((-2, -1)) - s.square().sum((-2, -1))).sqrt()[:, None, None]
    method = stiefel.get("cayley_sgd")
    if shape == (1, 1):
        return
    a = x.mT @ (u - 0.5 * s @ x)
    assert close(torch.linalg.matrix_norm(a - a.mT), length[:, 0, 0])
    unit, flags = method.step(x, 0.999999 * u / length, 0.1)
    assert not flags.any()
    for size in (1.001, 1e3, 1e12, 1e100):
        moved, flags = method.step(x, size * u / length, 0.1)
        assert flags.all()
        assert close(moved, unit, 1e-5)


@pytest.mark.parametrize("q", [0.5])
def test_as_published_it_leaves_the_set_and_here_it_does_not(q):
    """The Algorithm 1 without QR and normalization, at 64×576 in float32, and a gradient that is noise of norm 1."""
    generator = torch.Generator().manual_seed(0)
    method = stiefel.get("cayley_sgd")
    x = ours = orthonormal(1, 64, 576).float()
    drift = []
    for _ in range(300):
        u = torch.randn(1, 64, 576, generator=generator)
        u = 0.3 * u / torch.linalg.matrix_norm(u, keepdim=True)
        t = project_tangent(x, u)
        x = method._transformed(x, t, t @ x.mT)
        ours = stepped(method, ours, u, 0.1)
        drift.append(residual(x).item())
    assert drift[99] > 3 * drift[9] > 0
    assert drift[-1] > 1e-4
    assert residual(ours).item() < 64 * torch.finfo(torch.float32).eps * 8
    assert 2 * q == stiefel.methods.cayley_sgd.LONGEST


@pytest.mark.sampled(3, values=False)
@every_dtype
@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 5, 5), (3, 1, 6)], ids=str)
def test_cayley_sgd_stays_orthonormal_for_thousands_of_wild_steps(shape, dtype):
    method, x = stiefel.get("cayley_sgd"), orthonormal(*shape).to(dtype)
    generator = torch.Generator().manual_seed(5)
    for _ in range(2000):
        size = 10 ** (6 * torch.rand(shape[0], 1, 1, generator=generator) - 3)
        x = stepped(method, x, (size * torch.randn(shape, generator=generator)).to(dtype), 0.1)
        assert residual(x).max() <= 64 * torch.finfo(dtype).eps * shape[1] ** 0.5


@every_dtype
@every_shape
@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_a_fixed_number_of_newton_schulz_steps_is_enough(monkeypatch, iterations, shape, dtype):
    """As on a GPU, where the host does not look how many are: for the longest steps, in one plane or in many."""
    method, x = stiefel.get("cayley_sgd", iterations=iterations), orthonormal(6, *shape).to(dtype)
    u = gaussian(6, *shape, seed=1).to(dtype)
    u[0] = x[0].flip(-2)  # in the span of the rows
    u[1] = gaussian(shape[0], 1, seed=2).to(dtype) @ gaussian(1, shape[1], seed=3).to(dtype)
    for size in (1e-3, 0.3, 1e6):
        here = method.step(x, size * u, 0.1)
        with monkeypatch.context() as patch:
            patch.setattr("stiefel.methods.cayley_sgd.may_wait", lambda tensor: False)
            there = method.step(x, size * u, 0.1)
        assert close(here[0], there[0], 32 * torch.finfo(dtype).eps)
        assert torch.equal(here[1], there[1])
        assert residual(there[0]).max() <= 32 * torch.finfo(dtype).eps * shape[0] ** 0.5


@pytest.mark.parametrize("iterations", [0, -1, 1.5, True, "2"])
def test_iterations_are_a_positive_whole_number(iterations):
    with pytest.raises(stiefel.OptionError, match="iterations="):
        stiefel.get("cayley_sgd", iterations=iterations)
