"""Constraint dissolving against numpy and closed forms: its map, the loss that it makes, and when that has the set."""

import numpy as np
import pytest
import torch
from formulas import Bare, close, every_shape, gaussian, matrix, orthonormal, spectrum

import stiefel
from stiefel.attach.weights import constrained_weights
from stiefel.layout import Layout

METHOD = stiefel.get("dissolving")
FIELDS = pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)


def dissolved(v):
    return METHOD.forward(v[None], Layout(tuple(v.shape)))[0]


def hermitian(p, seed, dtype=torch.float64):
    a = gaussian(p, p, seed=seed, dtype=dtype)
    return (a + a.mH) / 2


def held(w, **options):
    model = stiefel.constrain(Bare(w), "dissolving", layers=["w"], **options)
    return model, next(constrained_weights(model))


@FIELDS
@every_shape
@pytest.mark.parametrize("size", [0.0, 1e-8, 1.0, 1e3])
def test_the_map_is_its_definition_and_one_step_to_the_set(shape, size, dtype):
    """Xiao, Liu and Toh (2024): A(V) = (3/2 I − ½VVᴴ)V; with E = VVᴴ − I, A Aᴴ − I = −¾E² + ¼E³."""
    v = size * gaussian(*shape, dtype=dtype)
    a, eye = v.numpy(), np.eye(shape[0])
    gram = a @ a.conj().T
    expected = (1.5 * eye - 0.5 * gram) @ a
    assert close(dissolved(v), expected, 1e-13 * max(1, size**3) * max(shape) ** 2)
    e, x = gram - eye, dissolved(v)
    off = -0.75 * e @ e + 0.25 * e @ e @ e
    assert close(x @ x.mH - torch.eye(shape[0]), off, 1e-12 * max(1, np.linalg.norm(e)) ** 3)


def test_by_hand():
    """V = diag(2, ½): A = diag(1.5·2 − 8/2, 1.5/2 − 1/16) = diag(−1, 11/16), E = diag(3, −¾), ‖E‖² = 9.5625."""
    v = matrix([[2.0, 0.0], [0.0, 0.5]])
    assert close(dissolved(v), matrix([[-1.0, 0.0], [0.0, 0.6875]]))
    assert METHOD.penalty(v[None], Layout((2, 2))).tolist() == pytest.approx([9.5625], rel=1e-14)


@FIELDS
@pytest.mark.parametrize("shape", [(3, 8), (4, 4), (1, 6), (1, 1)], ids=str)
def test_on_the_set_the_gradient_is_the_tangent_one_and_the_weight_is_the_proxy(shape, dtype):
    for x in (orthonormal(*shape, dtype=dtype), torch.eye(*shape, dtype=dtype)):  # and all singular values are 1
        g, leaf = gaussian(*shape, seed=1, dtype=dtype), x.clone().requires_grad_()
        assert close(dissolved(x), x, 1e-14)
        value = (dissolved(leaf) * g.conj()).real.sum() + METHOD.penalty(leaf[None], Layout(shape)).sum()
        (found,) = torch.autograd.grad(value, leaf)
        gx = g @ x.mH
        assert close(found, g - (gx + gx.mH) / 2 @ x, 1e-14)


@FIELDS
def test_second_derivative_along_normal_directions(dtype):
    """At V = (I + tS)X: A = (I − ³⁄₂ t² S² + …)X, so that h″(0) = 8λ ‖S‖² − 3 tr(S² sym(GXᴴ))."""
    x, g, s = orthonormal(3, 7, dtype=dtype), gaussian(3, 7, seed=1, dtype=dtype), hermitian(3, 2, dtype)
    strength, t = 0.3, torch.zeros((), dtype=torch.float64, requires_grad=True)
    v = x + t * (s @ x)
    h = (dissolved(v) * g.conj()).real.sum() + strength * METHOD.penalty(v[None], Layout((3, 7))).sum()
    (first,) = torch.autograd.grad(h, t, create_graph=True)
    (second,) = torch.autograd.grad(first, t)
    gamma = (g @ x.mH + x @ g.mH) / 2
    expected = 8 * strength * torch.linalg.norm(s) ** 2 - 3 * (s @ s @ gamma).diagonal().sum().real
    assert abs(first) < 1e-13
    assert close(second, expected.to(second), 1e-12)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_at_a_scale_the_penalty_counts_its_square_in_the_second_derivative(scale):
    w, g, s = scale * orthonormal(3, 7), gaussian(3, 7, seed=1), hermitian(3, 2)
    model, found = held(w, strength=0.3, scale=scale)
    with torch.no_grad():
        v, values = found.parameter.clone(), []
        for k in (-2, -1, 0, 1, 2):
            found.parameter.copy_(v + 1e-3 * k * (s @ v))
            values.append(((model.w * g).sum() + stiefel.penalty(model)).item())
    second = np.dot([-1, 16, -30, 16, -1], values) / 12e-6
    gamma = (g @ w.T + w @ g.T) / 2
    expected = 8 * 0.3 * scale**2 * torch.linalg.norm(s) ** 2 - 3 * (s @ s @ gamma).trace()
    assert second == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("shape", [(3, 7), (7, 3)], ids=str)
