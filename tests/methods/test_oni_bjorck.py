"""ONI and Björck: what they converge to, and from where."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.special
import torch
from formulas import ORIENTATIONS, close, gaussian, matrix, orthonormal, spectrum

import stiefel
from stiefel.layout import Layout
from stiefel.linalg import nearest_orthonormal


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("iterations", [1, 4, 5, 7])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_oni_equals_the_published_algorithm(orientation, iterations, size):
    """Huang et al. (2020), Algorithm 1: S = Z_c Z_cᵀ/‖Z_c Z_cᵀ‖_F, B₀ = I, B ← 1.5B − 0.5B³S, W = B Z_c/√‖·‖_F."""
    layout = ORIENTATIONS[orientation]
    _, p, n = layout.matrix_shape
    v = size * gaussian(p, n)
    centred = (v - v.mean(-1, keepdim=True) if orientation == "rows" else v).numpy()
    bound = np.linalg.norm(centred @ centred.T)
    s, b = centred @ centred.T / bound, np.eye(p)
    for _ in range(iterations):
        b = 1.5 * b - 0.5 * b @ b @ b @ s
    expected = b @ centred / np.sqrt(bound)
    ours = stiefel.get("oni", iterations=iterations, bound="frobenius").forward(v[None], layout)[0]
    assert close(ours, expected, 1e-11)


@pytest.mark.parametrize("bound", ["spectral", "frobenius"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_oni_moves_singular_values_by_its_recursion(bound, orientation):
    """σ₀ = σ/c, σ ← 1.5σ − 0.5σ³; singular vectors stay. c = σ_max, or the Frobenius norm's square root of Σσ⁴."""
    layout = ORIENTATIONS[orientation]
    _, p, n = layout.matrix_shape
    sigma = [2.0, 0.5, 0.25, 0.1][:p]  # σ_max stands out, so that its estimate has converged
    v = spectrum(p, n, sigma)
    c = 2.0 if bound == "spectral" else sum(s**4 for s in sigma) ** 0.25
    expected = np.array(sigma) / c
    u, _, vh = torch.linalg.svd(v, full_matrices=False)
    for iterations in range(1, 8):
        expected = 1.5 * expected - 0.5 * expected**3
        method = stiefel.get("oni", iterations=iterations, bound=bound, center=False)
        x = method.forward(v[None], layout)[0]
        assert close(x, (u * torch.from_numpy(expected)) @ vh, 1e-12)


def test_onis_recursion_by_hand():
    """σ₀ = 1/2: 11/16, then 1.5 · 11/16 − 0.5 · (11/16)³ = 7117/8192."""
    v = spectrum(2, 4, [4.0, 2.0])
    for iterations, value in ((1, 11 / 16), (2, 7117 / 8192)):
        x = stiefel.get("oni", iterations=iterations, center=False).forward(v[None], Layout((2, 4)))[0]
        assert close(torch.linalg.svdvals(x), matrix([1.0, value]), 1e-12)


@pytest.mark.parametrize("iterations", [3, 5, 7])
def test_short_oni_promises_singular_values_of_at_most_one(iterations):
    for seed in range(30):
        v = gaussian(4, 4 + seed % 5, seed=seed)
        x = stiefel.get("oni", iterations=iterations, center=False).forward(v[None], Layout(tuple(v.shape)))
        assert torch.linalg.svdvals(x).max() <= 1 + 1e-12


@pytest.mark.parametrize("iterations", [1, 3, 12])
def test_oni_with_the_spectral_bound_starts_at_the_common_point_and_with_the_papers_does_not(iterations):
    x = orthonormal(1, 4, 9)
    spectral, frobenius = (
        stiefel.get("oni", iterations=iterations, bound=b, center=False).forward(x, Layout((4, 9)))
        for b in ("spectral", "frobenius")
    )
    assert close(spectral, x)
    assert iterations > 1 or not close(frobenius, x, 1e-2)
    first = 4**-0.25  # ‖XXᵀ‖_F = √p
    for _ in range(iterations):
        first = 1.5 * first - 0.5 * first**3
    assert close(frobenius, first * x)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("iterations", [1, 2, 5])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_bjorck_equals_its_series(order, iterations, orientation):
    """Björck and Bowie (1971), eq. 10, in columns: A ← A(I + Σ_{k≤p} (−1)^k C(−½, k) Q^k), Q = I − AᵀA."""
    layout = ORIENTATIONS[orientation]
    _, p, n = layout.matrix_shape
    v = gaussian(p, n, seed=3)
    a = v.numpy().T / math.sqrt(np.linalg.norm(v.numpy(), 1) * np.linalg.norm(v.numpy(), np.inf))
    assert np.linalg.norm(a, 2) <= 1  # what the divisor is for
    for _ in range(iterations):
        q = np.eye(p) - a.T @ a
        powers = [np.linalg.matrix_power(q, k) for k in range(order + 1)]
        a = a @ sum((-1) ** k * scipy.special.binom(-0.5, k) * powers[k] for k in range(order + 1))
    ours = stiefel.get("bjorck", order=order, iterations=iterations).forward(v[None], layout)[0]
    assert close(ours, a.T)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_bjorck_of_order_p_leaves_the_power_p_plus_one(order):
    """A residual e becomes c e^{p+1}: the next term of the series."""
    e = 1e-2
    errors = []
    for size in (e, e / 2):
        v = spectrum(2, 5, [1.0, math.sqrt(1 - size)])
        q = torch.eye(2, dtype=torch.float64) - v @ v.mT
        powers = sum((-1) ** k * scipy.special.binom(-0.5, k) * torch.matrix_power(q, k) for k in range(order + 1))
        errors.append(torch.linalg.norm(powers @ v - nearest_orthonormal(v)).item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order + 1, abs=0.1)
    # and the method does the same, whatever its divisor makes of the start
    v = spectrum(2, 5, [1.0, 0.5])
    done = stiefel.get("bjorck", order=order).forward(v[None], Layout((2, 5)))[0]
    assert close(done, nearest_orthonormal(v))


@pytest.mark.parametrize("name", ["oni", "bjorck"])
@pytest.mark.parametrize("shape", [(3, 8), (4, 4)], ids=str)
def test_converged_iterations_are_the_polar_factor(name, shape):
    v = spectrum(*shape, torch.linspace(0.3, 1.5, shape[0]))
    options = {"center": False} if name == "oni" else {}
    x = stiefel.get(name, **options).forward(v[None], Layout(shape))[0]
    assert close(x, scipy.linalg.polar(v.numpy(), side="left")[0])
