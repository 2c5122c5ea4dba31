"""Thirteen traps into which released implementations have fallen, each as a test that this library does not.

A comment above the tests of each trap says who has the fault; where that package is among the test extras, a test named
``..._peer_...`` shows it there. Methods come from the catalogue, each with its defaults and with every form of it that
has a name. Tolerances are those of rounding, and far from what the fault would leave.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from common import Largest, forms
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import orthogonal
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import stiefel
from stiefel.compat.geoopt import geoopt
from stiefel.layout import Layout

EPS = torch.finfo(torch.float64).eps


VARIANTS = [m for name in stiefel.available() for m in forms(name, **stiefel.get(name).comparison)]
"""Every method, uncentred so that all have one set, and every form of it that has a name."""
HELD = [m for m in VARIANTS if m.claim is not None]
FORWARD = [m for m in VARIANTS if m.place == "forward"]
HELD_FORWARD = [m for m in FORWARD if m.claim is not None]
IN_PLACE = [m for m in VARIANTS if m.place != "forward"]
STEPPED = [m for m in VARIANTS if m.place == "step"]
LIFTED = [m for m in STEPPED if m.lifts]
MANIFOLD = [m for m in STEPPED if isinstance(m, stiefel.ManifoldMethod)]
PENALTIES = [m for m in VARIANTS if m.place == "loss"]

SHAPES = {"wide": (3, 5), "square": (4, 4), "tall": (5, 3)}
"""Of weights: orthonormal rows, both, orthonormal columns."""


# --- helpers ---


def over(name: str, methods: list[stiefel.Constraint]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(name, methods, ids=str)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def orthonormal(out: int, inputs: int, seed: int = 0) -> Tensor:
    """A random weight with orthonormal rows or columns, whichever are fewer."""
    u, _, vh = torch.linalg.svd(gaussian(out, inputs, seed=seed), full_matrices=False)
    return u @ vh


def with_singular_values(out: int, inputs: int, low: float, high: float, seed: int = 0) -> Tensor:
    u, _, vh = torch.linalg.svd(gaussian(out, inputs, seed=seed), full_matrices=False)
    return (u * torch.linspace(low, high, min(out, inputs), dtype=u.dtype)) @ vh


def linear(
    weight: Tensor, method: stiefel.Constraint, dtype: torch.dtype = torch.float64, scale: float | None = None
) -> nn.Linear:
    """A Linear layer without a bias whose weight was ``weight`` before it was constrained."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return stiefel.constrain(layer, method if scale is None else replace(method, scale=scale))


def trained_tensor(layer: nn.Module) -> Tensor:
    """What the optimizer steps in the place of the weight: itself, or its proxy."""
    return layer.parametrizations.weight.original if hasattr(layer, "parametrizations") else layer.weight


def residual(weight: Tensor, scale: float = 1.0) -> float:
    """‖XXᵀ − I‖_F/√p on the smaller side, the worst of a batch, by definition."""
    x = weight.detach().double() / scale
    x = x if x.shape[-2] <= x.shape[-1] else x.mT
    gram = x @ x.mT - torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    return (torch.linalg.matrix_norm(gram).max() / x.shape[-2] ** 0.5).item()


def holds(method: stiefel.Constraint, weight: Tensor, scale: float = 1.0) -> bool:
    """Whether a weight is as orthogonal as its method claims."""
    return method.claim.allows(residual(weight, scale), weight.dtype, min(weight.shape[-2:]))


def sym(a: Tensor) -> Tensor:
    return (a + a.mT) / 2


def skew(a: Tensor) -> Tensor:
    return (a - a.mT) / 2


def step_once(layer: nn.Module, cls: type[torch.optim.Optimizer], gradient: Tensor, **hyper: Any) -> Tensor:
    """The weight after one step of a new optimizer on an in-place constrained weight."""
    optimizer = stiefel.optimizer(layer, cls, **hyper)
    layer.weight.grad = gradient.clone()
    torch.manual_seed(0)  # a method may draw
    optimizer.step()
    return layer.weight.detach().clone()


def adam_with_decay(method: stiefel.Constraint) -> type[torch.optim.Optimizer]:
    """AdamW where the method takes it; geoopt's Adam has no decoupled decay."""
    return torch.optim.Adam if isinstance(method, stiefel.ManifoldMethod) else torch.optim.AdamW


# --- 1: gradients at an orthonormal start ---
#
# The author's PyTorch OWN differentiates through eigh or svd, whose derivative has 1/(λ_i − λ_j): NaN, or wrong, at an
# orthonormal proxy, which is where training starts. SRIP's released power iteration divides by ‖Hv‖, 0 there.


class Weight(nn.Module):
    """Calls nothing but a layer's weight, so that functional_call can replace what is trained."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> Tensor:
        return self.layer.weight


def weight_function(layer: nn.Module) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The weight as a function of everything trained, and the values that these have now."""
    module = Weight(layer)
    names, values = zip(*module.named_parameters(), strict=True)

    def weight(*v: Tensor) -> Tensor:
        return functional_call(module, dict(zip(names, v, strict=True)), ())

    return weight, tuple(v.detach().clone().requires_grad_() for v in values)


def starts(shape: tuple[int, int]) -> dict[str, Tensor]:
    eye = torch.eye(*shape, dtype=torch.float64)
    return {"random": orthonormal(*shape), "identity": eye, "reflection": -eye.flip(1)}


