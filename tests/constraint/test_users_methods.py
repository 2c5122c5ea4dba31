"""Methods that users register: known by name, lifted, checked like any other."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from common import Projection, registered
from contract import METHODS, batch, mlp, output, polar_factor, same_state, state_copy, train
from torch import Tensor, nn

import stiefel
import stiefel.methods
from stiefel.attach.weights import constrained_weights
from stiefel.layout import Layout
from stiefel.manifold.geometry import project_tangent


@dataclass(frozen=True, kw_only=True)
class Proxy(stiefel.Reparameterization):
    """Rows divided by their norms: starts on the set, and leaves it."""

    name = "test_proxy"
    summary = "unit rows"
    reference = "none"

    def forward(self, proxy: Tensor, layout: Any) -> Tensor:
        return proxy / proxy.norm(dim=-1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class Trace(stiefel.Penalty):
    """Φ(X) = (‖X‖_F² − p)²."""

    name = "test_trace"
    summary = "norm only"
    reference = "none"

    def penalty(self, x: Tensor, layout: Layout) -> Tensor:
        return (x.square().sum(dim=(-2, -1)) - x.shape[-2]).square()


@pytest.fixture(params=[Projection, Proxy, Trace], ids=lambda cls: cls.name)
def users_method(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from registered(request.param)


DENSE = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "adam": (torch.optim.Adam, {"lr": 0.02}),
    "adamw": (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.005}),
}


@pytest.mark.parametrize("choice", DENSE)
def test_a_users_method_works_everywhere(users_method: str, choice: str) -> None:
    cls, hyper = DENSE[choice]
    assert users_method in stiefel.available()
    method = stiefel.get(users_method)
    model, x = stiefel.constrain(mlp(), users_method, scale="relu"), batch(16, 6)
    assert stiefel.report(model).worst < 1e-6
    optimizer = stiefel.optimizer(model, cls, **hyper)
    assert isinstance(optimizer, cls)
    assert (type(optimizer) is cls) == (method.place != "step")
    before = (output(model, x) - 0.3).square().mean().item()
    train(model, optimizer, x, steps=30)
    assert (output(model, x) - 0.3).square().mean().item() < before / 2
    if method.feasible:
        assert stiefel.report(model).worst < 1e-5
    assert stiefel.penalty(model).requires_grad == (method.place == "loss")
    twin, expected = copy.deepcopy(model), model(x)
    stiefel.release(model)
    assert torch.equal(model(x), expected)
    assert [type(p) for p in model.parameters()] == [nn.Parameter] * 6
    train(twin, stiefel.optimizer(twin, cls, **hyper), x, steps=2)
    assert torch.equal(model(x), expected)
    if method.feasible:
        assert stiefel.report(twin).worst < 1e-5


TORCHS = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
}


LIFTABLE = [name for name in TORCHS if name not in ("LBFGS", "Rprop", "SparseAdam")]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("choice", LIFTABLE)
@pytest.mark.parametrize("method", [m for m in METHODS if stiefel.get(m).lifts])
def test_every_dense_optimizer_is_lifted(method: str, choice: str) -> None:
    """All weights are 2-D, as torch's Muon asks; the one that no method holds moves as under the optimizer itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False)).double()
    plain = copy.deepcopy(model)
    stiefel.constrain(model, method, layers="0")
    optimizer, base = stiefel.optimizer(model, TORCHS[choice], lr=0.05), TORCHS[choice](plain.parameters(), lr=0.05)
    assert isinstance(optimizer, TORCHS[choice])
    before, (found,) = model[0].weight.detach().clone(), constrained_weights(model)
    for step in range(10):
        g = [batch(4, 6, seed=step, dtype=torch.float64), batch(4, 4, seed=step, dtype=torch.float64)]
        for m in (model, plain):
            m[0].weight.grad, m[2].weight.grad = g[0].clone(), g[1].clone()
        optimizer.step()
        base.step()
        assert found.allows(found.residual()), step
    assert torch.equal(model[2].weight, plain[2].weight)
    assert (model[0].weight - before).norm() > 1e-4


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_a_step_method_gets_the_base_optimizers_displacement(projection: str, scale: float) -> None:
    """With rate 0.1 and tangent gradient T, X becomes polar(X − 0.1 T / s): what is divided is the displacement."""
    torch.manual_seed(0)
    model = stiefel.constrain(nn.Linear(6, 4, bias=False).double(), projection, scale=scale)
    g, w = batch(4, 6, dtype=torch.float64), model.weight.detach().clone()
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.1)
    model.weight.grad = g
    optimizer.step()
    tangent = project_tangent(w / scale, g)
    torch.testing.assert_close(model.weight.detach().as_subclass(Tensor), scale * polar_factor(w - 0.1 * tangent))


