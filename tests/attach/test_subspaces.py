"""``subspace=True``: only the span of a weight's rows matters, and steps turn nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import stiefel
from stiefel.linalg import project_horizontal, with_horizontal_gradient
from stiefel.measure import principal_angles

METHODS = [m for m in stiefel.available() if not m.startswith("test_")]
HELD = [m for m in METHODS if stiefel.get(m).claim is not None]
FEASIBLE = [m for m in METHODS if stiefel.get(m).feasible]
DOUBLE = torch.float64
SHAPES = {"rows": (3, 9), "columns": (9, 3), "batch": (4, 3, 9)}


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def option(method: str) -> dict[str, object]:
    return dict(stiefel.get(method).comparison)


def model(method: str, shape: tuple[int, ...], **more: object) -> nn.ParameterDict:
    net = nn.ParameterDict({"W": gaussian(*shape)})
    return stiefel.constrain(net, method, layers=["W"], subspace=True, **option(method), **more)  # type: ignore


def points(net: nn.Module) -> Tensor:
    return next(stiefel.attach.constrained_weights(net)).points().detach().clone()


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("choice", ["SGD", "Adam"])
@pytest.mark.parametrize("method", [m for m in FEASIBLE if stiefel.get(m).moves])
def test_a_small_step_does_not_turn_the_rows_within_their_span(method, choice, shape, scale):
    """X₁ X₀ᵀ of a horizontal step is I to second order; that of a tangent one is I plus a skew matrix of first order.

    Adam divides entry by entry, and what it makes of a horizontal gradient is not horizontal.
    """
    if method in ("manifold_muon", "rsdm"):
        pytest.skip("makes other tangents of a horizontal displacement")
    net = model(method, SHAPES[shape], scale=scale)
    target, cls = gaussian(*SHAPES[shape], seed=1), getattr(torch.optim, choice)
    optimizer = stiefel.optimizer(net, cls, lr=1e-5)
    for _ in range(3):
        before = points(net)
        optimizer.zero_grad()
        (net["W"] * target).sum().backward()
        optimizer.step()
        after = points(net)
        inside = (after - before) @ before.mT
        assert torch.linalg.norm(inside) <= 1e-3 * torch.linalg.norm(after - before)
        assert torch.linalg.norm(after - before) > 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", [m for m in HELD if not stiefel.get(m).moves])
def test_proxies_get_the_gradient_of_the_horizontal_part(method, shape):
    """What their optimizers make of it moves proxies, whose rows may then turn within their span."""
    net, g = model(method, SHAPES[shape], scale=3.0), gaussian(*SHAPES[shape], seed=1)
    twin = nn.ParameterDict({"W": gaussian(*SHAPES[shape])})
    stiefel.constrain(twin, method, layers=["W"], scale=3.0, **option(method))
    (net["W"] * g).sum().backward()
    layout = next(stiefel.attach.constrained_weights(net)).binding.layout
    (twin["W"] * layout.tensor(project_horizontal(points(net), layout.matrices(g)))).sum().backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-11)


def test_identity_with_a_horizontal_gradient_to_any_order():
    x = torch.linalg.qr(gaussian(2, 7, 3))[0].mT.requires_grad_()
    g = gaussian(2, 3, 7, seed=1).requires_grad_()
    y = with_horizontal_gradient(x)
    assert torch.equal(y, x)
    (found,) = torch.autograd.grad(y, x, g, create_graph=True)
    torch.testing.assert_close(found, project_horizontal(x, g), rtol=0, atol=1e-14)
    u = gaussian(2, 3, 7, seed=2)
    seconds = torch.autograd.grad((found * u).sum(), (x, g))
    expected = torch.autograd.grad((project_horizontal(x, g) * u).sum(), (x, g))
    for a, b in zip(seconds, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def leading(n: int, p: int, gap: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A symmetric matrix and its p leading eigenvectors as rows."""
    q = torch.linalg.qr(gaussian(n, n, seed=seed))[0]
    values = torch.cat([torch.linspace(2, 1 + gap, p, dtype=DOUBLE), torch.linspace(1, 0.1, n - p, dtype=DOUBLE)])
    return q @ torch.diag(values) @ q.mT, q[:, :p].mT


@pytest.mark.sampled(3)
@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("method", FEASIBLE)
def test_minimize_finds_the_subspace(method, second_order):
    a, solution = leading(40, 4, gap=0.2)
    net = model(method, (4, 40))
    found = stiefel.minimize(net, lambda: -((net["W"] @ a) * net["W"]).sum(), second_order=second_order)
    assert found.converged
    assert found.evaluations < 300
    assert principal_angles(net["W"].detach().mT, solution.mT).max() < 1e-7
    assert stiefel.gradient_norm(net, lambda: -((net["W"] @ a) * net["W"]).sum()) <= 1e-8


