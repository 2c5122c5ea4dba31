"""Methods without a peer against closed formulas, numbers worked by hand, certificates of optimality, and derivatives.

References here are written anew from the formulas cited, mostly with numpy and scipy, one matrix at a time. Where two
right programs differ by rounding alone the tolerance is 1e-12 (some thousand ε of float64) times the size at hand.
"""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import stiefel
from stiefel.constraint import Reparameterization, StepMethod
from stiefel.layout import Layout
from stiefel.linalg import msign, nearest_orthonormal, spectral_radius
from stiefel.manifold.geometry import project_tangent
from stiefel.methods import method_class
from stiefel.methods.riemannian import METRICS, RETRACTIONS

SHAPES = [(3, 8), (2, 5), (4, 5), (4, 4), (5, 5), (1, 6), (2, 3), (1, 1)]
DTYPES = [torch.float32, torch.float64]

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


# --- helpers ---


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def orthonormal(*shape, seed=10, dtype=torch.float64):
    q, _ = torch.linalg.qr(gaussian(*shape, seed=seed, dtype=dtype).mT)
    return q.mT.contiguous()


def spectrum(p, n, values, seed=20):
    """A p×n matrix with given singular values and random singular vectors."""
    s = torch.as_tensor(values, dtype=torch.float64)
    return orthonormal(p, p, seed=seed) @ (s[..., :, None] * orthonormal(p, n, seed=seed + 1))


def matrix(rows):
    return torch.tensor(rows, dtype=torch.float64)


def residual(x):
    """‖XXᴴ − I‖_F of each matrix, in double precision."""
    x = x.detach().to(torch.promote_types(x.dtype, torch.float64))
    return torch.linalg.matrix_norm(x @ x.mH - torch.eye(x.shape[-2], dtype=x.dtype))


def close(a, b, tolerance=1e-12):
    """Equal to an absolute tolerance, never vacuously: NaN is unequal, and shapes must agree."""
    a, b = (torch.from_numpy(t) if isinstance(t, np.ndarray) else t.detach().as_subclass(torch.Tensor) for t in (a, b))
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=tolerance)


def variants(kind):
    """Every registered method of a kind, with its defaults and with each value of each option that it lets us tune."""
    cases = {}
    for name in stiefel.available():
        cls = method_class(name)
        if issubclass(cls, kind):
            chosen = [{}, *({key: value} for key, values in cls.tuning.items() for value in values)]
            cases |= {str(stiefel.get(name, **options)): (name, options) for options in chosen}
    return [pytest.param(*case, id=label) for label, case in cases.items()]


every_step = pytest.mark.parametrize(("name", "options"), variants(StepMethod))
every_proxy = pytest.mark.parametrize(("name", "options"), variants(Reparameterization))


def stepped(method, x, displacement, lr):
    """The point that a step method moves to, whether or not it tells which steps it shortened."""
    result = method.step(x, displacement, lr)
    return result[0] if isinstance(result, tuple) else result


class Bare(nn.Module):
    """One parameter without a layer, so that its gradient is whatever a test sets."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w.clone())


# --- landing ---


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


def tube_points(count, p, n, radius, seed=0, fractions=None):
    """Points with ‖XXᵀ − I‖_F a given share of the radius, in random symmetric directions."""
    s = gaussian(count, p, p, seed=seed)
    s = s + s.mT
    share = torch.linspace(0, 1, count, dtype=torch.float64) if fractions is None else fractions
    s = s / torch.linalg.matrix_norm(s, keepdim=True) * (radius * share)[:, None, None]
    values, q = torch.linalg.eigh(torch.eye(p, dtype=torch.float64) + s)
    return (q * values.clamp_min(0).sqrt().unsqueeze(-2)) @ q.mT @ orthonormal(count, p, n, seed=seed + 1)


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


# --- POGO ---


def pogo_by_the_book(x, u, longest=0.5):
    """Javaloy and Vergari (2026), Algorithm 1 with λ = ½, and the limit on ‖Ψ‖_F that the method's docstring adds."""
    psi = -(x @ x.mT @ u - x @ u.mT @ x) / 2
    length = torch.linalg.norm(psi).item()
    m = x - psi * (longest / length if length > longest else 1)
    return m + 0.5 * (m - m @ m.mT @ m), length > longest


@every_shape
def test_pogo_equals_its_formula(shape):
    x = tube_points(8, *shape, radius=0.05)
    for size in (1e-3, 0.3, 1.0, 10.0, 1e6):
        u = size * gaussian(8, *shape, seed=2)
        moved, flags = stiefel.get("pogo").step(x, u, 0.1)
        for i in range(8):
            expected, shortened = pogo_by_the_book(x[i], u[i])
            assert close(moved[i], expected)
            assert flags[i].item() == shortened


def test_pogo_by_hand():
    """X = (1, 0), U = (9, h): M = (1, h/2), ‖M‖² = 1 + h²/4, X⁺ = M(1 − h²/8)."""
    moved, shortened = stiefel.get("pogo").step(matrix([[[1.0, 0.0]]]), matrix([[[9.0, 0.8]]]), 0.1)
    assert close(moved, matrix([[[0.92, 0.92 * 0.4]]]))
    assert shortened.tolist() == [False]
    moved, shortened = stiefel.get("pogo").step(matrix([[[1.0, 0.0]]]), matrix([[[9.0, -80.0]]]), 0.1)
    assert close(moved, matrix([[[0.875, -0.875 * 0.5]]]))  # h = −1: ‖Ψ‖ = ½, and 1.25 · 0.875² − 1 = −0.043
    assert shortened.tolist() == [True]