@pytest.mark.parametrize("choice", DENSE)
@pytest.mark.parametrize("copier", ["deepcopy", "pickle"])
def test_a_lifted_optimizer_keeps_lifting_when_copied(projection: str, choice: str, copier: str) -> None:
    cls, hyper = DENSE[choice]
    model, x = stiefel.constrain(mlp(), projection), batch(4, 6)
    optimizer = stiefel.optimizer(model, cls, **hyper)
    train(model, optimizer, x, steps=2)
    pair = (model, optimizer)
    twin, twin_optimizer = copy.deepcopy(pair) if copier == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert type(twin_optimizer) is type(optimizer)
    train(model, optimizer, x, steps=3)
    train(twin, twin_optimizer, x, steps=3)
    assert stiefel.report(twin).worst < 1e-5
    assert same_state(twin.state_dict(), model.state_dict())


@pytest.mark.parametrize("choice", ["sgd", "adam", "adamw"])
def test_lifted_training_resumes_bit_for_bit(projection: str, choice: str) -> None:
    cls, hyper = DENSE[choice]
    model, x = stiefel.constrain(mlp(), projection), batch(4, 6)
    optimizer = stiefel.optimizer(model, cls, **hyper)
    train(model, optimizer, x)
    state, optimizer_state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, x)
    resumed = stiefel.constrain(mlp(seed=2), projection)
    resumed_optimizer = stiefel.optimizer(resumed, cls, **hyper)
    resumed.load_state_dict(state)
    resumed_optimizer.load_state_dict(optimizer_state)
    train(resumed, resumed_optimizer, x)
    assert same_state(resumed.state_dict(), model.state_dict())


def test_lifted_optimizers_take_schedulers_and_closures(projection: str) -> None:
    model, x = stiefel.constrain(mlp(), projection), batch(4, 6)
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = output(model, x).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] < 0.1
    assert optimizer.step(closure) < first
    assert stiefel.report(model).worst < 1e-5


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam])
def test_riemannian_and_lifted_weights_share_one_optimizer(projection: str, cls: type[torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    stiefel.constrain(model, "riemannian", layers="0")
    stiefel.constrain(model, projection, layers="2")
    before = state_copy(model)
    train(model, stiefel.optimizer(model, cls, lr=0.05), batch(8, 5))
    assert stiefel.report(model).worst < 1e-5
    assert all(not torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_name_is_registered_by_one_class_only(projection: str) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Impostor(Projection):
        pass

    with pytest.raises(stiefel.StiefelError, match=projection):
        stiefel.register(Impostor)
    assert stiefel.register(Projection) is Projection


def test_what_is_not_a_complete_method_is_not_registered() -> None:
    class Abstract(stiefel.Penalty):
        name = "test_abstract"

    class Nameless(Projection):
        name = None

    for wrong, missing in ((Abstract, "penalty"), (Nameless, "name"), (int, "Constraint")):
        with pytest.raises(stiefel.StiefelError, match=missing):
            stiefel.register(wrong)
    assert "test_abstract" not in stiefel.available()
