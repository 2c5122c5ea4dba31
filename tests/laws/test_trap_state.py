"""Traps 11 and 13: ``load(save(W)) = W``, training goes on bit for bit; averages come back to the set."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from traps import (
    SHAPES,
    STEPPED,
    VARIANTS,
    gaussian,
    holds,
    linear,
    orthonormal,
    over,
    pogo_optimizer,
    residual,
    trained_tensor,
)

import stiefel
from stiefel.attach.weights import bindings_of
from stiefel.constraint import Penalized

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


@pytest.mark.sampled(3)
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
    # A random method draws by the number of steps taken.
    bindings_of(alone.late)["weight"].tally.steps = bindings_of(model.late)["weight"].tally.steps - 1
    (stiefel.penalty(alone.late) + (alone.late.weight * gaussian(4, 7, seed=9)).sum()).backward()
    optimizer.step()
    # The early weight's moments or step count would change the late one's first step by a factor.
    torch.testing.assert_close(model.late.weight, alone.late.weight, rtol=0, atol=1e-12)
    assert (model.late.weight - start).norm() > 1e-3


@pytest.mark.sampled(3)
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


AVERAGES = {"swa": None, "ema": get_ema_multi_avg_fn(0.7)}


@pytest.mark.sampled(3)
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
        held = method.place == "forward" and not isinstance(method, Penalized)
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


@pytest.mark.sampled(3)
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
