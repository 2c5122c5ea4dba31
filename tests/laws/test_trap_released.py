"""Traps 3 to 5, of released code: what ``X ← R_X(−η grad)`` is, against baselines and geoopt as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from traps import (
    EPS,
    IN_PLACE,
    MANIFOLD,
    SHAPES,
    STEPPED,
    VARIANTS,
    gaussian,
    generator,
    linear,
    orthonormal,
    over,
    residual,
    step_once,
    sym,
    tangent,
)

import stiefel
from stiefel.attach.weights import bindings_of
from stiefel.compat.geoopt import geoopt
from stiefel.constraint import Tally
from stiefel.layout import Layout


@over("method", VARIANTS)
def test_trap_03_training_starts_on_the_set(method: stiefel.Constraint) -> None:
    for shape in SHAPES.values():
        uniform = (torch.rand(*shape, generator=generator(0), dtype=torch.float64) * 2 - 1) / shape[1] ** 0.5
        assert residual(uniform) > 0.1
        layer = linear(uniform, method, scale=2.0)
        assert residual(layer.weight, scale=2.0) < 64 * EPS
        outputs = layer(torch.eye(shape[1], dtype=torch.float64))
        assert torch.equal(outputs, layer.weight.mT)  # and it is what the layer computes with


@over("method", IN_PLACE)
def test_trap_03_a_step_has_the_current_gradient_and_the_rate_as_set(method: stiefel.Constraint) -> None:
    for shape in SHAPES.values():
        layer = linear(gaussian(*shape), method)
        optimizer = stiefel.optimizer(layer, torch.optim.SGD, lr=0.2)
        layer.weight.grad = gaussian(*shape, seed=1)
        optimizer.step()
        between, taken = layer.weight.detach().clone(), tally(layer).steps
        optimizer.zero_grad()
        (group,) = optimizer.param_groups
        group["lr"] /= 2
        second = gaussian(*shape, seed=2)
        layer.weight.grad = second.clone()
        torch.manual_seed(0)
        optimizer.step()
        assert torch.equal(layer.weight.grad, second)

        fresh = linear(gaussian(*shape), method)
        with torch.no_grad():
            fresh.weight.copy_(between)
        tally(fresh).steps = taken  # on which a method's draws depend
        assert torch.equal(layer.weight, step_once(fresh, torch.optim.SGD, second, lr=0.1))


def tally(layer: nn.Module) -> Tally:
    return bindings_of(layer)["weight"].tally


def qf(a: Tensor) -> Tensor:
    q, r = torch.linalg.qr(a.mT)
    return (q * r.diagonal().sign()).mT


def ei_qr(x: Tensor, g: Tensor, lr: float) -> Tensor:
    return qf(x - lr * (g - sym(g @ x.mT) @ x))


def ci_qr(x: Tensor, g: Tensor, lr: float) -> Tensor:
    return qf(x - lr * (g - x @ g.mT @ x))


def cay_t(x: Tensor, g: Tensor, lr: float) -> Tensor:
    a, eye = g.mT @ x - x.mT @ g, torch.eye(x.shape[1], dtype=x.dtype)
    return x @ (eye + lr / 2 * a) @ torch.linalg.inv(eye - lr / 2 * a)


@pytest.mark.parametrize(
    ("metric", "retraction", "formula"),
    [("euclidean", "qr", ei_qr), ("canonical", "qr", ci_qr), ("canonical", "cayley", cay_t)],
    ids=["EI+QR", "CI+QR", "CayT"],
)
def test_trap_03_the_papers_baselines_follow_their_formulas_in_every_layer(
    metric: str, retraction: str, formula: Callable[..., Tensor]
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    stiefel.constrain(model, "riemannian", metric=metric, retraction=retraction)
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.4)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)  # the paper halves its rates
    layers = [model[0], model[2], model[4]]
    expected = [layer.weight.detach().clone() for layer in layers]
    for step in range(4):
        optimizer.zero_grad()
        (model(gaussian(8, 7, seed=step)) - 1).square().sum().backward()
        expected = [formula(x, layer.weight.grad, 0.4 / 2**step) for x, layer in zip(expected, layers, strict=True)]
        optimizer.step()
        schedule.step()
        for layer, x in zip(layers, expected, strict=True):
            torch.testing.assert_close(layer.weight.detach(), x, rtol=0, atol=1e-12)


@over("method", MANIFOLD)
@pytest.mark.parametrize("map_name", ["retr", "expmap"])
def test_trap_04_a_retraction_moves_along_its_tangent(method: stiefel.ManifoldMethod, map_name: str) -> None:
    for shape in SHAPES.values():
        manifold = method.manifold(Layout(shape))
        x, u = orthonormal(*shape), gaussian(*shape, seed=1)
        u = manifold.proju(x, u / u.norm())
        for t in (1e-2, 1e-3, 1e-4):
            # The second derivative of all these curves is at most ‖u‖² ≤ 1; a slope error leaves a term of order t.
            moved = getattr(manifold, map_name)(x, t * u)
            assert (moved - x - t * u).norm() < t**2
            assert residual(moved) < 64 * EPS


@over("method", MANIFOLD)
def test_trap_04_proju_is_the_projection_and_the_gradient_is_the_metrics(method: stiefel.ManifoldMethod) -> None:
    for shape in SHAPES.values():
        manifold = method.manifold(Layout(shape))
        x, u, v = orthonormal(*shape), gaussian(*shape, seed=1), gaussian(*shape, seed=2)
        once = manifold.proju(x, u)
        close = {"rtol": 0, "atol": 1e-13}
        torch.testing.assert_close(manifold.proju(x, once), once, **close)
        rows, of_rows = (x, once) if shape[0] <= shape[1] else (x.mT, once.mT)
        torch.testing.assert_close(sym(of_rows @ rows.mT), torch.zeros(len(rows), len(rows)).double(), **close)
        # Orthogonal in the metric: what is cut off has no product with any tangent. And ⟨grad, ξ⟩ = tr(Gᵀξ) for each ξ.
        xi = manifold.proju(x, v)
        torch.testing.assert_close(manifold.inner(x, u - once, xi), torch.zeros(()).double(), **close)
        torch.testing.assert_close(manifold.inner(x, manifold.egrad2rgrad(x, u), xi), (u * xi).sum(), **close)


def test_trap_04_the_canonical_exponential_is_the_geodesic_and_not_its_cayley_approximation() -> None:
    x, t = orthonormal(3, 6), 2.0
    u = t * tangent(x, 1)
    b = u - 0.5 * u @ x.mT @ x
    a = x.mT @ b - b.mT @ x  # skew, with X A = U
    manifold = stiefel.get("riemannian", metric="canonical").manifold(Layout((3, 6)))
    torch.testing.assert_close(manifold.expmap(x, u), x @ torch.linalg.matrix_exp(a), rtol=0, atol=1e-13)
    eye = torch.eye(6, dtype=torch.float64)
    cayley = x @ torch.linalg.solve(eye - a / 2, eye + a / 2)
    assert (cayley - x @ torch.linalg.matrix_exp(a)).norm() > 0.01
    manifold = geoopt.CanonicalStiefel()
    xc, u = x.mT, u.mT
    torch.testing.assert_close(manifold.expmap(xc, u), manifold.retr(xc, u), rtol=0, atol=0)  # the peer's


def climb(weight: nn.Parameter, optimizer: torch.optim.Optimizer, target: Tensor, steps: int) -> None:
    """Maximize ⟨W, T⟩, whose largest value on the set is the sum of T's singular values."""
    for _ in range(steps):
        weight.grad = -target.clone()
        optimizer.step()