@pytest.mark.parametrize("size", [0.03, 0.1, 0.3])
def test_pogo_leaves_three_quarters_of_the_fourth_power(size):
    """MMᵀ = I + ΨΨᵀ for a tangent Ψ, and a Newton-Schulz step takes e to −¾e² + ¼e³."""
    x = orthonormal(2, 9)
    psi = size * matrix([[0.0, 1.0], [-1.0, 0.0]]) @ x  # a tangent with two singular values ‖Ψ‖₂; its U is −Ψ
    e = size**2
    for polish in (1, 2):
        e = 0.75 * e**2 - 0.25 * e**3 if polish == 1 else 0.75 * e**2 + 0.25 * e**3  # e < 0 after the first
        moved = stepped(stiefel.get("pogo", polish=polish), x[None], -psi[None], 0.1)
        assert residual(moved).item() / math.sqrt(2) == pytest.approx(e, rel=1e-6, abs=1e-15)


@every_dtype
@pytest.mark.parametrize(("polish", "bound"), [(1, 0.05), (2, 2e-3)])
def test_pogo_stays_within_its_bound_for_thousands_of_wild_steps(dtype, polish, bound):
    """One Newton-Schulz step leaves at most 0.05, as documented; two leave ¾ 0.043² = 1.4e-3."""
    method, worst = stiefel.get("pogo", polish=polish), 0.0
    x = orthonormal(6, 3, 7).to(dtype)
    generator = torch.Generator().manual_seed(5)
    for _ in range(1000):
        size = 10 ** (6 * torch.rand(6, 1, 1, generator=generator) - 3)
        u = (size * torch.randn(6, 3, 7, generator=generator)).to(dtype)
        u[0] = 10 * x[0].flip(-1)  # one of them always in a direction of its own
        x = stepped(method, x, u, 0.1)
        worst = max(worst, residual(x).max().item())
    assert 0 < worst <= bound


# --- penalties ---


def phi(x, **options):
    return stiefel.get("soft", **options).penalty(x[None], Layout(tuple(x.shape)))[0]


def gradient_of_phi(x, **options):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(phi(leaf, **options), leaf)[0]


def test_penalties_by_hand():
    """X = (1 1; 0 2): XXᵀ = (2 2; 2 4), Δ = (1 2; 2 3); XᵀX − I = (0 1; 1 4); the eigenvalues of Δ are 2 ± √5."""
    x = matrix([[1.0, 1.0], [0.0, 2.0]])
    values = {"so": 18.0, "dso": 36.0, "mc": 3.0, "srip": 2 + math.sqrt(5), "ocnn": 18.0}
    for kind, value in values.items():
        assert phi(x, kind=kind).item() == pytest.approx(value, rel=1e-12)
    assert close(gradient_of_phi(x, kind="so"), 4 * matrix([[1.0, 5.0], [2.0, 8.0]]))  # 4ΔX
    assert close(gradient_of_phi(x, kind="mc"), matrix([[0.0, 0.0], [0.0, 4.0]]))  # Δ₂₂ = ⟨x₂, x₂⟩ − 1
    # The sign does not matter: rows shorter than 1, and a negative inner product.
    y = matrix([[0.5, 0.0], [0.0, 1.0]])
    assert [phi(y, kind=k).item() for k in ("so", "mc", "srip")] == pytest.approx([0.5625, 0.75, 0.75])
    z = matrix([[1.0, 0.0], [-0.6, 0.8]])
    assert [phi(z, kind=k).item() for k in ("so", "mc", "srip")] == pytest.approx([0.72, 0.6, 0.6])


@every_shape
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e3, 1e6])
def test_penalties_equal_their_definitions(shape, size):
    """Bansal, Chen and Wang (2018), eqs. 1 (SO), 2 (DSO), 3 (MC), 4 (SRIP), with numpy; DSO with both Gram matrices."""
    x = size * gaussian(*shape)
    a, (p, n) = x.numpy(), shape
    small, large = a @ a.T - np.eye(p), a.T @ a - np.eye(n)
    so = np.linalg.norm(small) ** 2
    assert phi(x, kind="so").item() == pytest.approx(so, rel=1e-12)
    assert phi(x, kind="dso").item() == pytest.approx(so + np.linalg.norm(large) ** 2, rel=1e-12)
    assert phi(x, kind="dso").item() == pytest.approx(2 * so + n - p, rel=1e-12)  # Massart (2022)
    assert phi(x, kind="mc").item() == pytest.approx(np.abs(small).max(), rel=1e-12)
    assert close(gradient_of_phi(x, kind="so"), 4 * small @ a, 1e-12 * max(1, size**3))
    assert close(gradient_of_phi(x, kind="dso"), 8 * small @ a, 1e-12 * max(1, size**3))
    sigma = np.linalg.norm(small, 2)
    assert 0.7 * sigma <= phi(x, kind="srip").item() <= sigma * (1 + 1e-12)


def hermitian_with(eigenvalues, seed=30):
    q = orthonormal(len(eigenvalues), len(eigenvalues), seed=seed)
    return q.mT @ (torch.as_tensor(eigenvalues, dtype=torch.float64)[:, None] * q), q


