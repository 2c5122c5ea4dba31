"""What is told before it ruins a weight: divergence, lost classes, plain optimizers, steps that fail half way."""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import dataclass

import pytest
import torch
from common import registered
from torch import Tensor, nn

import stiefel

METHODS = stiefel.available()
MOVED = [m for m in METHODS if stiefel.get(m).lifts]


def model(method: str, **options) -> nn.Sequential:
    torch.manual_seed(0)
    return stiefel.constrain(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), method, **options)


def loss(net: nn.Module, factor: float = 1.0) -> Tensor:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    return factor * (net(x) - 1).square().mean() + stiefel.penalty(net)


def kept(net: nn.Module) -> list[Tensor]:
    return [net[i].weight.detach().clone() for i in (0, 2)]


def same(net: nn.Module, before: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(kept(net), before, strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("by", ["argument", "keyword"])
def test_a_closure_that_diverges_is_told_before_the_step(method, by):
    net = model(method)
    optimizer = stiefel.optimizer(net, torch.optim.SGD, lr=0.1)
    before = kept(net)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(net, float("nan"))
        value.backward()
        return value

    with pytest.raises(stiefel.DivergenceError, match=r"0\.weight"):
        optimizer.step(closure) if by == "argument" else optimizer.step(closure=closure)
    assert same(net, before)


@pytest.mark.parametrize("at", [1, 3])
def test_a_step_that_diverges_says_whether_it_has_moved_weights(at):
    net, calls = model("own"), []
    optimizer, before = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=5), kept(net)

    def closure() -> Tensor:
        optimizer.zero_grad()
        calls.append(1)
        value = loss(net, float("nan") if len(calls) == at else 1.0)
        value.backward()
        return value

    with pytest.raises(stiefel.DivergenceError) as caught:
        optimizer.step(closure)
    assert same(net, before) == (at == 1) == ("This step changed no weight" in str(caught.value))
    assert ("where this step tried them last" in str(caught.value)) == (at == 3)


@pytest.mark.parametrize("method", [*MOVED, "riemannian"])
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.LBFGS])
def test_a_plain_optimizer_with_a_closure_is_refused_at_its_first_step(method, cls):
    net = model(method)
    optimizer, before = cls(net.parameters(), lr=0.1), kept(net)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(net)
        value.backward()
        return value

    with pytest.raises(stiefel.OptimizerError, match=r"0\.weight"):
        optimizer.step(closure)
    assert same(net, before)


@pytest.mark.parametrize("method", METHODS)
def test_a_copied_pair_of_model_and_optimizer_is_watched(method):
    net = model(method)
    pair = net, stiefel.optimizer(net, torch.optim.SGD, lr=0.1)
    twin, optimizer = copy.deepcopy(pair)
    loss(twin, float("nan")).backward()
    before = kept(twin)
    with pytest.raises(stiefel.DivergenceError, match=r"0\.weight"):
        optimizer.step()
    assert same(twin, before)


def strength(step: int) -> float:
    seen.append(step)
    return 0.1


seen: list[int] = []


