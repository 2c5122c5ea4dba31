"""Copies, precisions, checkpoints and memory formats of constrained models."""

from __future__ import annotations

import copy
import io
import math
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from contract import (
    FEASIBLE,
    IN_PLACE,
    METHODS,
    OPTIMIZERS,
    assert_feasible,
    batch,
    mlp,
    polar_factor,
    same_state,
    state_copy,
    tied,
    train,
    trained,
)
from torch import nn

import stiefel
import stiefel.methods


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("choice", OPTIMIZERS)
def test_a_deep_copy_is_independent_and_trains(method: str, choice: str) -> None:
    cls, hyper = OPTIMIZERS[choice]
    original, x = trained(method), batch(4, 6)
    before, twin = state_copy(original), copy.deepcopy(original)
    optimizer = stiefel.optimizer(twin, cls, **hyper)
    weights = [twin[i].weight.detach().clone() for i in (0, 2, 4)]
    train(twin, optimizer, x)
    assert all(not torch.equal(twin[i].weight, w) for i, w in zip((0, 2, 4), weights, strict=True))
    assert same_state(original.state_dict(), before)
    assert_feasible(twin, method)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("when", ["before the optimizer", "after the optimizer"])
def test_double_precision(method: str, when: str) -> None:
    model, x = trained(method), batch(4, 6, dtype=torch.float64)
    if when == "before the optimizer":
        model.to(torch.float64)
        optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.05)
    else:
        optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.05)
        model.to(torch.float64)
    train(model, optimizer, x, steps=3)
    assert model[0].weight.dtype == torch.float64
    if stiefel.get(method).feasible:
        assert stiefel.report(model).worst < 1e-12


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("choice", OPTIMIZERS)
@pytest.mark.parametrize("through", ["memory", "file"])
def test_training_resumes_bit_for_bit(method: str, choice: str, through: str) -> None:
    cls, hyper = OPTIMIZERS[choice]
    x, model = batch(4, 6), stiefel.constrain(mlp(), method, scale="relu")
    optimizer = stiefel.optimizer(model, cls, **hyper)
    train(model, optimizer, x, steps=3)
    checkpoint: Any = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    if through == "file":
        file = io.BytesIO()
        torch.save(checkpoint, file)
        file.seek(0)
        checkpoint = torch.load(file)
    train(model, optimizer, x, steps=3)
    resumed = stiefel.constrain(mlp(seed=5), method, scale="relu")
    resumed_optimizer = stiefel.optimizer(resumed, cls, **hyper)
    resumed.load_state_dict(checkpoint[0])
    resumed_optimizer.load_state_dict(checkpoint[1])
    train(resumed, resumed_optimizer, x, steps=3)
    assert same_state(resumed.state_dict(), model.state_dict())


@pytest.mark.parametrize("method", IN_PLACE)
def test_checkpoints_are_interchangeable_with_plain_models(method: str) -> None:
    model, plain, x = trained(method), mlp(seed=7), batch(4, 6)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file), strict=True)
    assert torch.equal(plain(x), model(x))
    other = stiefel.constrain(mlp(seed=8), method, scale="relu")
    other.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("method", METHODS)
def test_assigning_a_checkpoint_keeps_the_method_at_work(method: str) -> None:
    source, model, x = trained(method), stiefel.constrain(mlp(seed=3), method, scale="relu"), batch(4, 6)
    model.load_state_dict(state_copy(source), assign=True)
    assert torch.equal(model(x), source(x))
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.1)
    start = model[0].weight.detach().clone()
    train(model, optimizer, x)
    assert not torch.equal(model[0].weight, start)
    assert_feasible(model, method)
    if stiefel.get(method).place == "step":
        with pytest.raises(stiefel.OptimizerError, match=r"0\.weight"):
            torch.optim.SGD(model.parameters(), lr=0.1).step()


@pytest.mark.parametrize("assign", [False, True])
def test_loading_weights_off_the_manifold_warns_and_projects(assign: bool) -> None:
    plain = mlp(seed=4)
    model = stiefel.constrain(mlp(), "riemannian", scale="relu")
    with pytest.warns(UserWarning, match="loaded off its constraint's set") as caught:
        model.load_state_dict(state_copy(plain), assign=assign)
    assert [str(w.message).split()[1] for w in caught] == ["'0.weight'", "'2.weight'", "'4.weight'"]
    for i in (0, 2, 4):
        expected = math.sqrt(2) * polar_factor(plain[i].weight.detach())
        torch.testing.assert_close(model[i].weight.detach().double(), expected, rtol=0, atol=1e-5)


def test_the_nearest_point_is_taken_at_the_learned_scale() -> None:
    torch.manual_seed(0)
    model = stiefel.constrain(nn.Linear(6, 4, bias=False).double(), "cayley", scale="learnable")
    parametrization = model.parametrizations.weight[0]
    with torch.no_grad():
        parametrization.gain.copy_(torch.tensor([1.0, 2.0, 3.0, 0.5]))
        parametrization.parts.base.add_(0.01 * batch(4, 6, dtype=torch.float64))
    gain = parametrization.gain.detach().unsqueeze(-1)
    expected = gain * polar_factor(model.weight.detach() / gain)
    stiefel.project(model)
    torch.testing.assert_close(model.weight.detach(), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("method", FEASIBLE)
def test_loading_tied_weights_off_the_set_leaves_both_on_it(method: str) -> None:
    model = stiefel.constrain(tied(), method)
    loaded = {key: value * 1.1 for key, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the projection's own, tested above
        model.load_state_dict(loaded)
    assert torch.equal(model["a"].weight, model["b"].weight)
    assert stiefel.report(model).worst < 1e-6


@dataclass
class Ramp:
    """A schedule that is no function, and has no hash."""

    top: float

    def __call__(self, step: int) -> float:
        return min(self.top, 0.1 * step)


def test_a_schedule_may_be_any_callable_object() -> None:
    model = stiefel.constrain(nn.Linear(3, 3), "soft", strength=Ramp(1.0))
    assert stiefel.penalty(model).item() == 0.0


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_full_precision_restores_what_the_user_set(setting: str) -> None:
    from stiefel.linalg import full_precision

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        for device in ("cpu", "cuda"):  # the switches exist without the device
            products = torch.backends.cuda.matmul if device == "cuda" else torch.backends.mkldnn.matmul
            outside = products.fp32_precision
            with full_precision(torch.device(device)):
                assert products.fp32_precision == "ieee"
            assert products.fp32_precision == outside
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_reparameterized_model_in_bfloat16_says_what_to_do() -> None:
    model = stiefel.constrain(nn.Linear(4, 3), "own").to(torch.bfloat16)
    with pytest.raises(stiefel.WeightError, match="release"):
        model(torch.zeros(1, 4, dtype=torch.bfloat16))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{}, {"group_size": 2}], ids=["plain", "grouped"])
def test_equal_convolutions_in_channels_last(method: str, options: dict[str, Any]) -> None:
    def trained(memory_format: torch.memory_format) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1)).double()
        stiefel.constrain(model, method, **options)
        model = model.to(memory_format=memory_format)
        train(model, stiefel.optimizer(model, torch.optim.SGD, lr=0.01), batch(2, 4, 5, 5, dtype=torch.float64))
        return model

    usual, last = trained(torch.contiguous_format), trained(torch.channels_last)
    for before, after in zip((usual[0].weight, usual[2].weight), (last[0].weight, last[2].weight), strict=True):
        torch.testing.assert_close(before, after)