@pytest.mark.parametrize("eigenvalues", [[-5.0, 1.0, 0.5, 0.1], [4.0, -1.0, 1.0, 0.0], [3.0, 3.0, 1.0, -1.0]], ids=str)
def test_srip_is_exact_once_the_power_iteration_has_converged(eigenvalues):
    """At ratio r of the two largest, 16 iterations leave r³² of the square of the error's sine: below 1e-14 here."""
    h, q = hermitian_with(eigenvalues)
    h.requires_grad_()
    value = spectral_radius(h)
    assert value.item() == pytest.approx(max(map(abs, eigenvalues)), rel=1e-12)
    if abs(eigenvalues[0]) != abs(eigenvalues[1]):
        (gradient,) = torch.autograd.grad(value, h)
        leading = math.copysign(1, eigenvalues[0]) * torch.outer(q[0], q[0])
        assert close(gradient, leading, 1e-9)  # the vector itself converges as r¹⁶


def test_srip_where_both_signs_lead():
    """Eigenvalues ±σ: v alternates, vᵀHv may vanish, ‖Hv‖ does not. The gradient is one of the norm's subgradients."""
    h, _ = hermitian_with([2.0, -2.0, 0.5])
    h.requires_grad_()
    value = spectral_radius(h)
    (gradient,) = torch.autograd.grad(value, h)
    assert value.item() == pytest.approx(2, rel=1e-12)
    assert (gradient * h).sum().item() == pytest.approx(2, rel=1e-12)
    assert torch.linalg.matrix_norm(gradient, ord="nuc").item() == pytest.approx(1, rel=1e-12)


def test_srip_is_as_accurate_as_documented():
    """On random 64×64 matrices: about 0.88 of the norm after 2 iterations and 0.98 after 16, and never above it."""
    for iterations, documented in ((2, 0.88), (16, 0.98)):
        h = gaussian(60, 64, 64, seed=8)
        h = h + h.mT
        ratio = spectral_radius(h, iterations) / torch.linalg.matrix_norm(h, ord=2)
        assert ratio.max() <= 1 + 1e-12
        assert ratio.mean().item() == pytest.approx(documented, abs=0.03)


@pytest.mark.parametrize("kind", ["so", "dso", "mc", "srip", "ocnn"])
@pytest.mark.parametrize("x", [torch.eye(3, 7), torch.eye(3), torch.eye(1, 4)], ids=["wide", "square", "row"])
def test_penalties_vanish_with_their_gradient_on_the_set(kind, x):
    """Released SRIP code divides by a norm that is 0 here. At Δ = 0 the norms have a kink; 0 is their subgradient."""
    x = x.double()
    floor = x.shape[1] - x.shape[0] if kind == "dso" else 0
    assert phi(x, kind=kind).item() == floor
    gradient = gradient_of_phi(x, kind=kind)
    assert torch.isfinite(gradient).all()
    if kind != "mc":  # of equal entries amax shares the gradient of |Δ| at 0, which is 0 too
        assert gradient.abs().max() == 0
    assert torch.isfinite(gradient_of_phi(orthonormal(*x.shape), kind=kind)).all()


def test_soft_is_stable_below_a_quarter_and_not_above():
    """Near the set gradient descent multiplies a singular value's deviation by 1 − 8 lr λ: |·| < 1 iff lr λ < ¼."""
    for rate, factor in ((0.05, 0.6), (0.24, -0.92), (0.26, -1.08)):
        model = stiefel.constrain(Bare(spectrum(2, 5, [1.0, 1.0])), "soft", layers=["w"], strength=1.0)
        u, _, vh = torch.linalg.svd(model.w.detach(), full_matrices=False)
        with torch.no_grad():
            model.w.copy_(u @ torch.diag(matrix([1 + 1e-7, 1 - 1e-7])) @ vh)
        optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=rate)
        stiefel.penalty(model).backward()
        optimizer.step()
        after = torch.diagonal(u.mT @ model.w.detach() @ vh.mT) - 1
        assert close(after, factor * matrix([1e-7, -1e-7]), 1e-12)


def circulant(kernels, stride, size):
    """The dense matrix of a periodic strided convolution: row (o, y), column (c, x), kernel entry j at x = S y + j."""
    out, channels, *k = kernels.shape
    positions = list(itertools.product(*(range(0, size, s) for s in stride)))
    dense = np.zeros((out * len(positions), channels, *[size] * len(k)))
    for o, (i, y) in itertools.product(range(out), enumerate(positions)):
        for c, *j in itertools.product(range(channels), *(range(m) for m in k)):
            at = tuple((a + b) % size for a, b in zip(y, j, strict=True))
            dense[(o * len(positions) + i, c, *at)] += kernels[(o, c, *j)].item()
    return dense.reshape(len(dense), -1), len(positions)