def test_second_order_takes_about_as_many_products_with_directions_of_no_curvature_as_without():
    """Along rotations of the rows within their span the loss is constant, and the Hessian singular."""
    totals = {True: 0, False: 0}
    for seed in range(5):
        a, _ = leading(30, 6, gap=1e-3, seed=seed)
        for subspace in totals:
            net = nn.ParameterDict({"W": gaussian(6, 30, seed=seed)})
            stiefel.constrain(net, "retraction", layers=["W"], subspace=subspace)
            found = stiefel.minimize(net, lambda: -((net["W"] @ a) * net["W"]).sum(), second_order=True)  # noqa: B023
            assert found.converged
            totals[subspace] += found.evaluations
    assert totals[True] <= 1.2 * totals[False], totals


@pytest.mark.parametrize("method", FEASIBLE)
def test_the_gradients_norm_is_that_of_the_part_that_turns_the_span(method):
    net, target = model(method, (3, 9)), gaussian(3, 9, seed=1)
    expected = torch.linalg.norm(project_horizontal(net["W"].detach(), target)).item()
    assert stiefel.gradient_norm(net, lambda: (net["W"] * target).sum()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.sampled(3, values=False)
@pytest.mark.parametrize("method", HELD)
def test_training_reaches_the_subspace_and_keeps_the_claim(method):
    method_ = stiefel.get(method)
    if method_.caveat or method_.step_length:
        pytest.skip("stops short of optima with a rate that does not fall")
    a, solution = leading(20, 3, gap=0.5)
    net = model(method, (3, 20))
    optimizer = stiefel.optimizer(net, torch.optim.SGD, lr=0.05, momentum=0.9)
    for _ in range(600):
        optimizer.zero_grad()
        (-((net["W"] @ a) * net["W"]).sum()).backward()
        optimizer.step()
    assert principal_angles(net["W"].detach().mT, solution.mT).max() < 1e-5
    assert all(w.allows(w.residual()) for w in stiefel.attach.constrained_weights(net))


def test_lbfgs_of_torch_takes_horizontal_gradients():
    a, solution = leading(20, 3, gap=0.5)
    net = model("retraction", (3, 20))
    optimizer = stiefel.optimizer(net, torch.optim.LBFGS, max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -((net["W"] @ a) * net["W"]).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert principal_angles(net["W"].detach().mT, solution.mT).max() < 1e-4


@pytest.mark.parametrize("method", ["own", "retraction", "riemannian"])
def test_it_is_told_copied_saved_and_released(method):
    net = model(method, (3, 9))
    assert next(stiefel.attach.constrained_weights(net)).binding.constraint.subspace
    twin = copy.deepcopy(net)
    with torch.no_grad():
        assert torch.equal(twin["W"], net["W"])
    other = stiefel.constrain(nn.ParameterDict({"W": gaussian(3, 9, seed=5)}), "retraction", layers=["W"])
    other.load_state_dict(net.state_dict())
    torch.testing.assert_close(other["W"].detach(), net["W"].detach(), rtol=0, atol=1e-14)
    assert type(stiefel.release(net)["W"]) is nn.Parameter


def test_orthogonalize_takes_it_under_vmap_too():
    v, g = gaussian(5, 3, 9), gaussian(5, 3, 9, seed=1)

    def turned(v: Tensor) -> Tensor:
        return stiefel.orthogonalize(v, subspace=True)

    def gradient(v: Tensor, g: Tensor) -> Tensor:
        return torch.func.grad(lambda v: (turned(v) * g).sum())(v)

    each = torch.stack([gradient(a, b) for a, b in zip(v, g, strict=True)])
    torch.testing.assert_close(torch.func.vmap(gradient)(v, g), each, rtol=0, atol=1e-13)
    x = turned(v)
    plain = torch.func.grad(lambda v: (stiefel.orthogonalize(v) * project_horizontal(x, g)).sum())(v)
    torch.testing.assert_close(each, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", HELD)
def test_what_spans_everything_or_nothing_is_refused(method):
    with pytest.raises(stiefel.LayoutError, match="p < n"):
        stiefel.constrain(nn.Linear(4, 4), method, subspace=True)
    for wrong in (1, "yes", None):
        with pytest.raises(stiefel.OptionError, match="subspace"):
            stiefel.get(method, subspace=wrong)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in HELD])
def test_methods_that_hold_no_set_refuse_a_subspace(method):
    with pytest.raises(stiefel.OptionError, match="rows that span a subspace"):
        stiefel.get(method, subspace=True)


def test_measures_leave_out_what_turns_within_the_span():
    net = stiefel.constrain(nn.Linear(9, 3, bias=False).double(), "retraction", subspace=True)
    target = gaussian(3, 9, seed=1)

    def loss(layer: nn.Module) -> Tensor:
        return (layer.weight * target).sum() + (layer.weight * target).square().sum()

    x = net.weight.detach().clone().requires_grad_()
    (g,) = torch.autograd.grad((x * target).sum() + (x * target).square().sum(), x)
    horizontal = project_horizontal(x.detach()[None], g[None])[0]
    found = stiefel.measure.dependence(net, loss)
    torch.testing.assert_close(found.gradient[0], torch.linalg.norm(horizontal) / torch.linalg.norm(x.detach()))
    (rate,) = stiefel.measure.effective_rates(net, loss).values()
    assert abs(rate - 1) < 1e-6