@over("method", HELD_FORWARD)
@pytest.mark.parametrize("start", ["random", "identity", "reflection"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_trap_01_gradients_are_exact_at_orthonormal_starts(
    method: stiefel.Constraint, start: str, shape: tuple[int, int]
) -> None:
    weight, values = weight_function(linear(starts(shape)[start], method))
    torch.testing.assert_close(weight(*values).detach(), starts(shape)[start], rtol=0, atol=64 * EPS)
    h = 1e-5
    for seed in (1, 2):
        g = gaussian(*shape, seed=seed)
        grads = torch.autograd.grad((weight(*values) * g).sum(), values)
        along = [gaussian(*v.shape, seed=seed + 2) for v in values]
        with torch.no_grad():
            ahead, behind = (weight(*(v + t * d for v, d in zip(values, along, strict=True))) for t in (h, -h))
        measured = ((ahead - behind) * g).sum() / (2 * h)
        # Central differences: truncation h² = 1e-10, rounding eps/h = 2e-11, times derivatives of order 10 to 100.
        expected = sum((d * a).sum() for d, a in zip(grads, along, strict=True))
        torch.testing.assert_close(measured, expected, rtol=0, atol=1e-7)


@over("method", [m for m in FORWARD if m.coefficients is not None])
def test_trap_01_the_first_step_is_the_tangent_one_that_the_method_declares(method: stiefel.Constraint) -> None:
    for shape in SHAPES.values():
        start, g = orthonormal(*shape), gaussian(*shape, seed=1)
        weight, values = weight_function(linear(start, method))
        grads = torch.autograd.grad((weight(*values) * g).sum(), values)
        h = 1e-5
        with torch.no_grad():
            ahead, behind = (weight(*(v - t * d for v, d in zip(values, grads, strict=True))) for t in (h, -h))
        x, g = (start, g) if shape[0] <= shape[1] else (start.mT, g.mT)
        a, b = method.coefficients
        expected = -(a * skew(g @ x.mT) @ x + b * (g - g @ x.mT @ x))
        moved = (ahead - behind) / (2 * h)
        moved = moved if shape[0] <= shape[1] else moved.mT
        scale = max(1, max(d.norm() for d in grads)) ** 3  # of the third derivative along a gradient of that length
        torch.testing.assert_close(moved, expected, rtol=0, atol=1e-8 * scale)


@over("method", [*FORWARD, *PENALTIES])
def test_trap_01_no_gradient_is_nan_where_the_gram_matrix_is_exactly_the_identity(method: stiefel.Constraint) -> None:
    for shape in SHAPES.values():
        g = gaussian(*shape, seed=1)
        layer = linear(torch.eye(*shape), method)
        ((layer.weight * g).sum() + stiefel.penalty(layer)).backward()
        grads = [p.grad for p in layer.parameters()]
        assert all(torch.isfinite(d).all() for d in grads)
        assert max(d.abs().max() for d in grads) > 0.1  # zeroing a NaN is no remedy


def test_trap_01_peer_autograd_through_eigh_is_nan_or_wrong() -> None:
    g = gaussian(4, 7, seed=1)
    for start in (torch.eye(4, 7, dtype=torch.float64), orthonormal(4, 7)):
        v = start.clone().requires_grad_()
        values, d = torch.linalg.eigh(v @ v.mT)
        ((d * values.rsqrt()) @ d.mT @ v * g).sum().backward()
        exact = g - sym(g @ start.mT) @ start
        assert not torch.allclose(v.grad, exact, rtol=0, atol=1e-3)


# --- 2: centring removes a rank ---
#
# Centred OWN with p = n cannot be orthogonal: one singular value is 0. In the released code that befalls every 100→100
# layer of the paper's MLP, and a first 3→64 3×3 convolution in groups of its fan-in, 27.

CENTRING = [name for name in stiefel.available() if "center" in {f.name for f in fields(stiefel.get(name))}]

NO_RANK_LEFT: dict[str, tuple[Callable[[], nn.Module], int | None, str]] = {
    "100 to 100": (lambda: nn.Linear(100, 100), None, "rank"),
    "groups of 27 over 27": (lambda: nn.Conv2d(3, 54, 3), 27, "rank"),
    "64 over 27": (lambda: nn.Conv2d(3, 64, 3), None, "column"),
    "one input": (lambda: nn.Linear(1, 1), None, "rank"),
}


@pytest.mark.parametrize("name", CENTRING)
@pytest.mark.parametrize("case", NO_RANK_LEFT)
def test_trap_02_centring_without_a_rank_to_spare_is_an_error(name: str, case: str) -> None:
    build, size, why = NO_RANK_LEFT[case]
    torch.manual_seed(0)
    layer = build().double()
    before = layer.weight.detach().clone()
    with pytest.raises(stiefel.LayoutError, match=f"center=True cannot hold.*{why}"):
        stiefel.constrain(layer, name, center=True, group_size=size)
    assert torch.equal(layer.weight, before)
    assert [n for n, _ in layer.named_parameters()] == ["weight", "bias"]


@pytest.mark.parametrize("name", CENTRING)
@pytest.mark.parametrize("case", NO_RANK_LEFT)
def test_trap_02_auto_does_not_centre_there_and_is_orthogonal(name: str, case: str) -> None:
    build, size, _ = NO_RANK_LEFT[case]
    torch.manual_seed(0)
    layer = stiefel.constrain(build().double(), name, group_size=size)
    rows = layer.weight.detach().flatten(1)
    rows = rows if size is None else rows.reshape(-1, size, rows.shape[1])
    assert holds(stiefel.get(name), rows)


@pytest.mark.parametrize("name", CENTRING)
@pytest.mark.parametrize(("out", "inputs", "size"), [(99, 100, None), (52, 27, 26), (5, 2, 1)])
def test_trap_02_centred_rows_are_orthonormal_up_to_the_last_rank(
    name: str, out: int, inputs: int, size: int | None
) -> None:
    torch.manual_seed(0)
    layer = stiefel.constrain(nn.Linear(inputs, out).double(), name, center=True, group_size=size)
    rows = layer.weight.detach().reshape(-1, size or out, inputs)
    assert holds(stiefel.get(name), rows)
    assert rows.sum(-1).abs().max() < 64 * EPS * math.sqrt(inputs)  # a sum of n entries of which the squares add to 1


@pytest.mark.parametrize("name", stiefel.available())
@pytest.mark.parametrize("size", [64, 32, 27])
def test_trap_02_groups_that_no_fan_in_of_27_can_hold_are_refused(name: str, size: int) -> None:
    with pytest.raises(stiefel.LayoutError, match=f"group_size={size} "):
        stiefel.constrain(nn.Conv2d(3, 64, 3), name, group_size=size)


def test_trap_02_peer_the_centred_whitening_of_a_square_weight_misses_one_direction() -> None:
    v = gaussian(100, 100)
    v = v - v.mean(dim=1, keepdim=True)
    values, d = torch.linalg.eigh(v @ v.mT)
    x = (d * values.clamp_min(1e-5).rsqrt()) @ d.mT @ v  # with a floor such as that of the released code
    assert torch.linalg.norm(x @ x.mT - torch.eye(100, dtype=x.dtype)) > 0.99


# --- 3: Riemannian baselines as they were released ---
#
# The Lua code released with the OWN paper never zeroes their gradient, so that every step uses the sum of all so far;
# starts them off the manifold; freezes their rate at construction; uses CayT in the first layer only.


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
        between = layer.weight.detach().clone()
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
        assert torch.equal(layer.weight, step_once(fresh, torch.optim.SGD, second, lr=0.1))


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


# --- 4: geoopt's canonical Stiefel manifold ---
#
# geoopt 0.5.1: retr moves along u + u·XᵀX instead of u; proju doubles the part of a tangent in the span of X, so that
# it is no projection and stabilize with momentum explodes; every solve is n×n; expmap is the Cayley map.


def tangent(x: Tensor, seed: int) -> Tensor:
    u = gaussian(*x.shape, seed=seed)
    u = u - sym(u @ x.mT) @ x
    return u / u.norm()


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


# --- 5: geoopt's momentum, gradients and parameter class ---
#
# geoopt's RiemannianSGD seeds the momentum buffer with the raw gradient and adds again: a first step 1.9 times as long
# as the plain one at momentum 0.9, 2.71 times with nesterov. It changes p.grad under weight decay, and takes Euclidean
# steps silently on a parameter that is no longer a ManifoldParameter (FSDP, overwrite_module_params_on_conversion).


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


# --- 6: weight decay ---
#
# torch's orthogonal, in its default form for weights that are not square (Householder), keeps ±1 on the diagonal of the
# trained tensor and truncates it by .int(): one AdamW step, and the weight is exactly zero.


@over("method", [*HELD, *PENALTIES])
def test_trap_06_no_weight_collapses_under_weight_decay(method: stiefel.Constraint) -> None:
    shape = (4, 7)
    # Alone, the decay would take a factor of 0.6 per step, 4e-5 in all. A penalty balances it somewhat below the set,
    # and less of it, since Adam's steps against it are no longer than lr per entry: 0.97 per step, 1e-2 in all.
    decay, steps, low = (5.0, 20, 0.9) if method.claim is not None else (0.4, 150, 0.4)
    layer = linear(gaussian(*shape), method, scale=1.5)
    optimizer = stiefel.optimizer(layer, adam_with_decay(method), lr=0.08, weight_decay=decay)
    for step in range(steps):
        optimizer.zero_grad()
        g = gaussian(*shape, seed=step)
        ((layer.weight * g).sum() / g.norm() + 100 * stiefel.penalty(layer)).backward()
        optimizer.step()
        if step in (0, 9, steps - 1):  # torch's collapses at the first
            bound = 0 if method.claim is None else method.claim.bound
            assert torch.linalg.svdvals(layer.weight.detach()).min() / 1.5 > low - bound
            assert method.claim is None or holds(method, layer.weight, 1.5)


@over("method", STEPPED)
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_trap_06_weight_decay_alone_does_not_move_an_orthogonal_weight(method: stiefel.Constraint, name: str) -> None:
    for shape in SHAPES.values():
        # A step along −W has no tangent part. Of what rounding leaves of it, no method may make a direction of its own.
        layer = linear(gaussian(*shape), method)
        start = layer.weight.detach().clone()
        if name == "adamw" and isinstance(method, stiefel.ManifoldMethod):
            pytest.skip("geoopt's Adam has no decoupled decay, and its L2 decay goes through the second moment")
        cls = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
        optimizer = stiefel.optimizer(layer, cls, lr=0.1, weight_decay=0.1)
        for _ in range(10):
            layer.weight.grad = torch.zeros_like(layer.weight)
            optimizer.step()
        torch.testing.assert_close(layer.weight.detach(), start, rtol=0, atol=1e-11)


def test_trap_06_peer_torchs_orthogonal_collapses_after_one_step() -> None:
    layer = orthogonal(nn.Linear(7, 4, bias=False))
    assert residual(layer.weight) < 1e-5
    optimizer = torch.optim.AdamW(layer.parameters())
    layer.weight.sum().backward()
    optimizer.step()
    assert not layer.weight.any()


# --- 7: convolution kernels ---
#
# torch's and geotorch's orthogonal constrain each k×k slice of a kernel, not the kernel as a matrix of filters; torch's
# matrix_exp and geotorch's base are n×n: on a 64×576 weight 300 to 400 times the cost of OWN.

CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor]]] = {
    "conv2d": (lambda: nn.Conv2d(3, 6, 3), lambda w: w.flatten(1)),
    "conv2d of more filters than weights": (lambda: nn.Conv2d(1, 16, 3), lambda w: w.flatten(1)),
    "conv3d": (lambda: nn.Conv3d(2, 5, 2), lambda w: w.flatten(1)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda w: w.reshape(2, 3, 18)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 3, 2), lambda w: w.transpose(0, 1).flatten(1)),
}