CONVOLUTIONS = [
    (nn.Conv1d, (3, 2, 3), 1, 6),
    (nn.Conv1d, (3, 2, 4), 2, 8),
    (nn.Conv1d, (4, 1, 5), 3, 9),
    (nn.Conv1d, (4, 3, 2), 3, 6),  # patches that do not overlap, with gaps
    (nn.Conv1d, (5, 2, 1), 1, 3),
    (nn.Conv2d, (3, 2, (3, 3)), 1, 5),
    (nn.Conv2d, (4, 2, (3, 3)), 2, 6),
    (nn.Conv2d, (3, 2, (2, 4)), (1, 2), 8),
    (nn.Conv2d, (9, 1, (2, 2)), 2, 4),
    (nn.Conv2d, (2, 3, (1, 3)), (2, 1), 6),
    (nn.Conv3d, (2, 2, (2, 2, 2)), 1, 3),
    (nn.Conv3d, (3, 1, (2, 1, 3)), (2, 1, 2), 6),
]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("cls", "kernel", "stride", "size"), CONVOLUTIONS, ids=str)
def test_ocnn_is_the_row_gram_of_the_convolution(cls, kernel, stride, size, groups):
    """Wang, Chen, Chakraborty and Yu (2020), eqs. 6 to 8: ‖conv(K, K) − I₀‖² = ‖𝒦𝒦ᵀ − I‖_F² per output position.

    𝒦 is the dense matrix of the convolution on a periodic image, wide enough that two kernels meet at most once.
    Groups are independent convolutions: the blocks of a block-diagonal 𝒦.
    """
    out, channels, k = kernel
    layer = cls(groups * channels, groups * out, k, stride=stride, groups=groups, bias=False).double()
    stiefel.constrain(layer, "soft", kind="ocnn", strength=1.0)
    with torch.no_grad():
        layer.weight.copy_(0.5 * gaussian(*layer.weight.shape, seed=4))
    expected = 0.0
    for block in layer.weight.detach().chunk(groups):
        dense, positions = circulant(block, layer.stride, size)
        expected += np.linalg.norm(dense @ dense.T - np.eye(len(dense))) ** 2 / positions
    assert stiefel.penalty(layer).item() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize(
    ("kernel", "stride"), [((5, 1, 2), (2,)), ((5, 2, 3), (1,)), ((3, 2, 3), (1,)), ((6, 1, 2, 2), (2, 2))], ids=str
)
def test_ocnn_cannot_vanish_where_outputs_exceed_inputs_times_squared_stride(kernel, stride):
    """𝒦 has in · Πsize columns and out · Π(size/stride) rows: rank leaves at least out − in · Πstride per position."""
    out, channels, *k = kernel
    layout = Layout(kernel, stride=stride)
    method, floor = stiefel.get("soft", kind="ocnn"), max(0, out - channels * math.prod(stride))
    x = 0.5 * gaussian(out, channels * math.prod(k), seed=6)
    x = (x.mT if layout.columns else x).contiguous().requires_grad_()
    optimizer = torch.optim.LBFGS([x], max_iter=500, line_search_fn="strong_wolfe", tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        value = method.penalty(x[None], layout).sum()
        value.backward()
        return value

    optimizer.step(closure)
    value = method.penalty(x[None], layout).item()
    assert value >= floor - 1e-12
    if floor == 0:
        assert value < 1e-6
    if stride == tuple(k):  # disjoint patches: an orthonormal start attains the bound
        start = method.nearest(gaussian(*layout.matrix_shape, seed=7), layout)
        assert method.penalty(start, layout).item() == pytest.approx(floor, abs=1e-12)


def test_ocnn_of_a_complex_kernel():
    x = gaussian(3, 8, dtype=torch.complex128)
    layout = Layout((3, 2, 4))
    value = stiefel.get("soft", kind="ocnn").penalty(x[None], layout).item()
    kernel, expected = x.reshape(3, 2, 4).numpy(), 0.0
    for shift in range(-3, 4):
        a, b = kernel[..., max(0, shift) : 4 + min(0, shift)], kernel[..., max(0, -shift) : 4 - max(0, shift)]
        expected += np.linalg.norm(np.einsum("ack,bck->ab", a, b.conj()) - (np.eye(3) if shift == 0 else 0)) ** 2
    assert value == pytest.approx(expected, rel=1e-12)


# --- strength and decoupling ---


def train_penalized(decoupled, kind="so", scale=1.0, steps=20, lr=0.02, strength=0.3, base=torch.optim.SGD, **hyper):
    model = stiefel.constrain(
        Bare(gaussian(3, 7)), "soft", layers=["w"], kind=kind, strength=strength, scale=scale, decoupled=decoupled
    )
    with torch.no_grad():
        model.w.add_(0.3 * gaussian(3, 7, seed=1))
    optimizer = stiefel.optimizer(model, base, lr=lr, **hyper)
    for step in range(steps):
        optimizer.zero_grad()
        ((model.w * gaussian(3, 7, seed=40 + step)).sum() + stiefel.penalty(model)).backward()
        optimizer.step()
    return model.w.detach().as_subclass(torch.Tensor)


@pytest.mark.parametrize("kind", ["so", "dso", "mc", "srip", "ocnn"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_decoupled_equals_coupled_under_plain_sgd(kind, scale):
    assert close(train_penalized(True, kind, scale), train_penalized(False, kind, scale))


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_decoupled_keeps_the_penalty_out_of_the_momentum(scale):
    """m ← μm + G, W ← W − lr m − lr λ s ∇Φ(W/s), with ∇Φ = 4ΔX."""
    hyper, lr, strength = {"momentum": 0.9}, 0.02, 0.3
    ours = train_penalized(True, scale=scale, lr=lr, strength=strength, **hyper)
    assert not close(ours, train_penalized(False, scale=scale, lr=lr, strength=strength, **hyper), 1e-3)
    w = scale * nearest_orthonormal(gaussian(3, 7)) + 0.3 * gaussian(3, 7, seed=1)
    m = torch.zeros_like(w)
    for step in range(20):
        x = w / scale
        m = 0.9 * m + gaussian(3, 7, seed=40 + step)
        w = w - lr * m - lr * strength * scale * 4 * (x @ x.mT - torch.eye(3)) @ x
    assert close(ours, w)


def test_decoupled_is_out_of_reach_of_adam():
    lr, strength = 0.02, 0.3
    ours = train_penalized(True, lr=lr, strength=strength, base=torch.optim.Adam)
    assert not close(ours, train_penalized(False, lr=lr, strength=strength, base=torch.optim.Adam), 1e-3)
    w, m, v = nearest_orthonormal(gaussian(3, 7)) + 0.3 * gaussian(3, 7, seed=1), 0.0, 0.0
    for t in range(1, 21):
        g = gaussian(3, 7, seed=39 + t)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        pull = 4 * (w @ w.mT - torch.eye(3)) @ w
        w = w - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8) - lr * strength * pull
    assert close(ours, w)


class Released:
    """The schedule of SRIP's released code, with steps for epochs: base rate times 1, 1e-3, 1e-4, 1e-6, 0."""

    def __call__(self, step):
        return 0.3 * [1, 1e-3, 1e-4, 1e-6, 0][np.searchsorted([2, 5, 7, 12], step, side="right")]


@pytest.mark.parametrize("decoupled", [False, True])
def test_scheduled_strength_by_hand(decoupled):
    lr, schedule, ours = 0.05, Released(), train_penalized(decoupled, lr=0.05, strength=Released(), steps=15)
    w = nearest_orthonormal(gaussian(3, 7)) + 0.3 * gaussian(3, 7, seed=1)
    for step in range(15):
        pull = 4 * (w @ w.mT - torch.eye(3)) @ w
        w = w - lr * gaussian(3, 7, seed=40 + step) - lr * schedule(step) * pull
    assert [schedule(s) for s in (0, 1, 2, 5, 7, 12)] == pytest.approx([0.3, 0.3, 3e-4, 3e-5, 3e-7, 0])
    assert close(ours, w)


# --- the matrix sign, manifold Muon and SPEL ---


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


# --- RSDM ---


def dense_rotation(x, u):
    """X (I − A/2)⁻¹(I + A/2), A = ½(XᵀU − UᵀX), by numpy."""
    x, u = x.numpy(), u.numpy()
    a, eye = (x.T @ u - u.T @ x) / 2, np.eye(x.shape[1])
    return torch.from_numpy(x @ np.linalg.inv(eye - a / 2) @ (eye + a / 2))


@every_shape
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e3])
def test_rsdm_with_all_columns_is_the_dense_rotation(shape, size):
    """Whatever the order in which the columns are drawn."""
    x, u = orthonormal(2, *shape), size * gaussian(2, *shape, seed=1)
    for seed in range(3):
        torch.manual_seed(seed)
        moved = stepped(stiefel.get("rsdm", share=1.0), x, u, 0.1)
        for i in range(2):
            assert close(moved[i], dense_rotation(x[i], u[i]), 1e-12 * (1 + size))


