"""What a lifted base optimizer gets, and what it leaves: tangent gradients, and the user's own as they were."""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import conformance
import pytest
import torch
from torch import Tensor, nn

import stiefel
from stiefel.constraint import StepMethod
from stiefel.linalg import gram_residual
from stiefel.manifold.geometry import project_tangent, random_stiefel, tangent_gradient_

STEPPED = [m for name in stiefel.available() for m in conformance.variants(name) if m.lifts]
TANGENT = [m for m in STEPPED if isinstance(m, StepMethod)]


class Seen(torch.optim.SGD):
    """Keeps the gradients that it gets."""

    gradients: ClassVar[list[list[Tensor]]] = []

    def step(self, closure: Any = None) -> Any:
        self.gradients.append([p.grad.clone() for g in self.param_groups for p in g["params"] if p.grad is not None])
        return super().step(closure)


def layers(method: stiefel.Constraint, scale: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(5, 4), nn.Linear(4, 4)).double()
    return stiefel.constrain(net, conformance.replace(method, scale=scale))


def backward(net: nn.Module, factor: float = 1.0) -> Tensor:
    x = torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss = factor * net(x).square().sum()
    loss.backward()
    return loss


def kept(net: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Gradients, with copies of what is in them."""
    return [(p.grad, p.grad.clone()) for p in net.parameters() if p.grad is not None]


def unchanged(net: nn.Module, before: list[tuple[Tensor, Tensor]]) -> bool:
    now = [p.grad for p in net.parameters() if p.grad is not None]
    return all(g is old and torch.equal(g, value) for g, (old, value) in zip(now, before, strict=True))


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("method", STEPPED, ids=str)
def test_the_base_gets_the_tangent_part(method: stiefel.Constraint, scale: float) -> None:
    net = layers(method, scale)
    optimizer = stiefel.optimizer(net, Seen, lr=0.1, momentum=0.9)
    backward(net)
    points = {w.name: (w.binding.layout, w.points().clone()) for w in conformance.constrained_weights(net)}
    expected = []
    for name, p in net.named_parameters():
        if name in points and isinstance(method, StepMethod) and method.tangent:
            layout, x = points[name]
            expected.append(layout.tensor(project_tangent(x, layout.matrices(p.grad))))
        else:
            expected.append(p.grad.clone())
    before = kept(net)
    Seen.gradients.clear()
    optimizer.step()
    assert unchanged(net, before)
    (seen,) = Seen.gradients
    for got, wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", [m for m in TANGENT if m.projects], ids=str)
def test_what_projects_its_step_needs_no_tangent_gradient_where_nothing_is_kept_of_it(method: StepMethod) -> None:
    """Such a step is a function of the tangent part: SGD without momentum may be given the gradient itself."""
    generator = torch.Generator().manual_seed(0)
    for p, n in ((3, 8), (4, 4), (1, 5)):
        x = random_stiefel(2, p, n, generator=generator)
        u = 0.01 * torch.randn(2, p, n, generator=generator, dtype=torch.float64)
        s = 0.01 * torch.randn(2, p, p, generator=generator, dtype=torch.float64)
        moved = []
        for displacement in (u, u + (s + s.mT) @ x):
            torch.manual_seed(0)
            result = method.step(x, displacement, 0.1)
            moved.append(result[0] if isinstance(result, tuple) else result)
        torch.testing.assert_close(moved[0], moved[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "hyper", [{}, {"foreach": True}, {"fused": True}, {"maximize": True}, {"amsgrad": True}], ids=str
)
@pytest.mark.parametrize("method", TANGENT, ids=str)
def test_gradients_are_left_as_they_were(method: stiefel.Constraint, hyper: dict[str, Any]) -> None:
    net = layers(method)
    optimizer = stiefel.optimizer(net, torch.optim.Adam, lr=0.01, **hyper)
    for _ in range(3):
        backward(net)  # they add up
        before = kept(net)
        optimizer.step()
        assert unchanged(net, before)


def test_the_forms_of_a_base_agree() -> None:
    results = []
    for hyper in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        net = layers(stiefel.get("retraction"))
        optimizer = stiefel.optimizer(net, torch.optim.Adam, lr=0.01, **hyper)
        for _ in range(5):
            optimizer.zero_grad()
            backward(net)
            optimizer.step()
        results.append([p.detach().clone() for p in net.parameters()])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_maximizing_is_minimizing_the_negative() -> None:
    results = []
    for sign, maximize in ((1.0, False), (-1.0, True)):
        net = layers(stiefel.get("pogo"))
        optimizer = stiefel.optimizer(net, torch.optim.RMSprop, lr=0.01, maximize=maximize)
        for _ in range(5):
            optimizer.zero_grad()
            backward(net, sign)
            optimizer.step()
        results.append([p.detach().clone() for p in net.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_gradients_come_back_where_the_step_raises() -> None:
    class Fails(torch.optim.SGD):
        fails = False

        def step(self, closure: Any = None) -> Any:
            super().step()
            if self.fails:
                raise RuntimeError("after the step")

    net = layers(stiefel.get("retraction"))
    optimizer: Any = stiefel.optimizer(net, Fails, lr=0.1, momentum=0.9)
    optimizer.fails = True
    backward(net)
    before, weights = kept(net), [p.detach().clone() for p in net[0].parameters()]
    with pytest.raises(RuntimeError, match="after the step"):
        optimizer.step()
    assert unchanged(net, before)
    assert torch.equal(net[0].weight, weights[0])


def test_a_closure_is_evaluated_once_and_its_gradients_are_left() -> None:
    net = layers(stiefel.get("landing"))
    optimizer = stiefel.optimizer(net, torch.optim.Adam, lr=0.01)
    seen: list[list[tuple[Tensor, Tensor]]] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = backward(net)
        seen.append(kept(net))
        return loss

    assert optimizer.step(closure) > 0
    assert len(seen) == 1
    assert unchanged(net, seen[0])


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_changes_nothing(fused: bool) -> None:
    net = layers(stiefel.get("retraction")).float()
    stiefel.project(net)
    optimizer = stiefel.optimizer(net, torch.optim.Adam, lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    x = torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    for factor, moves in ((1.0, True), (float("inf"), False), (1.0, True)):
        optimizer.zero_grad()
        scaler.scale(factor * net(x).square().sum()).backward()
        before, weights = kept(net), [p.detach().clone() for p in net.parameters()]
        scaler.step(optimizer)
        scaler.update()
        assert any(not torch.equal(a, b) for a, b in zip(net.parameters(), weights, strict=True)) is moves
        assert all(p.grad is old for p, (old, _) in zip(net.parameters(), before, strict=True))
    assert stiefel.report(net).worst < 1e-5


@pytest.mark.sampled(3)
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("name", [n for n in stiefel.available() if not stiefel.get(n).real_only])
def test_gates_in_a_list_that_the_user_stacks_train(name: str, cls: type[torch.optim.Optimizer]) -> None:
    """Their gradients come as lazy conjugates, which torch's optimizers cannot view as real numbers."""
    torch.manual_seed(0)
    circuit = nn.Module()
    circuit.gates = nn.ParameterList([torch.randn(4, 4, dtype=torch.complex64) for _ in range(20)])
    stiefel.constrain(circuit, name, layers=[f"gates.{k}" for k in range(20)])
    optimizer = stiefel.optimizer(circuit, cls, lr=0.01)
    start = torch.randn(4, dtype=torch.complex64)
    first = 0.0
    for step in range(10):
        optimizer.zero_grad()
        state = start
        for gate in torch.stack(list(circuit.gates)).mH:
            state = gate @ state
        loss = -state[0].abs().square() / state.abs().square().sum()
        loss.backward()
        before = [p.grad.clone() for p in circuit.parameters()]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(circuit.parameters(), before, strict=True))
        first = loss.item() if step == 0 else first
    assert loss.item() < first