@pytest.mark.parametrize("through", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copied_decoupled_schedule_goes_on_counting(through):
    net = model("soft", decoupled=True, strength=strength)
    twin, optimizer = through((net, stiefel.optimizer(net, torch.optim.SGD, lr=0.1)))
    seen.clear()
    for _ in range(3):
        optimizer.zero_grad()
        loss(twin).backward()
        optimizer.step()
    assert sorted(set(seen)) == [0, 1, 2]


@pytest.mark.parametrize("method", MOVED)
def test_a_step_without_end_leaves_the_weight_and_is_told(method):
    net = model(method)
    optimizer, before = stiefel.optimizer(net, torch.optim.SGD, lr=1e30), kept(net)
    loss(net, 1e10).backward()
    with pytest.raises(stiefel.DivergenceError, match=r"0\.weight"):
        optimizer.step()
    assert same(net, before)


@dataclass(frozen=True, kw_only=True)
class Fails(stiefel.StepMethod):
    """Fails at every step."""

    name = "test_fails"
    summary = "fails"
    reference = "none"

    def step(self, x: Tensor, displacement: Tensor, lr: float) -> Tensor:
        raise ZeroDivisionError


@dataclass(frozen=True, kw_only=True)
class FailsLate(stiefel.Reparameterization):
    """Cannot hold the second layer, and does not know before it tries."""

    name = "test_fails_late"
    summary = "fails"
    reference = "none"

    def forward(self, proxy: Tensor, layout) -> Tensor:
        if proxy.shape[-1] == 5:
            raise ZeroDivisionError
        return proxy


@pytest.fixture(params=[Fails, FailsLate])
def failing(request):
    yield from registered(request.param)


def test_a_method_that_fails_leaves_everything_as_it_was(failing):
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    if stiefel.get(failing).place == "forward":
        with pytest.raises(ZeroDivisionError):
            stiefel.constrain(net, failing)
        assert all(type(layer) is nn.Linear for layer in (net[0], net[2]))
        assert [n for n, _ in net.named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]
        return
    stiefel.constrain(net, failing)
    optimizer, before = stiefel.optimizer(net, torch.optim.SGD, lr=0.1), kept(net)
    loss(net).backward()
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert same(net, before)


@pytest.mark.parametrize("method", MOVED)
def test_a_step_that_a_scaler_leaves_out_of_a_fused_optimizer_moves_nothing(method):
    net = model(method)
    optimizer = stiefel.optimizer(net, torch.optim.Adam, lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = kept(net)
    scaler.scale(loss(net, float("inf"))).backward()
    scaler.step(optimizer)
    scaler.update()
    assert same(net, before)
    assert {row.steps for row in stiefel.report(net).rows} == {0}
    optimizer.zero_grad()
    scaler.scale(loss(net)).backward()
    scaler.step(optimizer)
    assert not same(net, before)


def test_a_gain_that_diverges_is_told():
    net = stiefel.constrain(nn.Linear(6, 4), "own", scale="learnable")
    optimizer = stiefel.optimizer(net, torch.optim.SGD, lr=0.1)
    gain = net.parametrizations.weight[0].gain
    gain.grad = torch.full_like(gain, float("nan"))
    with pytest.raises(stiefel.DivergenceError, match="weight"):
        optimizer.step()


@pytest.mark.parametrize("method", MOVED)
def test_a_lifted_class_is_lifted_once(method):
    net = model(method)
    optimizer = stiefel.optimizer(net, torch.optim.SGD, lr=0.1)
    again = stiefel.optimizer(net, type(optimizer), lr=0.1)
    assert type(again) is type(optimizer)


@pytest.mark.parametrize("method", ["retraction", "landing"])
def test_weights_in_half_precision_are_not_stepped(method):
    net = model(method).bfloat16()
    optimizer = stiefel.optimizer(net, torch.optim.SGD, lr=0.1)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(stiefel.WeightError, match="bfloat16"):
        optimizer.step()


@pytest.mark.parametrize("method", ["unconstrained", "soft", "own"])
def test_a_weight_that_overflows_while_its_gradient_is_finite_is_told(method: str) -> None:
    layer = stiefel.constrain(nn.Linear(9, 4, bias=False), method)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    (parameter,) = layer.parameters()
    with torch.no_grad():
        parameter[0, 0] = torch.inf
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(stiefel.DivergenceError, match=r"the value of weight 'weight' is NaN or infinite"):
        optimizer.step()


@pytest.mark.parametrize("method", ["own", "retraction"])
def test_fused_momentum_that_would_start_late_is_refused_by_name(method):
    net = model(method)
    optimizer = stiefel.optimizer(net, torch.optim.SGD, lr=0.1, momentum=0.9, fused=True)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    loss(net).backward()
    parameters[-1].grad = None
    optimizer.step()
    optimizer.zero_grad()
    loss(net).backward()
    before = kept(net)
    with pytest.raises(stiefel.OptimizerError, match="fused=True"):
        optimizer.step()
    assert same(net, before)


@pytest.mark.parametrize("method", MOVED)
def test_a_step_without_a_gradient_of_any_constrained_weight_moves_the_others(method):
    net = nn.Sequential(stiefel.constrain(nn.Linear(6, 5, bias=False), method), nn.Linear(5, 4))
    optimizer = stiefel.optimizer(net, torch.optim.SGD, lr=0.1)
    before, free = net[0].weight.detach().clone(), net[1].weight.detach().clone()
    net[1].weight.sum().backward()
    optimizer.step()
    assert torch.equal(net[0].weight, before)
    assert not torch.equal(net[1].weight, free)


@pytest.mark.parametrize("method", [m for m in METHODS if stiefel.get(m).moves])
def test_an_optimizer_around_another_one_that_moves_weights_between_steps_is_told_once(method):
    """As schedulefree's wrapper does, which is no torch optimizer: the inner one alone is seen."""
    net = model(method)
    optimizer, averages = stiefel.optimizer(net, torch.optim.SGD, lr=0.5), kept(net)

    def step() -> None:
        optimizer.zero_grad()
        loss(net, 10.0).backward()
        optimizer.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            step()
        stiefel.project(net)
        net.load_state_dict(net.state_dict())  # changes that leave it on its set
        step()
    for layer, average in zip((net[0], net[2]), averages, strict=True):
        with torch.no_grad():
            layer.weight.lerp_(average + 0.3, 0.5)
    with pytest.warns(UserWarning, match="has been taken off its constraint's set since its last step") as told:
        step()
    assert {f"'{n}.weight'" for n in (0, 2)} == {str(w.message).split()[1] for w in told}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            net[0].weight.add_(0.1)
        step()


class EvaluatesElsewhere(torch.optim.SGD):
    """Exchanges its parameters for a half of them in eval()."""

    def eval(self) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(0.5)


@pytest.mark.parametrize("case", ["empty first group", "complex", "second group"])
def test_an_optimizer_that_evaluates_elsewhere_is_refused_whatever_its_first_group_has(case):
    net = nn.ParameterDict({"U": torch.eye(3, dtype=torch.complex64 if case == "complex" else torch.float32)})
    stiefel.constrain(net, "retraction", layers=["U"])
    groups = {"empty first group": [{"params": []}, {"params": [net["U"]]}], "complex": [net["U"]]}
    free = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
    with pytest.raises(stiefel.OptimizerError, match="exchanges the weight for an average"):
        stiefel.optimizer(
            net, EvaluatesElsewhere, groups.get(case, [{"params": [free]}, {"params": [net["U"]]}]), lr=0.1
        )