@over("method", MANIFOLD)
def test_trap_04_stabilize_with_momentum_converges(method: stiefel.ManifoldMethod) -> None:
    layer, target = linear(gaussian(4, 6), method), gaussian(4, 6, seed=2)
    optimizer = stiefel.optimizer(layer, torch.optim.SGD, lr=0.05, momentum=0.9, stabilize=2)
    climb(layer.weight, optimizer, target, 300)
    assert residual(layer.weight) < 64 * EPS
    assert (layer.weight * target).sum() > (1 - 1e-6) * torch.linalg.svdvals(target).sum()
    assert optimizer.state[layer.weight]["momentum_buffer"].norm() < 1e-2  # at the maximum the gradient vanishes


def test_trap_04_peer_geoopt_has_these_faults() -> None:
    manifold = geoopt.CanonicalStiefel()
    x = orthonormal(6, 4)  # geoopt's are columns
    u = tangent(x.mT, 1).mT
    along_span = x @ x.mT @ u
    t = 1e-4
    wrong = manifold.retr(x, t * u) - x - t * u
    torch.testing.assert_close(wrong / t, along_span, rtol=0, atol=1e-3)
    torch.testing.assert_close(manifold.proju(x, u) - u, along_span, rtol=0, atol=1e-13)
    weight, target = geoopt.ManifoldParameter(x, manifold=manifold), gaussian(6, 4, seed=2)
    optimizer = geoopt.optim.RiemannianSGD([weight], lr=0.05, momentum=0.9, stabilize=2)
    climb(weight, optimizer, target, 100)
    assert not optimizer.state[weight]["momentum_buffer"].norm() < 1e6


