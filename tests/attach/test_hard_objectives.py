"""Objectives at which a solver could go wrong: huge values, linear and differentiating losses, mixed numbers, ends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import stiefel

DOUBLE = torch.float64


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_huge_start_does_not_hide_the_minimum(seed, second_order):
    """The energy of points on a sphere, Σ ‖x_i − x_j‖^{−24}: 1e9 and more at a start where two are near."""
    net = nn.ParameterDict({"X": gaussian(20, 3, seed=seed)})
    stiefel.constrain(net, "retraction", layers=["X"], group_size=1)
    pairs = torch.triu_indices(20, 20, 1)

    def energy() -> Tensor:
        return (net["X"][pairs[0]] - net["X"][pairs[1]]).square().sum(-1).pow(-12).sum()

    start = float(energy().detach())
    found = stiefel.minimize(net, energy, second_order=second_order, tol=1e-6)
    assert found.converged, found.message
    assert found.loss < min(9000, start)


def test_a_huge_trial_does_not_either():
    """A step over a wall of 1e14 is no measure of the rounding of the values before it."""
    net = nn.ParameterDict({"x": torch.full((1,), -10.0, dtype=DOUBLE), "y": gaussian(20, seed=11)})

    def loss() -> Tensor:
        x, y = net["x"], net["y"]
        return (-x + 1e14 * torch.relu(x).square()).sum() + (0.01 * y.square() + 0.5 * torch.sin(4 * y).square()).sum()

    seen: list[float] = []
    found = stiefel.minimize(net, loss, callback=lambda m: seen.append(m.loss))
    assert found.loss <= min(seen) + 1e-9
    assert found.loss == float(loss().detach())


def test_free_numbers_may_be_far_away():
    net = nn.ParameterDict({"x": torch.zeros(1, dtype=DOUBLE)})
    found = stiefel.minimize(net, lambda: (net["x"] - 1e5).square().sum(), second_order=True)
    assert found.converged
    assert found.evaluations < 100
    assert net["x"].item() == pytest.approx(1e5)


@pytest.mark.parametrize("shape", [(5, 5), (3, 8)])
@pytest.mark.parametrize("second_order", [False, True])
def test_a_linear_loss_bends_with_its_set(shape, second_order):
    a = gaussian(*shape, seed=1)
    net = stiefel.constrain(nn.ParameterDict({"W": a + gaussian(*shape, seed=2)}), "retraction", layers=["W"])
    found = stiefel.minimize(net, lambda: -(net["W"] * a).sum(), second_order=second_order)
    assert found.converged
    assert found.gradient_norm <= 1e-8
    if shape[0] < shape[1]:  # square ones have several components, with a maximum each
        assert found.loss == pytest.approx(-float(torch.linalg.svdvals(a).sum()), rel=1e-12)


def test_a_linear_loss_of_free_numbers_is_refused():
    net = nn.ParameterDict({"x": torch.zeros(3, dtype=DOUBLE)})
    with pytest.raises(stiefel.ObjectiveError, match="differentiable twice"):
        stiefel.minimize(net, lambda: net["x"].sum(), second_order=True)


def test_a_loss_may_differentiate_itself():
    net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    stiefel.constrain(net, "own", layers=["0"])
    x = torch.linspace(0, 1, 20, dtype=DOUBLE)[:, None].requires_grad_()

    def residual() -> Tensor:
        u = net(x)
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return (du + u).square().mean() + (u[0] - 1).square().sum()

    assert stiefel.minimize(net, residual, tol=1e-4, max_evaluations=500).loss < 1e-3


@pytest.mark.parametrize("second_order", [False, True])
def test_real_and_complex_blocks_together(second_order):
    net = nn.ParameterDict({"W": gaussian(1, 3), "z": gaussian(2, dtype=torch.complex128)})
    stiefel.constrain(net, "retraction", layers=["W"])
    found = stiefel.minimize(
        net, lambda: net["W"].pow(4).sum() + (net["z"] - 1).abs().square().sum(), second_order=second_order
    )
    assert found.converged
    assert found.loss == pytest.approx(1 / 3)


@pytest.mark.parametrize("method", ["own", "retraction", "cayley"])
@pytest.mark.parametrize("second_order", [False, True])
def test_the_callback_comes_once_a_step_with_the_module_there(method, second_order):
    a = gaussian(6, 6, seed=1)
    net = stiefel.constrain(
        nn.ParameterDict({"W": gaussian(6, 6, seed=2)}), method, layers=["W"], **stiefel.get(method).comparison
    )

    def loss() -> Tensor:
        return ((net["W"] @ a).pow(4)).sum()

    told: list[tuple[int, float, float, float]] = []

    def callback(so_far: stiefel.Minimum) -> None:
        state = {k: v.clone() for k, v in net.state_dict().items()}
        twin = stiefel.constrain(
            nn.ParameterDict({"W": torch.eye(6, dtype=DOUBLE)}), method, layers=["W"], **stiefel.get(method).comparison
        )
        twin.load_state_dict(state)
        saved = ((twin["W"] @ a).pow(4)).sum().item()
        told.append((so_far.steps, so_far.loss, float(loss().detach()), saved))

    found = stiefel.minimize(net, loss, callback=callback, second_order=second_order)
    assert [t[0] for t in told] == list(range(1, found.steps + 1))
    for _, so_far, there, saved in told:
        assert there == pytest.approx(so_far, rel=1e-10)
        assert saved == pytest.approx(so_far, rel=1e-8)


@pytest.mark.parametrize("truth", [True, torch.tensor(True)])
def test_any_truth_ends_it(truth):
    net = stiefel.constrain(nn.ParameterDict({"W": gaussian(3, 6)}), "retraction", layers=["W"])
    a = gaussian(6, 6, seed=1)
    found = stiefel.minimize(net, lambda: (net["W"] @ a).pow(4).sum(), callback=lambda m: truth)
    assert found.steps == 1
    assert "callback" in found.message


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("most", [1, 2, 3, 5, 10])
def test_no_more_evaluations_than_allowed_and_the_message_says_so(most, second_order):
    net, calls = nn.ParameterDict({"x": torch.full((1,), 1e-3, dtype=DOUBLE), "y": gaussian(5)}), []

    def loss() -> Tensor:
        calls.append(1)
        return net["x"].square().sum() + net["y"].pow(4).sum()

    found = stiefel.minimize(net, loss, max_evaluations=most, second_order=second_order)
    assert not found.converged
    assert "evaluations have not been enough" in found.message
    assert found.evaluations >= len(calls)
    assert len(calls) <= most + second_order  # a product with the Hessian needs the loss there first


def test_a_slow_fall_is_no_standstill(monkeypatch):
    """A gradient that falls by 2 % a step has fallen by far more than a tenth in a hundred."""
    from stiefel.attach.minimize import _Watch
    from stiefel.optim.solve.objective import Point

    class Spare:
        spent, evaluations = False, 0

    watch = _Watch(Spare(), 0.0, None, None)
    for k in range(1000):
        assert watch(Point([], 1.0, [], [], 0.98**k, 0.0, 1e-15)), watch.stopped


def test_a_float32_weight_is_rounded_as_float32_whatever_the_loss():
    net = nn.ParameterDict({"W": gaussian(5, 30).float()})
    stiefel.constrain(net, "retraction", layers=["W"])
    a = gaussian(30, 30, seed=1)
    found = stiefel.minimize(net, lambda: -((net["W"].double() @ (a @ a.mT)) * net["W"].double()).sum())
    assert "rounding" in found.message
    assert found.gradient_norm < 2e-6 * abs(found.loss)


def test_a_loss_that_hardly_differs_from_call_to_call_is_refused():
    net = nn.ParameterDict({"W": gaussian(5, 30).float()})
    generator = torch.Generator().manual_seed(0)

    def loss() -> Tensor:
        return net["W"].pow(4).sum() * (1 + 1e-3 * torch.rand((), generator=generator))

    with pytest.raises(stiefel.ObjectiveError, match="at the same point"):
        stiefel.minimize(net, loss)


@pytest.mark.parametrize("method", ["own", "cayley", "matrix_exp", "retraction"])
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers_compute_any_number_of_times(kind, method):
    torch.manual_seed(0)
    layer = stiefel.constrain(kind(4, 6).double(), method, layers=["weight_hh_l0"])
    x = gaussian(5, 2, 4)
    with torch.no_grad():
        first = layer(x)[0]
        torch.testing.assert_close(layer(x)[0], first)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x)[0].clone(), first)
    losses = [lambda: layer(x)[0].square().sum() + layer(x)[0].sum()]
    assert stiefel.gradient_norm(layer, losses[0]) > 0
    found = stiefel.minimize(layer, losses[0], tol=1e-3, max_evaluations=40)
    assert found.steps > 1
    assert float(losses[0]().detach()) == pytest.approx(found.loss, rel=1e-9)
