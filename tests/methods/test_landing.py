"""Landing against its definition, on the set, in the tube and beyond it."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.special
import torch
from formulas import Bare, close, every_dtype, every_shape, gaussian, matrix, residual, spectrum, tube_points

import stiefel
from stiefel.linalg import gram_residual
from stiefel.methods.landing import NOISE


def landing_by_the_book(x, u, lr, attraction=1.0, tube=0.5):
    """X − tF and t, one matrix, in numpy.

    Field: Ablin, Vary, Gao and Absil (2024), eq. 6 with ψ(X) = skew(∇f Xᵀ)X, in rows and with −lr ∇f = U:
    Ψ = −½(XXᵀU − XUᵀX). ΨXᵀ is skew for every X, on the set or off it, so that with Δ = XXᵀ − I

        X⁺X⁺ᵀ − I = Δ − 2tμ(Δ + Δ²) + t² F Fᵀ,   ‖·‖_F ≤ d − 2tμ d(1 − d) + t² g²   for 2tμ ≤ 1.

    t is the largest number up to 1 that keeps this at the tube's radius: the larger root of a quadratic. Outside the
    tube it is the minimizer.
    """
    x, u = x.numpy(), u.numpy()
    delta, mu = x @ x.T - np.eye(len(x)), lr * attraction
    psi = -(x @ x.T @ u - x @ u.T @ x) / 2
    field = psi + mu * delta @ x
    d, g = np.linalg.norm(delta), np.linalg.norm(field)
    if g == 0:
        return torch.from_numpy(x), min(1, 1 / (2 * mu))
    slope = mu * d * (1 - d)
    t = max(np.roots([g**2, -2 * slope, d - tube]).real) if d <= tube else max(slope / g**2, 0)
    t = min(t, 1, 1 / (2 * mu))
    return torch.from_numpy(x - t * field), t


@every_shape
@pytest.mark.parametrize("attraction", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("tube", [0.1, 0.5, 0.9])
def test_landing_equals_its_formula(shape, attraction, tube):
    method = stiefel.get("landing", attraction=attraction, tube=tube)
    x = tube_points(12, *shape, radius=min(0.95, 1.5 * tube))
    for lr, size in itertools.product([1e-3, 0.1, 3.0], [0.0, 1e-3, 1.0, 30.0]):
        u = size * gaussian(12, *shape, seed=3)
        moved, flags = method.step(x, u, lr)
        for i in range(12):
            expected, t = landing_by_the_book(x[i], u[i], lr, attraction, tube)
            assert close(moved[i], expected, 1e-10 * (1 + size))
            assert flags[i].item() == (t < 1)


def test_landing_of_one_row_by_hand():
    """X = (1, 0), U = (5, h): Ψ = −½(U − ⟨X, U⟩X) = (0, −h/2), so that X⁺ = (1, h/2) while h²/4 ≤ ε."""
    landing, x = stiefel.get("landing"), matrix([[[1.0, 0.0]]])
    moved, shortened = landing.step(x, matrix([[[5.0, 0.2]]]), 0.1)
    assert close(moved, matrix([[[1.0, 0.1]]]))
    assert shortened.tolist() == [False]
    moved, shortened = landing.step(x, matrix([[[5.0, 4.0]]]), 0.1)  # ‖Ψ‖ = 2: cut where XXᵀ − 1 = ε = ½
    assert close(moved, matrix([[[1.0, math.sqrt(0.5)]]]))
    assert shortened.tolist() == [True]
    # Without a gradient: X = (a, 0), Δ = a² − 1 = 0.2, X⁺ = a(1 − μΔ).
    a = math.sqrt(1.2)
    moved, shortened = landing.step(matrix([[[a, 0.0]]]), torch.zeros(1, 1, 2, dtype=torch.float64), 0.1)
    assert close(moved, matrix([[[a * (1 - 0.1 * 0.2), 0.0]]]))
    assert shortened.tolist() == [False]


def test_landing_of_a_square_matrix_by_hand():
    """X = I: Ψ = −½(U − Uᵀ), blind to the symmetric part. Then X = diag(√1.3, 1), U = 0: F = μ diag(0.3√1.3, 0)."""
    landing = stiefel.get("landing")
    moved, _ = landing.step(torch.eye(2, dtype=torch.float64)[None], matrix([[[7.0, 0.3], [0.1, -2.0]]]), 0.1)
    assert close(moved, matrix([[[1.0, 0.1], [-0.1, 1.0]]]))
    a = math.sqrt(1.3)
    moved, _ = landing.step(matrix([[[a, 0.0], [0.0, 1.0]]]), torch.zeros(1, 2, 2, dtype=torch.float64), 0.5)
    assert close(moved, matrix([[[a * (1 - 0.5 * 0.3), 0.0], [0.0, 1.0]]]))


@every_dtype
@pytest.mark.parametrize("tube", [0.1, 0.5, 0.9])
def test_landing_never_leaves_its_tube(dtype, tube):
    """28,800 steps: starts everywhere in the tube and at its wall, gradients of 0 to 1e36 (its square overflows)."""
    sizes, rates = [0.0, 1e-12, 1e-6, 1e-3, 1.0, 1e2, 1e6, 1e12, 1e18, 1e36], [1e-6, 1e-3, 0.1, 1.0, 1e3, 1e6]
    tolerance, epsilon = tube * (1 + 1e-12), torch.finfo(dtype).eps
    for attraction, (p, n) in itertools.product([0.1, 10.0], [(1, 1), (1, 4), (3, 3), (2, 6), (5, 6), (8, 20)]):
        method = stiefel.get("landing", tube=tube, attraction=attraction)
        share = torch.linspace(0, 1, 40, dtype=torch.float64).clamp_max(0.75) / 0.75  # a quarter of them at the wall
        x = tube_points(40, p, n, tube, seed=p * n, fractions=share).to(dtype)
        before = residual(x)
        for k, (size, lr) in enumerate(itertools.product(sizes, rates)):
            u = gaussian(40, p, n, seed=k)
            u = (size * u / torch.linalg.matrix_norm(u, keepdim=True)).to(dtype)
            moved, _ = method.step(x, u, lr)
            assert torch.isfinite(moved).all()
            # Rounding of X⁺ and of its Gram matrix: entries of size about 1, p of them per row.
            assert (residual(moved) <= before.clamp_min(tolerance) + 8 * p**0.5 * epsilon).all()


@every_dtype
def test_landing_comes_back_from_outside_its_tube(dtype):
    method = stiefel.get("landing", tube=0.3)
    x = tube_points(30, 3, 7, 0.99, fractions=torch.linspace(0.35, 1, 30, dtype=torch.float64)).to(dtype)
    for size in (0.0, 1.0, 1e6, 1e18):
        u = size * gaussian(30, 3, 7, seed=2).to(dtype)
        moved, _ = method.step(x, u, 0.1)
        assert (residual(moved) <= residual(x) + 16 * torch.finfo(dtype).eps).all()
    y = x
    for _ in range(400):  # without a gradient the pull alone takes it onto the set, by 1 − 2μ per step
        y, _ = method.step(y, torch.zeros_like(y), 0.1)
    assert residual(y).max() < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("values", [[3.0, 1.0, 0.2], [1.5, 1.0, 0.0], [0.0, 0.0, 0.0], [1e6, 1e6, 1e-6]], ids=str)
def test_landing_projects_what_is_lost(values):
    """Where ‖Δ‖_F ≥ 1 the field may point away from the set."""
    x = spectrum(3, 7, values)[None]
    moved, shortened = stiefel.get("landing").step(x, gaussian(1, 3, 7), 0.1)
    assert shortened.tolist() == [True]
    assert residual(moved).item() < 1e-13
    if 0 < max(values) < 1e3 * min(values):
        assert close(moved[0], scipy.linalg.polar(x[0].numpy(), side="left")[0])


def test_landing_stands_still_without_a_gradient_on_the_set():
    x = torch.eye(3, 7, dtype=torch.float64)[None]
    moved, shortened = stiefel.get("landing").step(x, torch.zeros_like(x), 0.1)
    assert torch.equal(moved, x)
    assert shortened.tolist() == [False]


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_landing_through_an_optimizer_divides_the_step_by_the_scale_and_not_the_pull(scale):
    x, g, lr = tube_points(2, 3, 7, 0.2)[1], gaussian(3, 7, seed=5), 0.05
    model = stiefel.constrain(Bare(x), "landing", layers=["w"], scale=scale, attraction=2.0)
    with torch.no_grad():
        model.w.copy_(scale * x)
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=lr)
    model.w.grad = g.clone()
    optimizer.step()
    expected, t = landing_by_the_book(x, -lr * g / scale, lr, attraction=2.0)
    assert t == 1
    assert close(model.w, scale * expected)


def test_landing_counts_the_steps_that_it_shortened():
    model = stiefel.constrain(Bare(gaussian(3, 7)), "landing", layers=["w"])
    for rates, shortened in (([0.01] * 3, 0), ([100.0, 0.01], 1)):
        for lr in rates:
            model.w.grad = gaussian(3, 7, seed=1)
            stiefel.optimizer(model, torch.optim.SGD, lr=lr).step()
        assert stiefel.report(model).rows[0].shortened == shortened


@pytest.mark.parametrize("shape", [(1, 5), (5, 5), (64, 64), (64, 576), (512, 4608)], ids=str)
@pytest.mark.parametrize("kind", ["random", "normal", "scaled"])
def test_the_rounding_of_the_field_is_within_its_bound(shape, kind):
    """‖XΨᵀ + ΨXᵀ‖_F, 0 in exact arithmetic, in epsilons of ‖U‖_F: for a U whose normal part is all of it, too."""
    p, n = shape
    generator = torch.Generator().manual_seed(p + n)
    q = torch.linalg.qr(torch.randn(n, p, generator=generator, dtype=torch.float64))[0].mT
    bend, s = (torch.randn(p, p, generator=generator, dtype=torch.float64) for _ in range(2))
    x = (q + 0.2 * (bend + bend.mT) / torch.linalg.matrix_norm(bend + bend.mT) @ q).float()
    u = {
        "random": torch.randn(p, n, generator=generator, dtype=torch.float64),
        "normal": (s + s.mT) @ q,
        "scaled": q * torch.logspace(0, 6, p, dtype=torch.float64)[:, None],
    }[kind].float()
    x, u = x[None], u[None]
    field = stiefel.get("landing").field(x, u, gram_residual(x), 0.0).double()
    r = x.double() @ field.mT + field @ x.double().mT
    assert torch.linalg.matrix_norm(r) <= NOISE / 2 * torch.finfo(torch.float32).eps * torch.linalg.matrix_norm(
        u.double()
    )