@pytest.mark.sampled(3, values=False)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize(("p", "n"), [(1, 10), (5, 5), (64, 64), (64, 576), (256, 256), (512, 4608)])
def test_a_normal_gradient_has_no_tangent_part(p: int, n: int, dtype: torch.dtype) -> None:
    """Exactly none; and one that is not rounding comes through whole."""
    generator = torch.Generator().manual_seed(0)
    x = random_stiefel(1, p, n, generator=generator, dtype=dtype)
    for size in (1.0, 1e20, 1e-20):
        s = torch.randn(1, p, p, generator=generator, dtype=dtype) * size
        normal = (s + s.mH) @ x
        assert not tangent_gradient_(x, normal.clone()).any()
        if p * n == 1 or (p == n == 1):
            continue
        g = normal + 1e3 * torch.finfo(dtype).eps * torch.randn(1, p, n, generator=generator, dtype=dtype) * size
        assert torch.equal(tangent_gradient_(x, g.clone()), project_tangent(x, g))
    assert gram_residual(x).abs().max() < 1e-5


def test_a_gradient_of_nan_is_not_taken_for_rounding() -> None:
    x = random_stiefel(1, 3, 5, generator=torch.Generator().manual_seed(0))
    g = torch.ones_like(x)
    g[0, 0, 0] = torch.nan
    assert tangent_gradient_(x, g).isnan().any()