@over("method", VARIANTS)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_trap_07_kernels_are_matrices_of_filters(method: stiefel.Constraint, kind: str) -> None:
    build, filters = CONVOLUTIONS[kind]
    torch.manual_seed(0)
    try:
        layer = stiefel.constrain(build().double(), method)
    except stiefel.LayoutError:
        pytest.skip(f"{method} is not defined for a {kind} convolution")
    assert residual(filters(layer.weight)) < 64 * EPS
    optimizer = stiefel.optimizer(layer, torch.optim.SGD, lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        g = gaussian(*layer.weight.shape, seed=step)
        (layer.weight * g / g.norm()).sum().backward()
        optimizer.step()
    if method.claim is not None:
        assert holds(method, filters(layer.weight))


def test_trap_07_peer_torch_and_geotorch_constrain_slices() -> None:
    import geotorch

    for constrained in (orthogonal, lambda layer: geotorch.orthogonal(layer, "weight")):
        torch.manual_seed(0)
        layer = nn.Conv2d(3, 6, 3).double()
        constrained(layer)
        assert residual(layer.weight) < 1e-12  # each of the last two dimensions
        assert residual(layer.weight.flatten(1)) > 0.5


@over("method", [m for m in VARIANTS if "ocnn" not in str(m)])  # whose Gram matrix is out×out by definition
@pytest.mark.parametrize("shape", [(3, 120), (120, 3)], ids=["wide", "tall"])
def test_trap_07_nothing_of_size_n_by_n_is_built_for_a_thin_weight(
    method: stiefel.Constraint, shape: tuple[int, int]
) -> None:
    layer = linear(gaussian(*shape), method)
    optimizer = stiefel.optimizer(layer, torch.optim.SGD, lr=0.1, momentum=0.9)
    with Largest() as largest:
        ((layer.weight * gaussian(*shape, seed=1)).sum() + stiefel.penalty(layer)).backward()
        optimizer.step()
    # The wrapper of torch's own form is the one that says it does.
    assert (largest.entries >= 120**2) == ("n×n" in method.summary)


# --- 8: autocast and reduced precision ---
#
# Everybody's constraint under autocast is off by 0.013 to 0.066, under TF32 by 3e-4. A check of the dtype misses it:
# Newton-Schulz under autocast returns float32 with an error of 0.023.

Precision = Callable[[], AbstractContextManager[Any]]


def bfloat16() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


@contextmanager
def reduced_products() -> Iterator[None]:
    """TF32 on a GPU, bfloat16 on processors that have it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def history(method: stiefel.Constraint, precision: Precision = nullcontext, device: str = "cpu") -> list[Tensor]:
    """Weights and penalties of a short training whose every part but the backward pass runs in that precision."""
    with precision():
        layer = linear(gaussian(48, 64), method, dtype=torch.float32, scale=1.5).to(device)
        optimizer = stiefel.optimizer(layer, torch.optim.SGD, lr=0.3, momentum=0.9)
        values = [layer.weight.detach().clone()]
    torch.manual_seed(0)
    for step in range(2):
        optimizer.zero_grad()
        g = gaussian(48, 64, seed=step, dtype=torch.float32).to(device)
        with precision():
            penalty = stiefel.penalty(layer)
            loss = (layer.weight * g / g.norm()).sum() + penalty
        loss.backward()
        with precision():
            optimizer.step()
            values += [layer.weight.detach().clone(), penalty.detach()]
    if method.place != "forward":
        with torch.no_grad():
            layer.weight.add_(0.1)
    with precision():
        stiefel.project(layer)
        return [*values, layer.weight.detach().clone()]


@over("method", [*VARIANTS, *(replace(m, decoupled=True) for m in PENALTIES)])
def test_trap_08_autocast_changes_no_bit_of_a_weight_its_step_or_its_penalty(method: stiefel.Constraint) -> None:
    plain, under = history(method), history(method, bfloat16)
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(under, plain, strict=True))


@over("method", HELD)
def test_trap_08_a_network_trained_under_autocast_is_orthogonal_in_float32(method: stiefel.Constraint) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 32), nn.ReLU(), nn.Linear(32, 32))
    stiefel.constrain(model, method)
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.05)
    for step in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(gaussian(8, 3, 6, 6, seed=step, dtype=torch.float32))
            assert y.dtype == torch.bfloat16  # autocast is at work where it should be
            y.float().square().mean().backward()  # inside, too: not recommended, and done all the same
            optimizer.step()
            assert holds(method, model[4].weight)
    assert holds(method, model[0].weight.flatten(1))
    assert holds(method, model[2].weight)


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@over("method", [*VARIANTS, *(replace(m, decoupled=True) for m in PENALTIES)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_trap_08_reduced_products_change_no_bit_either(method: stiefel.Constraint, device: str) -> None:
    plain, under = history(method, device=device), history(method, reduced_products, device)
    # Sums of a backward pass on a GPU may be added in any order.
    close = {"rtol": 0, "atol": 0 if device == "cpu" else 1e-5}
    for a, b in zip(under, plain, strict=True):
        torch.testing.assert_close(a, b, **close)


def test_trap_08_peer_torchs_orthogonal_and_newton_schulz_lose_it() -> None:
    torch.manual_seed(0)
    layer = orthogonal(nn.Linear(64, 64, bias=False), orthogonal_map="matrix_exp")
    x = orthonormal(48, 64).float() * 0.7
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert residual(layer.weight) > 1e-3
        for _ in range(10):
            x = 1.5 * x - 0.5 * (x @ x.mT) @ x
    assert x.dtype == torch.float32
    assert residual(x) > 1e-3


# --- 9: columns, and penalties that act ---
#
# ONI's released column branch lost its normalization line; ONI's released OrthReg script computes its penalty and never
# adds it; SRIP's released Gram matrix is on the larger side in two of its scripts, where it cannot be the identity.


@over("method", [m for m in VARIANTS if not (m.claim is None and m.place == "forward")])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_trap_09_columns_are_what_rows_are_to_the_transposed_weight(
    method: stiefel.Constraint, momentum: float
) -> None:
    wide, tall = linear(gaussian(4, 7), method, scale=1.5), linear(gaussian(4, 7).mT, method, scale=1.5)
    for layer in (wide, tall):
        optimizer = stiefel.optimizer(layer, torch.optim.SGD, lr=0.05, momentum=momentum)
        torch.manual_seed(0)
        for step in range(3):
            optimizer.zero_grad()
            g = gaussian(4, 7, seed=step)
            ((layer.weight * (g if layer is wide else g.mT)).sum() + stiefel.penalty(layer)).backward()
            optimizer.step()
    torch.testing.assert_close(tall.weight, wide.weight.mT, rtol=0, atol=1e-12)
    assert (wide.weight - 1.5 * orthonormal(4, 7)).norm() > 0.05


@over("method", HELD_FORWARD)
@pytest.mark.parametrize("factor", [1e-3, 50.0])
def test_trap_09_a_proxy_of_any_length_is_normalized_on_either_side(method: stiefel.Constraint, factor: float) -> None:
    for shape in SHAPES.values():
        layer = linear(gaussian(*shape), method)
        with torch.no_grad():
            trained_tensor(layer).mul_(factor).add_(0.1 * factor * gaussian(*shape, seed=3))
        assert holds(method, layer.weight)


def penalty_by_hand(method: stiefel.Constraint, w: Tensor) -> Tensor:
    """λ s² Φ(W/s) of a matrix, from the definitions, with the Gram matrix on the smaller side."""
    s = method.fixed_scale
    x = (w if w.shape[0] <= w.shape[1] else w.mT) / s
    delta = x @ x.mT - torch.eye(len(x), dtype=x.dtype)
    other = x.mT @ x - torch.eye(x.shape[1], dtype=x.dtype)
    rows = w / s
    value = {
        "so": delta.square().sum(),
        "dso": delta.square().sum() + other.square().sum(),
        "mc": delta.abs().max(),
        "srip": torch.linalg.matrix_norm(delta, 2),
        # the row Gram of a convolution by a 1×1 kernel, which is a matrix: its outputs', on whichever side
        "ocnn": (rows @ rows.mT - torch.eye(len(rows), dtype=x.dtype)).square().sum(),
    }[method.kind]
    return method.strength * s**2 * value


@over("method", PENALTIES)
def test_trap_09_a_penalty_is_its_definition_on_the_smaller_side(method: stiefel.Constraint) -> None:
    for shape in SHAPES.values():
        method = replace(method, scale=1.5, strength=0.3)
        layer = linear(gaussian(*shape), method)
        if method.kind in ("so", "mc", "srip"):
            assert stiefel.penalty(layer).abs() < 1e-12  # on the larger side it could not vanish
        with torch.no_grad():
            layer.weight.copy_(1.5 * with_singular_values(*shape, 0.5, 1.2))  # one singular value leads, as SRIP needs
        stiefel.penalty(layer).backward()
        w = layer.weight.detach().clone().requires_grad_()
        expected = penalty_by_hand(method, w)
        expected.backward()
        # 16 products of SRIP's power iteration leave (0.75/0.44)^-16 of a wrong direction or less, squared in the value
        loose = method.kind == "srip"
        torch.testing.assert_close(stiefel.penalty(layer), expected, rtol=1e-3 if loose else 1e-12, atol=0)
        torch.testing.assert_close(layer.weight.grad, w.grad, rtol=0, atol=0.05 if loose else 1e-12)


@over("method", [replace(m, decoupled=d) for m in PENALTIES for d in (False, True) if m.kind != "ocnn"])
@pytest.mark.parametrize("shape", [(3, 5), (5, 3)], ids=["wide", "tall"])
def test_trap_09_a_penalty_acts_in_training(method: stiefel.Constraint, shape: tuple[int, int]) -> None:
    layer = linear(gaussian(*shape), replace(method, strength=1.0))
    with torch.no_grad():
        layer.weight.copy_(with_singular_values(*shape, 0.5, 1.3))
    before = residual(layer.weight)
    optimizer = stiefel.optimizer(layer, torch.optim.SGD, lr=0.02)
    for _ in range(80):
        optimizer.zero_grad()
        (0 * layer.weight.sum() + stiefel.penalty(layer)).backward()  # a loss that has nothing to say
        optimizer.step()
    assert residual(layer.weight) < 0.2 * before


# --- 10: safe steps ---
#
# landing-stiefel's safe step is NaN outside the tube and at zero gradient, and the rate clipped for one parameter stays
# with the next; landing's square form sticks outside the tube. pogo-torch gives NaN at a large rate times gradient.


def tolerance(dtype: torch.dtype) -> float:
    return 64 * torch.finfo(dtype).eps


@over("method", STEPPED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_trap_10_a_zero_gradient_moves_nothing(method: stiefel.Constraint, dtype: torch.dtype) -> None:
    for shape in SHAPES.values():
        layer = linear(gaussian(*shape), method, dtype)
        start = layer.weight.detach().clone()
        after = step_once(layer, torch.optim.SGD, torch.zeros(shape, dtype=dtype), lr=0.1)
        torch.testing.assert_close(after, start, rtol=0, atol=tolerance(dtype))


@over("method", STEPPED)
@pytest.mark.parametrize("singular", [(0.7, 1.2), (0.3, 1.5)], ids=str)
def test_trap_10_a_weight_outside_comes_back_without_a_gradient(
    method: stiefel.Constraint, singular: tuple[float, float]
) -> None:
    for shape in SHAPES.values():
        layer = linear(gaussian(*shape), method)
        with torch.no_grad():
            layer.weight.copy_(with_singular_values(*shape, *singular))
        optimizer = stiefel.optimizer(layer, torch.optim.SGD, lr=0.3)
        for _ in range(20):
            layer.weight.grad = torch.zeros_like(layer.weight)
            optimizer.step()
            assert torch.isfinite(layer.weight).all()
        assert residual(layer.weight) < 1e-4  # landing halves it per step at this rate, once inside


@over("method", LIFTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 7), (4, 4), (1, 6)], ids=str)
def test_trap_10_no_displacement_breaks_the_claim(
    method: stiefel.StepMethod, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    b = 50
    x = torch.linalg.qr(gaussian(b, *shape[::-1]))[0].mT.to(dtype)
    direction = gaussian(b, *shape, seed=1).to(dtype)
    for exponent in (-300 if dtype == torch.float64 else -30, -1, 0, 3, 18):
        for lr in (1e-6, 3.0):
            torch.manual_seed(0)
            moved = method.step(x, direction * 10.0**exponent, lr)
            moved = moved[0] if isinstance(moved, tuple) else moved
            assert torch.isfinite(moved).all()
            if 10.0**exponent <= method.claim.rates[1]:
                assert holds(method, moved), (exponent, lr)


def off_the_set(shape: tuple[int, int], distances: Tensor) -> Tensor:
    """Points with ‖XXᵀ − I‖_F as given, below 1: σ² = 1 + δ with ‖δ‖ the distance."""
    b, (p, n) = len(distances), shape
    u, _, vh = torch.linalg.svd(gaussian(b, p, n, seed=7), full_matrices=False)
    delta = gaussian(b, p, seed=8)
    delta = distances[:, None] * delta / delta.norm(dim=1, keepdim=True)
    return (u * (1 + delta).sqrt().unsqueeze(-2)) @ vh


@over("method", [m for m in LIFTED if hasattr(m, "tube")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 7), (4, 4), (1, 6)], ids=str)
def test_trap_10_a_step_never_leads_out_of_the_tube_or_further_away(
    method: stiefel.StepMethod, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    x = off_the_set(shape, torch.linspace(0.01, 0.98, 100, dtype=torch.float64)).to(dtype)
    u = gaussian(len(x), *shape, seed=1).to(dtype)
    wide = x.double()
    before = torch.linalg.matrix_norm(wide @ wide.mT - torch.eye(shape[0]))
    wall = before.clamp_min(method.tube)  # in ‖XXᵀ − I‖_F: once inside, it may move up to it
    for exponent in (-30, -3, -1, 0, 1, 6, 18):
        for lr in (1e-6, 0.1, 2.0):
            moved, _ = method.step(x, u * 10.0**exponent, lr)
            assert torch.isfinite(moved).all()
            wide = moved.double()
            after = torch.linalg.matrix_norm(wide @ wide.mT - torch.eye(shape[0]))
            assert (after <= wall + tolerance(dtype) * shape[0] ** 0.5).all(), (exponent, lr)


@over("method", IN_PLACE)
@pytest.mark.parametrize("size", [1e-2, 1e5])
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam])
def test_trap_10_two_weights_step_together_as_each_does_alone(
    method: stiefel.Constraint, size: float, cls: type[torch.optim.Optimizer]
) -> None:
    hyper: dict[str, Any] = {"lr": 0.1}
    g = gaussian(4, 7, seed=2)
    alone = step_once(linear(gaussian(4, 7, seed=1), method), cls, g, **hyper)
    model = nn.Sequential(linear(gaussian(4, 7), method), linear(gaussian(4, 7, seed=1), method))
    optimizer = stiefel.optimizer(model, cls, **hyper)
    model[0].weight.grad, model[1].weight.grad = size * gaussian(4, 7, seed=3), g.clone()
    torch.manual_seed(0)
    optimizer.step()
    # A batched product may round otherwise than a single one; a leak of a clipped rate is of the order of the step.
    torch.testing.assert_close(model[1].weight.detach(), alone, rtol=0, atol=1e-12)


@over("method", IN_PLACE)
@pytest.mark.parametrize("size", [1e-2, 1e5])
def test_trap_10_groups_of_one_weight_step_together_as_each_does_alone(method: stiefel.Constraint, size: float) -> None:
    if "ocnn" in str(method):
        pytest.skip("a convolution's penalty has no groups of rows")
    w, g = gaussian(6, 7), gaussian(6, 7, seed=1)
    alone = step_once(linear(w[3:], method), torch.optim.SGD, g[3:], lr=0.1)
    g[:3] *= size
    both = step_once(linear(w, replace(method, group_size=3)), torch.optim.SGD, g, lr=0.1)
    torch.testing.assert_close(both[3:], alone, rtol=0, atol=1e-12)


@over("method", LIFTED)
def test_trap_10_only_the_weight_that_was_clipped_counts_as_shortened(method: stiefel.StepMethod) -> None:
    model = nn.Sequential(linear(gaussian(4, 7), method), linear(gaussian(4, 7, seed=1), method))
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.1)
    model[0].weight.grad, model[1].weight.grad = 1e4 * gaussian(4, 7, seed=3), 1e-3 * gaussian(4, 7, seed=2)
    optimizer.step()
    assert [row.shortened for row in stiefel.report(model).rows] in ([None, None], [1, 0])


def pogo_optimizer(*weights: nn.Parameter, momentum: float = 0.0, lr: float = 0.1) -> torch.optim.Optimizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pogo import base, pogo
    return pogo.POGO(list(weights), base.SGD(momentum=momentum), lr=lr)


def test_trap_10_peer_pogo_is_nan_at_a_large_step() -> None:
    weight = nn.Parameter(orthonormal(4, 7)[None])
    optimizer = pogo_optimizer(weight, lr=10.0)
    for _ in range(10):
        weight.grad = gaussian(1, 4, 7, seed=1)
        optimizer.step()
    assert not torch.isfinite(weight).all()


# --- 11: state ---
#
# pogo-torch creates its state at the optimizer's first step, so that a parameter with a later first gradient raises
# KeyError, and keeps a lambda in its groups, so that it cannot be pickled.

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "momentum": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "adam": (torch.optim.Adam, {"lr": 0.02}),
}


class Branches(nn.Module):
    """Two equal layers, of which the second joins later; equal, so that a method may move them in one batch."""

    def __init__(self, method: stiefel.Constraint) -> None:
        super().__init__()
        self.early, self.late = linear(gaussian(4, 7), method), linear(gaussian(4, 7, seed=1), method)

    def loss(self, step: int, late: bool) -> Tensor:
        loss = stiefel.penalty(self.early) + (self.early.weight * gaussian(4, 7, seed=step)).sum()
        return loss + stiefel.penalty(self.late) + (self.late.weight * gaussian(4, 7, seed=9)).sum() if late else loss

    def train_on(self, optimizer: torch.optim.Optimizer, steps: range, join: int) -> None:
        for step in steps:
            torch.manual_seed(step)
            optimizer.zero_grad()
            self.loss(step, late=step >= join).backward()
            optimizer.step()

    def values(self) -> list[Tensor]:
        return [v.detach().clone() for v in (*self.state_dict().values(), self.early.weight, self.late.weight)]


@over("method", VARIANTS)
@pytest.mark.parametrize("choice", OPTIMIZERS)
def test_trap_11_a_late_first_gradient_starts_a_state_of_its_own(method: stiefel.Constraint, choice: str) -> None:
    cls, hyper = OPTIMIZERS[choice]
    model = Branches(method)
    optimizer = stiefel.optimizer(model, cls, **hyper)
    start = model.late.weight.detach().clone()
    model.train_on(optimizer, range(3), join=3)
    assert torch.equal(model.late.weight, start)
    model.train_on(optimizer, range(3, 4), join=3)

    alone = Branches(method)
    optimizer = stiefel.optimizer(alone.late, cls, **hyper)
    torch.manual_seed(3)
    (stiefel.penalty(alone.late) + (alone.late.weight * gaussian(4, 7, seed=9)).sum()).backward()
    optimizer.step()
    # The early weight's moments or step count would change the late one's first step by a factor.
    torch.testing.assert_close(model.late.weight, alone.late.weight, rtol=0, atol=1e-12)
    assert (model.late.weight - start).norm() > 1e-3


@over("method", VARIANTS)
@pytest.mark.parametrize(("choice", "how"), [("momentum", "objects"), ("adam", "state dicts")])
def test_trap_11_training_resumes_bit_for_bit_also_before_a_first_gradient(
    method: stiefel.Constraint, choice: str, how: str
) -> None:
    cls, hyper = OPTIMIZERS[choice]
    model = Branches(method)
    optimizer = stiefel.optimizer(model, cls, **hyper)
    model.train_on(optimizer, range(2), join=3)
    if how == "state dicts":
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)  # plain data: no class of ours, no function
        again = Branches(method)
        resumed = stiefel.optimizer(again, cls, **hyper)
        again.load_state_dict(saved["model"])
        resumed.load_state_dict(saved["optimizer"])
    elif method.place == "forward":  # torch refuses to pickle parametrized modules, whoever wrote the parametrization
        again, resumed = copy.deepcopy((model, optimizer))
        pickle.loads(pickle.dumps(optimizer))
    else:
        again, resumed = pickle.loads(pickle.dumps((model, optimizer)))
    for each, its in ((model, optimizer), (again, resumed)):
        each.train_on(its, range(2, 5), join=3)
    assert all(torch.equal(a, b) for a, b in zip(again.values(), model.values(), strict=True))


def test_trap_11_peer_pogo_has_these_faults() -> None:
    early, late = (nn.Parameter(orthonormal(4, 7, seed=i)[None]) for i in range(2))
    optimizer = pogo_optimizer(early, late, momentum=0.9)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(optimizer)
    early.grad = gaussian(1, 4, 7, seed=1)
    optimizer.step()
    late.grad = gaussian(1, 4, 7, seed=2)
    with pytest.raises(KeyError):
        optimizer.step()


# --- 12: the two components of O(n) ---
#
# A square orthogonal weight has determinant +1 or −1, with no continuous path between: a map that starts at the
# identity never reaches −1, and a method that jumps across does so unnoticed.

JUMPS = ("own_pca",)  # by its definition: eigenvectors change places where eigenvalues cross


@over("method", VARIANTS)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_trap_12_training_starts_in_the_component_of_the_given_weight(method: stiefel.Constraint, n: int) -> None:
    for sign in (1, -1):
        w = gaussian(n, n)
        w[0] *= sign * torch.linalg.det(w).sign()
        layer = linear(w, method)
        assert torch.linalg.det(layer.weight.detach()).item() == pytest.approx(sign, abs=1e-12)
        u, _, vh = torch.linalg.svd(w)
        torch.testing.assert_close(layer.weight.detach(), u @ vh, rtol=0, atol=1e-12)


@over("method", [m for m in HELD if m.name not in JUMPS])
@pytest.mark.parametrize("sign", [1, -1])
def test_trap_12_continuous_methods_keep_the_determinants_sign(method: stiefel.Constraint, sign: int) -> None:
    n = 3
    w = orthonormal(n, n)
    w[0] *= sign * torch.linalg.det(w).sign()
    target = w.clone()
    target[1] *= -1  # in the other component, on the far side of a reflection
    layer = linear(w, method)
    optimizer = stiefel.optimizer(layer, torch.optim.SGD, lr=0.1)
    for step in range(25):
        optimizer.zero_grad()
        g = -target + 0.1 * gaussian(n, n, seed=step)
        (layer.weight * g / g.norm()).sum().backward()  # steps of 0.1: none can pass through a singular matrix
        optimizer.step()
        assert torch.linalg.det(layer.weight.detach()) * sign > 0.1


# --- 13: averages and conversions ---
#
# The mean of orthogonal weights is not orthogonal, nor is an orthogonal weight rounded to bfloat16 and back.


AVERAGES = {"swa": None, "ema": get_ema_multi_avg_fn(0.7)}


@over("method", VARIANTS)
@pytest.mark.parametrize("average", AVERAGES)
def test_trap_13_averaged_weights_are_projected_back(method: stiefel.Constraint, average: str) -> None:
    for shape in SHAPES.values():
        model = nn.Sequential(linear(gaussian(*shape), method, scale=1.5))
        optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=1.0)
        averaged = AveragedModel(model, multi_avg_fn=AVERAGES[average])
        for step in range(4):
            optimizer.zero_grad()
            g = gaussian(*shape, seed=step)
            ((model[0].weight * g / g.norm()).sum() + stiefel.penalty(model)).backward()
            optimizer.step()
            averaged.update_parameters(model)
        mean, live = averaged.module[0].weight.detach().clone(), model[0].weight.detach().clone()
        held = method.place == "forward"
        assert held or residual(mean, 1.5) > 1e-4  # it has left the set
        assert stiefel.project(averaged.module) is averaged.module
        after = averaged.module[0].weight.detach()
        if held:
            assert torch.equal(after, mean)  # a mean of proxies is a proxy
            assert method.claim is None or holds(method, after, 1.5)
        else:
            u, _, vh = torch.linalg.svd(mean, full_matrices=False)
            torch.testing.assert_close(after, 1.5 * u @ vh, rtol=0, atol=1e-13)
        assert torch.equal(model[0].weight, live)
        assert torch.equal(averaged(torch.eye(shape[1], dtype=torch.float64)), after.mT)


@over("method", [m for m in VARIANTS if m.place != "forward" or m.claim is not None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_trap_13_a_round_trip_through_bfloat16_is_projected_back(
    method: stiefel.Constraint, dtype: torch.dtype
) -> None:
    for shape in SHAPES.values():
        layer = linear(gaussian(*shape), method, dtype, scale=1.5)
        start = layer.weight.detach().clone()
        parameter = trained_tensor(layer)
        layer.to(torch.bfloat16).to(dtype)
        assert method.place == "forward" or residual(layer.weight, 1.5) > 1e-4
        assert stiefel.project(layer) is layer
        assert residual(layer.weight, 1.5) <= 64 * torch.finfo(dtype).eps
        assert trained_tensor(layer) is parameter  # what an optimizer holds
        assert (layer.weight - start).abs().max() < 0.05  # bfloat16 has 8 bits


@over("method", STEPPED)
def test_trap_13_training_goes_on_from_a_projected_average(method: stiefel.Constraint) -> None:
    model = nn.Sequential(linear(gaussian(4, 7), method))
    averaged = AveragedModel(model)
    for seed in (1, 2):
        with torch.no_grad():
            model[0].weight.copy_(orthonormal(4, 7, seed=seed))
        averaged.update_parameters(model)
    twin = copy.deepcopy(stiefel.project(averaged.module))
    optimizer = stiefel.optimizer(twin, torch.optim.SGD, lr=0.1)
    twin[0].weight.grad = gaussian(4, 7, seed=3) / 5
    optimizer.step()
    assert holds(method, twin[0].weight)