@pytest.mark.sampled(3)
@over("method", VARIANTS)
@pytest.mark.parametrize("nesterov", [False, True])
def test_trap_05_the_first_step_with_momentum_is_the_plain_one(method: stiefel.Constraint, nesterov: bool) -> None:
    def first_step(shape: tuple[int, int], lr: float, **hyper: Any) -> Tensor:
        layer = linear(orthonormal(*shape), method, scale=1.5)
        optimizer = stiefel.optimizer(layer, torch.optim.SGD, lr=lr, **hyper)
        (layer.weight * gaussian(*shape, seed=1)).sum().backward()
        torch.manual_seed(0)
        optimizer.step()
        return layer.weight.detach()

    lr = 0.02
    # torch's nesterov steps by g + μ·m, m = g at first; where only the direction counts, a step is lr long anyway.
    same = lr * 1.9 if nesterov and not method.step_length else lr
    for shape in SHAPES.values():
        first = first_step(shape, lr, momentum=0.9, nesterov=nesterov)
        torch.testing.assert_close(first, first_step(shape, same), rtol=0, atol=1e-13)
        assert (first - 1.5 * orthonormal(*shape)).norm() > 1e-5


@over("method", VARIANTS)
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_trap_05_a_step_leaves_every_gradient_as_it_was(method: stiefel.Constraint, name: str) -> None:
    layer = linear(gaussian(4, 7), method, scale=2.0)
    cls, hyper = (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}) if name == "sgd" else (torch.optim.Adam, {})
    optimizer = stiefel.optimizer(layer, cls, lr=0.1, weight_decay=0.1, **hyper)
    for _ in range(2):
        optimizer.zero_grad()
        ((layer.weight * gaussian(4, 7, seed=1)).sum() + stiefel.penalty(layer)).backward()
        before = [(p.grad, p.grad.clone()) for p in layer.parameters()]
        optimizer.step()
        for p, (grad, value) in zip(layer.parameters(), before, strict=True):
            assert p.grad is grad
            assert torch.equal(grad, value)


@contextmanager
def overwriting_conversions() -> Iterator[None]:
    """``module.double()`` puts new parameters in the place of the old ones, as some wrappers of modules do."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def lose_class(p: nn.Parameter) -> None:
    p.__class__ = nn.Parameter
    for attribute in list(vars(p)):
        delattr(p, attribute)


LOSSES = ["then our optimizer", "our optimizer re-pointed", "then a plain optimizer", "class changed in place"]


@over("method", [m for m in STEPPED if m == stiefel.get(m.name)])
@pytest.mark.parametrize("how", LOSSES)
def test_trap_05_no_silent_euclidean_step_on_a_parameter_that_lost_its_class(
    method: stiefel.Constraint, how: str
) -> None:
    converted = how != "class changed in place"
    layer = linear(gaussian(4, 7), method, torch.float32 if converted else torch.float64)
    optimizer = stiefel.optimizer(layer, torch.optim.SGD, lr=0.1)
    if converted:
        with overwriting_conversions():
            layer.double()
    else:
        lose_class(layer.weight)
    assert type(layer.weight) is nn.Parameter
    if how == "then our optimizer":
        optimizer = stiefel.optimizer(layer, torch.optim.SGD, lr=0.1)
    elif how == "then a plain optimizer":
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    elif how == "our optimizer re-pointed":  # what wrappers that shard or move a model do
        optimizer.param_groups[0]["params"] = list(layer.parameters())
    start = layer.weight.detach().clone()
    g = gaussian(4, 7, seed=1)
    (layer(torch.eye(7, dtype=torch.float64)) * g.mT).sum().backward()
    torch.manual_seed(0)
    try:
        optimizer.step()
    except stiefel.OptimizerError:
        assert torch.equal(layer.weight, start)
        return
    reference = linear(gaussian(4, 7), method)
    with torch.no_grad():
        reference.weight.copy_(start)
    expected = step_once(reference, torch.optim.SGD, g, lr=0.1)
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=0, atol=1e-12)


def test_trap_05_peer_geoopt_has_these_faults() -> None:
    x = orthonormal(6, 4)
    g = tangent(x.mT, 1).mT

    def first_step(**hyper: Any) -> tuple[Tensor, Tensor]:
        weight = geoopt.ManifoldParameter(x.clone(), manifold=geoopt.EuclideanStiefel())
        optimizer = geoopt.optim.RiemannianSGD([weight], lr=1e-4, **hyper)
        weight.grad = g.clone()
        optimizer.step()
        return (weight.detach() - x).norm() / 1e-4, weight.grad

    for hyper, length in (({}, 1.0), ({"momentum": 0.9}, 1.9), ({"momentum": 0.9, "nesterov": True}, 2.71)):
        assert first_step(**hyper)[0].item() == pytest.approx(length, rel=1e-3)
    assert not torch.equal(first_step(weight_decay=0.1)[1], g)

    module = nn.Module()
    module.weight = geoopt.ManifoldParameter(x.float(), manifold=geoopt.Stiefel())
    with overwriting_conversions():
        module.double()
    optimizer = geoopt.optim.RiemannianSGD(module.parameters(), lr=1.0)
    module.weight.grad = gaussian(6, 4, seed=1)
    optimizer.step()
    assert residual(module.weight) > 1
