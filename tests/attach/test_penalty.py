"""``penalty``: the sum of a model's penalties, their strength, and decoupled ones."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from contract import METHODS, batch, mlp, train
from torch import nn

import stiefel
import stiefel.methods
from stiefel.attach.weights import bindings_of
from stiefel.constraint import Penalized


@pytest.mark.parametrize("method", METHODS)
def test_penalty_is_a_scalar_with_a_graph_only_where_there_is_one(method: str) -> None:
    model = stiefel.constrain(mlp(), method)
    value = stiefel.penalty(model)
    assert value.shape == ()
    if isinstance(stiefel.get(method), Penalized):
        assert value.requires_grad
    else:
        assert value.item() == 0.0
        assert not value.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_penalty_of_a_plain_module_is_zero_in_its_dtype(dtype: torch.dtype) -> None:
    value = stiefel.penalty(nn.Linear(2, 2).to(dtype))
    assert (value.item(), value.dtype, value.requires_grad) == (0.0, dtype, False)
    assert stiefel.penalty(nn.ReLU()).item() == 0.0


@pytest.mark.parametrize("scale", [1.0, 3.0, "relu"])
def test_penalty_is_the_hand_formula(scale: float | str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 9), nn.Linear(9, 9), nn.Linear(6, 4)).double()
    stiefel.constrain(model, "soft", scale=scale, strength=0.3)
    s = math.sqrt(2) if scale == "relu" else scale
    expected = 0.0
    with torch.no_grad():
        for layer in model:
            layer.weight.add_(batch(*layer.weight.shape, dtype=torch.float64), alpha=0.2)
            x = (layer.weight if layer.weight.shape[0] <= layer.weight.shape[1] else layer.weight.mT) / s
            expected += (s**2 * 0.3 * (x @ x.mT - torch.eye(len(x), dtype=x.dtype)).norm() ** 2).item()
    assert stiefel.penalty(model).item() == pytest.approx(expected, rel=1e-12)


def test_penalties_pull_a_weight_back() -> None:
    model = stiefel.constrain(mlp(), "soft", strength=1.0)
    with torch.no_grad():
        model[0].weight.mul_(1.2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    before = stiefel.report(model).worst
    for _ in range(20):
        optimizer.zero_grad()
        stiefel.penalty(model).backward()
        optimizer.step()
    assert stiefel.report(model).worst < before / 100


class Recorder:
    """A strength that remembers the steps that it was asked for."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def __call__(self, step: int) -> float:
        self.steps.append(step)
        return float(step)


def scheduled(recorder: Recorder | None = None) -> tuple[nn.Linear, torch.optim.Optimizer, Recorder]:
    torch.manual_seed(0)
    recorder = recorder or Recorder()
    model = stiefel.constrain(nn.Linear(3, 3), "soft", strength=recorder)
    model(batch(2, 3)).sum().backward()
    return model, stiefel.optimizer(model, torch.optim.SGD, lr=0.01), recorder


def test_a_schedule_counts_optimizer_steps_and_not_calls() -> None:
    model, optimizer, recorder = scheduled()
    for _ in range(3):
        stiefel.penalty(model)
        stiefel.penalty(model)
        optimizer.step()
    stiefel.penalty(model)
    assert recorder.steps == [0, 0, 1, 1, 2, 2, 3]


def test_a_schedule_counts_steps_taken_before_the_first_penalty() -> None:
    model, optimizer, recorder = scheduled()
    optimizer.step()
    optimizer.step()
    stiefel.penalty(model)
    assert recorder.steps == [2]


def test_steps_of_another_models_optimizer_do_not_count() -> None:
    model, _, recorder = scheduled()
    other, other_optimizer, _ = scheduled()
    stiefel.penalty(model)
    stiefel.penalty(other)
    other_optimizer.step()
    stiefel.penalty(model)
    assert recorder.steps == [0, 0]


def test_one_step_of_a_lifted_optimizer_counts_once(projection: str) -> None:
    torch.manual_seed(0)
    recorder = Recorder()
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    stiefel.constrain(model, "soft", layers="0", strength=recorder)
    stiefel.constrain(model, projection, layers="1")
    torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)  # a plain one exists first, and its step carries the hooks
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.01)
    train(model, optimizer, batch(2, 3), steps=3)
    assert recorder.steps == [0, 1, 2]


def test_a_schedules_step_survives_checkpoint_and_copy() -> None:
    model, optimizer, _ = scheduled()
    for _ in range(3):
        stiefel.penalty(model)
        optimizer.step()
    resumed, resumed_optimizer, recorder = scheduled()
    resumed.load_state_dict(model.state_dict())
    stiefel.penalty(resumed)
    resumed_optimizer.step()
    stiefel.penalty(resumed)
    assert recorder.steps == [3, 4]

    twin = copy.deepcopy(resumed)
    twin_recorder = bindings_of(twin)["weight"].constraint.strength
    twin_optimizer = stiefel.optimizer(twin, torch.optim.SGD, lr=0.01)
    twin(batch(2, 3)).sum().backward()
    stiefel.penalty(twin)
    twin_optimizer.step()
    stiefel.penalty(twin)
    assert twin_recorder.steps[-2:] == [4, 5]
    stiefel.penalty(resumed)
    assert recorder.steps == [3, 4, 4]


def test_a_plain_checkpoint_loads_strictly_into_a_scheduled_model() -> None:
    model, _, _ = scheduled()
    model.load_state_dict(nn.Linear(3, 3).state_dict(), strict=True)


def test_a_schedules_steps_travel_in_the_metadata_of_a_checkpoint() -> None:
    # The keys are a plain module's, so that the checkpoint loads strictly into one.
    model, _, recorder = scheduled()
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.1)
    for _ in range(3):
        model(batch(2, 3)).sum().backward()
        optimizer.step()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert list(state) == ["weight", "bias"]
    nn.Linear(3, 3).load_state_dict(state, strict=True)
    resumed, _, recorder = scheduled()
    resumed.load_state_dict(state)
    stiefel.penalty(resumed)
    assert recorder.steps[-1] == 3
    assert "penalty_steps" not in stiefel.release(model).state_dict()._metadata[""]
