"""POGO against its definition."""

import math

import pytest
import torch
from formulas import close, every_dtype, every_shape, gaussian, matrix, orthonormal, residual, stepped, tube_points

import stiefel


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
