"""The matrix sign, manifold Muon and SPEL against decompositions and certificates of optimality."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.special
import torch
from formulas import Bare, close, every_shape, gaussian, orthonormal, spectrum, stepped

import stiefel
from stiefel.linalg import msign


def signs_of(p, n, values, seed=50):
    """A matrix with given singular values, and its polar factor by scipy."""
    m = spectrum(p, n, values, seed)
    return m, torch.from_numpy(scipy.linalg.polar(m.numpy(), side="left")[0])


@pytest.mark.parametrize("shape", [(8, 8), (8, 24)], ids=str)
@pytest.mark.parametrize("condition", [1, 10, 1e2, 1e3, 1e4])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_msign_equals_scipys_polar(shape, condition, size):
    """Geometric spectra, so that ‖M‖_F is hardly above ‖M‖₂. Rounding grows as the condition number, no faster."""
    m, expected = signs_of(*shape, torch.logspace(0, -math.log10(condition), shape[0]))
    assert close(msign(size * m), expected, 1e-13 * (1 + condition))
    single = msign((size * m).float()).double()
    assert close(single, expected, 4 * torch.finfo(torch.float32).eps * (1 + condition))


@pytest.mark.parametrize(("steps", "share"), [(8, 1e-3), (12, 1e-4)])
@pytest.mark.parametrize("p", [8, 64])
def test_msign_converges_as_documented(steps, share, p):
    """One small singular value below p − 1 equal ones: what counts is σ_min/‖M‖_F, not the condition number."""
    m, expected = signs_of(p, 2 * p, [1.0] * (p - 1) + [share * math.sqrt(p - 1)])
    assert close(msign(m, steps), expected, 1e-12 / share)


def test_msign_of_deficient_matrices_is_a_partial_isometry():
    m = spectrum(4, 7, [2.0, 1.0, 0.5, 0.0])
    u, _, vh = torch.linalg.svd(m, full_matrices=False)
    assert close(msign(m), u[:, :3] @ vh[:3], 1e-10)
    assert torch.equal(msign(torch.zeros(2, 3, 5)), torch.zeros(2, 3, 5))


def dual_bound(x, g):
    """min over symmetric Λ of ‖G + 2ΛX‖_*, and what a feasible A attains, by scipy's L-BFGS on a smoothed norm.

    The dual of max ⟨G, A⟩ over tangent A with ‖A‖₂ ≤ 1: every Λ bounds it from above (Bernstein 2025). Σ√(σ² + δ²)
    smooths the nuclear norm, with δ → 0; its gradient's factor is nearly tangent, and is made so.
    """
    x, g = x.numpy(), g.numpy()
    p, bound = len(x), np.inf
    size = np.linalg.norm(g) / p**0.5
    g = g / size
    half = -(g @ x.T + x @ g.T).ravel() / 4  # Λ = (H + Hᵀ)/2

    def parts(half, delta):
        h = half.reshape(p, p)
        u, s, vh = np.linalg.svd(g + (h + h.T) @ x, full_matrices=False)
        return s, (u * (s / np.hypot(s, delta))) @ vh

    def smoothed(half, delta):
        s, a = parts(half, delta)
        return np.hypot(s, delta).sum(), (a @ x.T + x @ a.T).ravel()

    options = {"maxiter": 2000, "ftol": 1e-15, "gtol": 1e-10}
    for delta in 10.0 ** -np.arange(1, 7):
        half = scipy.optimize.minimize(smoothed, half, (delta,), "L-BFGS-B", jac=True, options=options).x
        s, a = parts(half, delta)
        bound = min(bound, s.sum())
    a = a - (a @ x.T + x @ a.T) / 2 @ x
    return size * bound, size * (g * a).sum() / max(1, np.linalg.norm(a, 2))


GRADIENTS = {
    "gaussian": lambda p, n, seed: gaussian(p, n, seed=seed),
    "anisotropic": lambda p, n, seed: gaussian(p, n, seed=seed) * torch.logspace(0, -3, n, dtype=torch.float64),
    "rank one": lambda p, n, seed: gaussian(p, 1, seed=seed) @ gaussian(1, n, seed=seed + 1000),
}


@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("shape", [(1, 4), (2, 5), (3, 8), (5, 12), (3, 4), (4, 5), (6, 7)], ids=str)
def test_manifold_muon_comes_within_three_percent_of_the_optimum(shape, kind):
    for seed in range(4):
        x, g = orthonormal(*shape, seed=seed), GRADIENTS[kind](*shape, seed + 1)
        bound, attained = dual_bound(x, g)
        assert attained > 0.999 * bound  # so that the bound is the optimum
        a = stiefel.get("manifold_muon").direction(x[None], g[None])[0]
        assert (g * a).sum().item() >= 0.97 * bound


@every_shape
@pytest.mark.parametrize("kind", GRADIENTS)
def test_manifold_muon_directions_are_tangent_of_norm_one_and_lead_downhill(shape, kind):
    method, x = stiefel.get("manifold_muon"), orthonormal(*shape)
    g = GRADIENTS[kind](*shape, 1)
    a = method.direction(x[None], g[None])[0]
    assert close(a @ x.mT + x @ a.mT, torch.zeros(shape[0], shape[0], dtype=torch.float64), 1e-9)
    assert torch.linalg.matrix_norm(a, ord=2) <= 1 + 1e-12
    slope = (g * a).sum().item()
    assert slope <= dual_bound(x, g)[0] * (1 + 1e-9)  # weak duality
    assert slope > 0 or shape == (1, 1)
    for exponent in (-20, -3, 7, 20):  # only the gradient's direction counts: powers of two, near 1e-6 … 1e6, are exact
        assert torch.equal(method.direction(x[None], 2.0**exponent * g[None])[0], a)


@pytest.mark.parametrize("p", [2, 3, 4, 5])
def test_manifold_muon_of_square_weights_is_optimal(p):
    """A = ΩX, Ω skew: max ⟨skew(GXᵀ), Ω⟩ over ‖Ω‖₂ ≤ 1 is the nuclear norm, and 2Λ = −sym(GXᵀ) has it as its bound."""
    x, g = orthonormal(p, p), gaussian(p, p, seed=1)
    a = stiefel.get("manifold_muon").direction(x[None], g[None])[0]
    k = (g @ x.mT - x @ g.mT) / 2
    nuclear = np.linalg.norm(k.numpy(), "nuc")
    assert (g * a).sum().item() == pytest.approx(nuclear, rel=1e-9)
    assert close(a @ x.mT + x @ a.mT, torch.zeros(p, p, dtype=torch.float64), 1e-9)
    assert dual_bound(x, g)[0] == pytest.approx(nuclear, rel=1e-5)
    u, s, vh = torch.linalg.svd(k)
    rank = p - p % 2  # a skew matrix of odd size is singular
    assert close(a, u[:, :rank] @ vh[:rank] @ x, 1e-9)
    assert s[rank - 1] > 0.05  # or the formula above would not be determined


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("shape", [(3, 8), (4, 4)], ids=str)
def test_manifold_muon_steps_are_as_long_as_the_rate(shape, scale):
    """Through the optimizer: W⁺ = s polar(X − (lr/s)A), so that ‖W⁺ − W‖₂ = lr up to second order."""
    for size, lr in itertools.product([1e-3, 1e3], [1e-2, 1e-4]):
        model = stiefel.constrain(Bare(gaussian(*shape)), "manifold_muon", layers=["w"], scale=scale)
        optimizer, before = stiefel.optimizer(model, torch.optim.SGD, lr=lr), model.w.detach().clone()
        g = gaussian(*shape, seed=1)
        model.w.grad = size * g
        optimizer.step()
        x = (before / scale).as_subclass(torch.Tensor)
        a = stiefel.get("manifold_muon").direction(x[None], g[None])[0]
        expected = scipy.linalg.polar((x - lr / scale * a).numpy(), side="left")[0]
        assert close(model.w, scale * torch.from_numpy(expected), 1e-9)
        moved = torch.linalg.matrix_norm((model.w.detach() - before).as_subclass(torch.Tensor), ord=2).item()
        assert moved == pytest.approx(lr, rel=1e-3 + lr)


@pytest.mark.parametrize("name", ["manifold_muon", "spel"])
@every_shape
def test_sign_steps_stand_still_without_a_gradient(name, shape):
    x = orthonormal(2, *shape)
    assert close(stepped(stiefel.get(name), x, torch.zeros_like(x), 0.1), x)


@every_shape
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_spel_equals_its_formula(shape, scale):
    """Yang and Lai (2026), Algorithm 2: X ← msign(X − η msign(P_X(D))), with D = −U and η = lr/s."""
    x, u = orthonormal(*shape), gaussian(*shape, seed=1)
    for lr, size in itertools.product([1e-3, 0.3], [1e-6, 1.0, 1e6]):
        d = -u
        tangent = d - (d @ x.mT + x @ d.mT) / 2 @ x
        left, s, vh = torch.linalg.svd(tangent, full_matrices=False)
        direction = (left * (s > 1e-9 * s[0])) @ vh if s[0] > 1e-12 else torch.zeros_like(x)
        expected = scipy.linalg.polar((x - lr / scale * direction).numpy(), side="left")[0]
        moved = stepped(stiefel.get("spel", scale=scale), x[None], size * u[None], lr)[0]
        assert close(moved, expected, 1e-9) or shape == (1, 1)


@every_shape
def test_spel_steps_are_about_as_long_as_the_rate(shape):
    """As documented; ‖msign‖₂ ≤ 1 and the way to the nearest point alone give twice the rate."""
    x, u = orthonormal(40, *shape), gaussian(40, *shape, seed=1)
    for lr in (1e-3, 0.1):
        moved = torch.linalg.matrix_norm(stepped(stiefel.get("spel"), x, u, lr) - x, ord=2)
        assert moved.max() <= 2 / math.sqrt(3) * lr * 1.001
        assert moved.min() > 0.5 * lr or shape == (1, 1)