def test_the_loss_is_the_papers(shape, scale):
    """h(V) = f(s A(V/s)) + (β/4) s² ‖VVᵀ/s² − I‖², and its gradient by finite differences; β = 4 λ."""
    beta, g = 1.6, gaussian(*shape, seed=3)
    model, found = held(gaussian(*shape), strength=beta / 4, scale=scale)
    with torch.no_grad():
        found.parameter.add_(gaussian(*shape, seed=4), alpha=0.3)

    def by_hand(v):
        a = (v if shape[0] <= shape[1] else v.T) / scale
        eye = np.eye(len(a))
        w = scale * (1.5 * eye - 0.5 * a @ a.T) @ a
        w = w if shape[0] <= shape[1] else w.T
        return (w * g.numpy()).sum() + beta / 4 * scale**2 * np.linalg.norm(a @ a.T - eye) ** 2

    loss = (model.w * g).sum() + stiefel.penalty(model)
    loss.backward()
    v = found.parameter.detach().numpy()
    assert loss.item() == pytest.approx(by_hand(v), rel=1e-12)
    for index in np.ndindex(*shape):
        step = np.zeros(shape)
        step[index] = 1e-6
        slope = (by_hand(v + step) - by_hand(v - step)) / 2e-6
        assert found.parameter.grad[index].item() == pytest.approx(slope, abs=1e-7)


@pytest.mark.parametrize("gamma", [-1.0, 0.0, 0.5, 2.0])
@pytest.mark.parametrize("strength", [0.1, 0.25, 1.0])
def test_a_deviation_shrinks_by_what_is_documented(strength, gamma):
    """1 − lr (8λ − 3γ) a step, for G = γX: below a rate of 2/(8λ − 3γ), and only where 8λ > 3γ, V comes back."""
    lr = 0.05
    model, found = held(spectrum(2, 5, [1.0, 1.0]), strength=strength)
    x = model.w.detach().clone()
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=lr)
    with torch.no_grad():
        found.parameter.mul_(1 + 1e-7)
    (gamma * (model.w * x).sum() + stiefel.penalty(model)).backward()
    optimizer.step()
    after = torch.linalg.svdvals(found.parameter.detach()) - 1
    assert close(after, (1 - lr * (8 * strength - 3 * gamma)) * matrix([1e-7, 1e-7]), 1e-13)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_it_ends_on_the_set_where_a_soft_penalty_does_not(base):
    """Procrustes from ten random starts: the solution itself, and no trade between loss and penalty."""
    u, _, vh = torch.linalg.svd(gaussian(10, 4, 9, seed=5), full_matrices=False)
    s = torch.logspace(0, -1, 4, dtype=torch.float64)
    t, ends = (u * s) @ vh, {}
    for name in ("dissolving", "soft"):
        model = stiefel.constrain(Bare(gaussian(10, 4, 9, seed=6)), name, layers=["w"], strength=0.5)
        optimizer = stiefel.optimizer(model, base, lr=0.2 if base is torch.optim.SGD else 0.05)
        for step in range(1500):
            if base is torch.optim.Adam:
                optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 1500) ** 3
            optimizer.zero_grad()
            (stiefel.penalty(model) - (model.w * t).sum()).backward()
            optimizer.step()
        ends[name] = (s.sum() - (model.w.detach() * t).sum((-2, -1))) / s.sum(), stiefel.report(model).worst
    gap, residual = ends["dissolving"]
    assert gap.abs().max() < 1e-9
    assert residual < 1e-9
    assert ends["soft"][1] > 0.05


def test_project_takes_it_to_the_nearest_matrix_and_release_leaves_it():
    for w in (gaussian(3, 7), gaussian(7, 3)):
        model, found = held(w, scale=2.0)
        with torch.no_grad():
            found.parameter.add_(gaussian(*w.shape, seed=4), alpha=0.1)
        seen = model.w.detach().clone()
        assert stiefel.report(model).worst > 1e-3
        parameter = found.parameter
        stiefel.project(model)
        u, _, vh = torch.linalg.svd(seen, full_matrices=False)
        assert close(model.w, 2 * u @ vh)
        assert found.parameter is parameter
        assert stiefel.report(model).worst < 1e-14
        value = model.w.detach().clone()
        assert torch.equal(stiefel.release(model).w, value)


def test_release_keeps_a_weight_that_is_off_the_set():
    model, found = held(gaussian(3, 7))
    with torch.no_grad():
        found.parameter.mul_(1.1)
    seen = model.w.detach().clone()
    assert torch.equal(stiefel.release(model).w, seen)


def test_no_decay_pulls_the_proxy_off_the_set():
    model, found = held(gaussian(3, 7))
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.1, weight_decay=0.5)
    assert {group["weight_decay"] for group in optimizer.param_groups if found.parameter in set(group["params"])} == {0}
    plain = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    (model.w.sum() + stiefel.penalty(model)).backward()
    with pytest.warns(UserWarning, match="weight_decay=0.5 of SGD would move weight 'w'"):
        plain.step()


@pytest.mark.parametrize("options", [{"determinant": 1}, {"subspace": True}], ids=str)
def test_what_only_a_set_has_is_refused(options):
    with pytest.raises(stiefel.OptionError, match="'dissolving' does not keep"):
        stiefel.get("dissolving", **options)
    with pytest.raises(stiefel.OptionError, match="'dissolving'"):
        stiefel.minimize(held(gaussian(3, 7))[0], lambda: torch.zeros(()))
    with pytest.raises(stiefel.OptionError, match=r"strength=-1.0: expected a number ≥ 0"):
        stiefel.get("dissolving", strength=-1.0)


def test_a_scheduled_strength_counts_steps():
    seen = []
    model, _ = held(gaussian(3, 7), strength=lambda step: seen.append(step) or 0.1 * step)
    optimizer = stiefel.optimizer(model, torch.optim.Adam, lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        (model.w.square().sum() + stiefel.penalty(model)).backward()
        optimizer.step()
    assert seen == [0, 1, 2]
    assert "steps_taken" in next(iter(optimizer.state_dict()["state"].values()))