@dataclass(frozen=True, kw_only=True)
class Raw(StepMethod):
    """A baseline that was published with the gradient itself."""

    name, summary, reference = "raw", "takes the gradient itself", "none"
    tangent = False

    def step(self, x: Tensor, displacement: Tensor, lr: float) -> Tensor:
        return self.nearest(x + displacement, None)


def test_a_baseline_may_ask_for_the_gradient_itself() -> None:
    net = layers(Raw())
    optimizer = stiefel.optimizer(net, Seen, lr=0.1, momentum=0.9)
    backward(net)
    gradients = [p.grad.clone() for p in net.parameters()]
    Seen.gradients.clear()
    copy.deepcopy(optimizer)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(Seen.gradients[0], gradients, strict=True))


@pytest.mark.parametrize("used", [False, True], ids=["at first", "after torch's class was used"])
def test_hooks_run_once_around_the_whole_step(used: bool) -> None:
    """torch wraps the step of a class when its first optimizer is made: the base's must not call them half way."""
    if used:
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    net = layers(stiefel.get("pogo"))
    optimizer = stiefel.optimizer(net, torch.optim.SGD, lr=0.3, momentum=0.9)
    weight, seen = net[2].weight, []
    optimizer.register_step_pre_hook(lambda *_: seen.append(weight.detach().clone()))
    optimizer.register_step_post_hook(lambda *_: seen.append(weight.detach().clone()))
    backward(net)
    before = weight.detach().clone()
    optimizer.step()
    assert len(seen) == 2
    assert torch.equal(seen[0], before)
    assert torch.equal(seen[1], weight)


@pytest.mark.parametrize("size", [1e-6, 1e-8])
@pytest.mark.parametrize("method", [m for m in TANGENT if m.step_length], ids=str)
def test_a_short_displacement_keeps_its_direction(method: StepMethod, size: float) -> None:
    """As the difference of two weights it would have the digits of a weight alone, and these methods make it long."""
    moved = []
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        net = stiefel.constrain(nn.Linear(128, 32, bias=False).to(dtype), method)
        g = torch.randn(32, 128, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        optimizer = stiefel.optimizer(net, torch.optim.SGD, lr=0.1, momentum=0.9)
        before = net.weight.detach().clone()
        (net.weight * (size * g / g.norm()).to(dtype)).sum().backward()
        optimizer.step()
        moved.append((net.weight.detach() - before).double())
    assert torch.nn.functional.cosine_similarity(moved[0].flatten(), moved[1].flatten(), dim=0) > 1 - 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("hyper", [{}, {"momentum": 0.9}], ids=["plain", "momentum"])
@pytest.mark.parametrize("size", [-0.1, 1e3])
@pytest.mark.parametrize("method", TANGENT, ids=str)
def test_a_normal_gradient_moves_nothing(
    method: StepMethod, size: float, hyper: dict[str, float], dtype: torch.dtype
) -> None:
    """G = SX, with S weak beside a weight's rounding, or so strong that the rate would carry rows to the other side."""
    net = stiefel.constrain(nn.Linear(6, 6, bias=False).to(dtype), method)
    optimizer = stiefel.optimizer(net, torch.optim.SGD, lr=0.01, **hyper)
    x = net.weight.detach().clone()
    s = size * torch.linspace(0.5, 1.5, 6, dtype=dtype)
    (s[:, None] * x * net.weight).sum().backward()
    optimizer.step()
    assert (net.weight - x).abs().max() <= 8 * torch.finfo(dtype).eps