@pytest.mark.parametrize(("n", "share", "drawn"), [(5, 0.5, 2), (5, 0.4, 2), (6, 0.5, 3), (6, 0.01, 2), (1, 0.5, 1)])
def test_rsdm_rotates_as_many_columns_as_its_share(n, share, drawn):
    x, u = orthonormal(1, min(3, n), n), gaussian(1, min(3, n), n, seed=1)
    torch.manual_seed(0)
    moved = stepped(stiefel.get("rsdm", share=share), x, u, 0.1)
    changed = ((moved - x).abs().amax(dim=(0, 1)) > 1e-9).sum().item()
    assert changed == (drawn if n > 1 else 0)  # one coordinate has no rotation


@pytest.mark.parametrize(("n", "drawn"), [(5, 2), (5, 3), (6, 3)])
def test_rsdm_mean_step_is_the_stated_share_of_the_whole(monkeypatch, n, drawn):
    """Over all subsets of r columns the step averages to r(r−1)/(n(n−1)) of the whole one, to first order."""
    x, u = orthonormal(1, 3, n), 1e-6 * gaussian(1, 3, n, seed=1)
    method, mean, subsets = stiefel.get("rsdm", share=drawn / n), 0.0, list(itertools.combinations(range(n), drawn))
    for subset in subsets:
        order = torch.tensor([*subset, *(set(range(n)) - set(subset))])
        monkeypatch.setattr(torch, "randperm", lambda size, order=order, **_: order)
        mean = mean + (stepped(method, x, u, 0.1) - x) / len(subsets)
    whole = stepped(stiefel.get("rsdm", share=1.0), x, u, 0.1) - x
    share = drawn * (drawn - 1) / (n * (n - 1))
    assert close(mean, share * whole, 1e-10)
    assert close(whole, (u - x @ u.mT @ x) / 2, 1e-10)  # (a, b) = (1, ½)


@every_dtype
@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_rsdm_stays_orthonormal_for_thousands_of_steps(dtype, share):
    torch.manual_seed(0)
    method, x = stiefel.get("rsdm", share=share), orthonormal(2, 3, 8).to(dtype)
    for _ in range(2000):
        x = stepped(method, x, torch.randn(2, 3, 8, dtype=dtype), 0.1)
    assert residual(x).max() < 16 * torch.finfo(dtype).eps


# --- ONI and Björck ---

ORIENTATIONS = {"rows": Layout((3, 8)), "columns": Layout((8, 3)), "square": Layout((4, 4))}


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


# --- PCA, weight and spectral normalization ---


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_own_pca_equals_numpys_eigenvectors(orientation, size):
    """Huang et al. (2018), section 3.2: Λ^{-1/2} Dᵀ V_c; signs by a positive largest entry of each eigenvector."""
    layout = ORIENTATIONS[orientation]
    _, p, n = layout.matrix_shape
    v = size * gaussian(p, n)
    centred = (v - v.mean(-1, keepdim=True) if orientation == "rows" else v).numpy()
    values, d = np.linalg.eigh(centred @ centred.T)
    d = d * np.sign(d[np.abs(d).argmax(0), np.arange(p)])
    ours = stiefel.get("own_pca").forward(v[None], layout)[0]
    assert close(ours, d.T @ centred / np.sqrt(values)[:, None], 1e-10)


def test_own_pca_is_differentiable_once_and_says_so():
    v = gaussian(2, 5).requires_grad_()
    x = stiefel.get("own_pca").forward(v[None], Layout((2, 5)))
    (gradient,) = torch.autograd.grad((x**3).sum(), v, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.square().sum().backward(retain_graph=True)
    # Silence would be worst beside a loss that has a second path to V: a gradient penalty, say.
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.square().sum() + x.sum(), v)


LAYERS = {
    "wide": lambda: nn.Linear(7, 3, bias=False),
    "tall": lambda: nn.Linear(3, 7, bias=False),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_weight_norm_trains_as_torchs(layer, scale):
    """A length per output filter: rows, or columns of a transposed matrix; at every scale the same steps."""
    torch.manual_seed(0)
    ours = stiefel.constrain(LAYERS[layer]().double(), "weight_norm", scale=scale)
    theirs = LAYERS[layer]().double()
    with torch.no_grad():
        theirs.weight.copy_(ours.weight)
    torch.nn.utils.parametrizations.weight_norm(theirs)
    start, c = ours.weight.detach().clone(), gaussian(*ours.weight.shape, seed=1)
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
        for _ in range(20):
            optimizer.zero_grad()
            (model.weight - c).pow(2).sum().backward()
            optimizer.step()
    assert close(ours.weight, theirs.weight, 1e-11)
    assert torch.linalg.norm(ours.weight.detach() - start) > 0.5


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_spectral_norm_equals_numpys_and_torchs(layer, size):
    """torch's follows the norm by power iteration, which 2000 iterations make exact; per group ours is per block."""
    torch.manual_seed(0)
    ours = stiefel.constrain(LAYERS[layer]().double(), "spectral_norm")
    proxy = ours.parametrizations.weight.original
    w = size * gaussian(*proxy.shape, seed=2)
    with torch.no_grad():
        proxy.copy_(w)
    blocks = w.flatten(1).chunk(2 if layer == "grouped" else 1)
    expected = torch.cat([b / np.linalg.norm(b.numpy(), 2) for b in blocks]).reshape(w.shape)
    assert close(ours.weight, expected)
    if layer == "grouped":
        return
    theirs = LAYERS[layer]().double()
    with torch.no_grad():
        theirs.weight.copy_(w)
    torch.nn.utils.parametrizations.spectral_norm(theirs, n_power_iterations=2000)
    c, gradients = gaussian(*w.shape, seed=3), []
    for model in (ours, theirs):
        (model.weight * c).sum().backward()
        gradients.append(size * model.parametrizations.weight.original.grad)
    assert close(ours.weight, theirs.weight, 1e-10)
    assert close(*gradients, 1e-9)


@pytest.mark.parametrize("shape", [(3, 7), (4, 4)], ids=str)
def test_spectral_norm_at_its_start_takes_the_mean_of_the_leading_gradients(shape):
    """σ_max has the subgradients Σ w_i u_i v_iᵀ; at an orthonormal X their mean is X/p, whatever the basis."""
    v, g = orthonormal(1, *shape).requires_grad_(), gaussian(1, *shape, seed=1)
    x = stiefel.get("spectral_norm").forward(v, Layout(shape))
    (gradient,) = torch.autograd.grad(x, v, g)
    assert close(x, v)
    assert close(gradient, g - (g * v.detach()).sum() / shape[0] * v.detach(), 1e-11)


# --- derivatives of every reparameterization ---


def exactly_twice(name, options, at):
    """Whether second derivatives are claimed: not of own_pca, and of spectral_norm not at its kink.

    ONI's spectral bound takes the leading vector as a constant, so that its second derivative is not exact unless the
    iteration has forgotten the bound.
    """
    method = stiefel.get(name, **options)
    forgets = name != "oni" or method.bound == "frobenius" or method.count is None or method.count >= 12
    return name != "own_pca" and not (name == "spectral_norm" and at == "start") and forgets


def proxy_of(method, shape, at, dtype):
    """A function of the proxy and of what else is trained, and where to evaluate it."""
    layout = Layout(shape)
    x = method.nearest(gaussian(*layout.matrix_shape, seed=60, dtype=dtype), layout)
    proxy, parts = method.start(x, layout)
    if at == "random":
        proxy = gaussian(*proxy.shape, seed=61, dtype=dtype)
    trained = [key for key, part in parts.items() if isinstance(part, nn.Parameter)]

    def forward(v, *values):
        return method.forward(v, layout, **{**parts, **dict(zip(trained, values, strict=True))})

    return forward, (proxy.clone().requires_grad_(), *(parts[k].detach().clone().requires_grad_() for k in trained))


@every_proxy
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
@pytest.mark.parametrize("at", ["start", "random"])
def test_derivatives_are_those_of_differences(name, options, dtype, at):
    method = stiefel.get(name, **options)
    if dtype not in method.dtypes:
        pytest.skip("for real weights only")
    for shape in [(2, 5), (3, 3), (5, 2), (1, 4)]:
        if name == "spectral_norm" and at == "start" and min(shape) > 1:
            continue  # a kink: its subgradient is tested above
        forward, inputs = proxy_of(method, shape, at, dtype)
        assert gradcheck(forward, inputs, fast_mode=dtype.is_complex or shape != (2, 5))
        if exactly_twice(name, options, at):
            assert gradgradcheck(forward, inputs, fast_mode=True)


@every_proxy
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
def test_training_starts_at_the_nearest_point_of_the_set(name, options, dtype):
    method = stiefel.get(name, **options)
    if dtype not in method.dtypes:
        pytest.skip("for real weights only")
    for shape in [(2, 5), (3, 3), (5, 2), (1, 4)]:
        layout = Layout(shape)
        x = method.nearest(gaussian(*layout.matrix_shape, seed=60, dtype=dtype), layout)
        forward, inputs = proxy_of(method, shape, "start", dtype)
        assert residual(x).max() < 1e-13
        assert close(forward(*inputs), x)


@pytest.mark.parametrize("kind", ["so", "dso", "mc", "srip", "ocnn"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
def test_derivatives_of_penalties(kind, dtype):
    method = stiefel.get("soft", kind=kind)
    for layout in (Layout((3, 7)), Layout((4, 4)), Layout((3, 2, 3), stride=(2,))):
        x = gaussian(*layout.matrix_shape, seed=62, dtype=dtype)
        x[..., 0, :] *= 3  # one eigenvalue stands out: srip's vector, which it takes as a constant, has converged
        x.requires_grad_()
        assert gradcheck(lambda v, layout=layout: method.penalty(v, layout), (x,), fast_mode=True, rtol=1e-5)
        if kind in ("so", "dso", "ocnn"):
            assert gradgradcheck(lambda v, layout=layout: method.penalty(v, layout), (x,), fast_mode=True)


# --- the law of one small step, and claims ---


@pytest.mark.parametrize(
    ("name", "options"), [case for kind in (Reparameterization, StepMethod) for case in variants(kind)]
)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_one_small_step_has_the_stated_coefficients(name, options, scale):
    """ΔW = −lr [a skew(GXᵀ)X + b G(I − XᵀX)], at every scale, up to O(lr)."""
    method = stiefel.get(name, **{**method_class(name).comparison, **options}, scale=scale)
    if method.coefficients is None:
        pytest.skip("no such form")
    (a, b), lr = method.coefficients, 1e-6
    for shape in [(3, 7), (4, 4), (7, 3)]:
        torch.manual_seed(0)
        layer = stiefel.constrain(nn.Linear(*shape[::-1], bias=False).double(), method)
        layout, before = Layout(shape, scale=scale), layer.weight.detach().clone()
        g = gaussian(*shape, seed=1)
        (layer.weight * g).sum().backward()
        stiefel.optimizer(layer, torch.optim.SGD, lr=lr).step()
        x, gx = layout.points(before)[0], layout.matrices(g)[0]
        expected = a * (gx @ x.mT - x @ gx.mT) / 2 @ x + b * (gx - gx @ x.mT @ x)
        moved = layout.matrices((before - layer.weight.detach()).as_subclass(torch.Tensor) / lr)[0]
        assert torch.linalg.norm(moved - expected) < 1e-4 * torch.linalg.norm(expected)


def farthest(method):
    """The longest step that a claim covers: its largest rate, at a gradient of norm one."""
    return method.claim.rates[1]


@every_step
@every_dtype
def test_step_methods_keep_their_claim_at_any_length(name, options, dtype):
    method = stiefel.get(name, **options)
    torch.manual_seed(0)
    failed = {}
    for shape, size, lr in itertools.product(SHAPES, [0.0, 1e-6, 1e-3, 1.0, 1e3, 1e6], [1e-6, 0.1, 1e6]):
        u = gaussian(12, *shape, seed=1)
        u = min(size, farthest(method)) * u / torch.linalg.matrix_norm(u, keepdim=True)
        moved = stepped(method, orthonormal(12, *shape).to(dtype), u.to(dtype), min(lr, farthest(method)))
        worst = residual(moved).max().item() / shape[0] ** 0.5
        if not method.claim.allows(worst, dtype, shape[0]):
            failed[shape, size] = worst
    assert not failed


@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize("metric", METRICS)
@every_dtype
def test_riemannian_retractions_keep_their_claim_at_any_length(retraction, metric, dtype):
    method = stiefel.get("riemannian", metric=metric, retraction=retraction)
    failed = {}
    for shape, size in itertools.product(SHAPES, [0.0, 1e-6, 1e-3, 1.0, 1e3, 1e6]):
        x, u = orthonormal(6, *shape).to(dtype), gaussian(6, *shape, seed=1)
        u = min(size, farthest(method)) * u / torch.linalg.matrix_norm(u, keepdim=True)
        moved = method.manifold(Layout(shape)).retract(x, project_tangent(x, u.to(dtype)))
        worst = residual(moved).max().item() / shape[0] ** 0.5
        if not method.claim.allows(worst, dtype, shape[0]):
            failed[shape, size] = worst
    assert not failed


# --- properties over shapes and scales ---


@st.composite
def problems(draw):
    """A shape p ≤ n, a power of ten, and a seed."""
    p = draw(st.integers(1, 6))
    return (p, draw(st.integers(p, 12))), 10.0 ** draw(st.integers(-6, 6)), draw(st.integers(0, 10_000))


properties = settings(max_examples=30, deadline=None, derandomize=True)


@every_step
@properties
@given(problem=problems())
def test_a_few_steps_of_any_length_stay_within_the_claim(name, options, problem):
    """Not only the first step, from the set: each of the next too, from wherever the method has left the weight."""
    (p, n), size, seed = problem
    method, x = stiefel.get(name, **options), orthonormal(4, p, n, seed=seed)
    torch.manual_seed(seed)
    for step in range(4):
        u = gaussian(4, p, n, seed=seed + step + 2)
        u = min(size, farthest(method)) * u / torch.linalg.matrix_norm(u, keepdim=True)
        x = stepped(method, x, u, 0.1)
        assert method.claim.allows(residual(x).max().item() / p**0.5, torch.float64, p)


CLAIMED = [case for case in variants(Reparameterization) if stiefel.get(case.values[0], **case.values[1]).claim]
SCALE_FREE = ("own", "own_pca", "oni", "bjorck", "spectral_norm")


@pytest.mark.parametrize(("name", "options"), CLAIMED)
@every_dtype
@properties
@given(problem=problems())
def test_reparameterized_weights_are_within_the_claim(name, options, dtype, problem):
    """At proxies of condition number 5 and any size; trivializations at rotations up to some turns."""
    (p, n), size, seed = problem
    method, layout = stiefel.get(name, **{**method_class(name).comparison, **options}), Layout((p, n))
    _, parts = method.start(orthonormal(1, p, n, seed=seed).to(dtype), layout)
    if name not in (*SCALE_FREE, "householder"):
        size = min(size, farthest(method))
    proxy = (size * spectrum(p, n, torch.linspace(0.3, 1.5, p), seed=seed)[None]).to(dtype)
    worst = residual(method.forward(proxy, layout, **parts)).max().item() / p**0.5
    assert method.claim.allows(worst, dtype, p)


@pytest.mark.parametrize("name", SCALE_FREE)
@every_dtype
@properties
@given(problem=problems())
def test_weights_do_not_depend_on_the_size_of_their_proxy(name, dtype, problem):
    """What weight decay relies on. A power of two changes no digit, so that only the methods' own ε could tell."""
    (p, n), size, seed = problem
    factor = 2.0 ** round(math.log2(size))
    method = stiefel.get(name, **method_class(name).comparison)
    v = spectrum(p, n, torch.linspace(0.3, 1.5, p), seed=seed)[None].to(dtype)
    x, y = (method.forward(f * v, Layout((p, n))) for f in (1.0, factor))
    assert close(x, y, 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("kind", stiefel.get("soft").tuning["kind"])
@every_dtype
@properties
@given(problem=problems())
def test_penalties_fall_along_their_gradient_at_any_size(kind, dtype, problem):
    """A step of a millionth of the weight's length, in double; in single precision both are finite."""
    (p, n), size, seed = problem
    method, layout = stiefel.get("soft", kind=kind), Layout((p, n))
    x = (size * gaussian(1, p, n, seed=seed)).to(dtype).requires_grad_()
    value = method.penalty(x, layout).sum()
    (gradient,) = torch.autograd.grad(value, x)
    assert value >= 0
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()
    if dtype == torch.float64:
        down = gradient / torch.linalg.norm(gradient) * torch.linalg.norm(x)
        assert method.penalty(x - 1e-6 * down, layout).sum() <= value * (1 + 1e-14)


@properties
@given(problem=problems())
def test_tangent_projection_is_idempotent_and_shortens(problem):
    (p, n), size, seed = problem
    x, u = orthonormal(p, n, seed=seed), size * gaussian(p, n, seed=seed + 1)
    tangent = project_tangent(x, u)
    assert close(project_tangent(x, tangent), tangent, 1e-13 * size)
    assert torch.linalg.norm(tangent) <= torch.linalg.norm(u) * (1 + 1e-13)
    assert close(tangent @ x.mT + x @ tangent.mT, torch.zeros(p, p, dtype=torch.float64), 1e-13 * size)


@st.composite
def layouts(draw):
    """Any layout: plain, packed in blocks, transposed, batched, cut into groups; at any scale."""
    kind = draw(st.sampled_from(["plain", "transposed", "batched"]))
    k = tuple(draw(st.lists(st.integers(1, 3), max_size=3)))
    blocks = draw(st.integers(1, 3)) if kind != "batched" else 1
    out, inputs = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    if kind == "transposed":
        shape = (blocks * inputs, out, *k)
    else:
        shape = (*k, out, inputs) if kind == "batched" else (blocks * out, inputs, *k)
    fan = inputs * (math.prod(k) if kind != "batched" else 1)
    sizes = [None, *(g for g in range(1, min(out, fan) + 1) if out % g == 0)]
    return Layout(
        shape,
        blocks=blocks,
        transposed=kind == "transposed",
        batched=kind == "batched",
        group_size=draw(st.sampled_from(sizes)),
        scale=10.0 ** draw(st.integers(-6, 6)),
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(layout=layouts())
def test_layouts_are_isometries_with_an_inverse(layout):
    w = gaussian(*layout.shape, seed=7)
    x = layout.matrices(w)
    b, p, n = layout.matrix_shape
    assert x.shape == (b, p, n)
    assert p <= n
    assert torch.equal(layout.tensor(x), w)
    assert torch.equal(x.flatten().sort().values, w.flatten().sort().values)
    assert torch.allclose(layout.weight(layout.points(w)), w, rtol=1e-15, atol=0)
    assert torch.allclose(layout.points(w) * layout.scale, x, rtol=1e-15, atol=0)
    start = layout.weight(nearest_orthonormal(layout.points(w)))
    assert residual(layout.points(start)).max() < 1e-12
