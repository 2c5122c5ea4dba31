"""The contract of the public calls for every method: constrain, optimizer, penalty, report, release."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from common import Projection, registered
from torch import Tensor, nn

import stiefel
import stiefel.methods
from stiefel.attach.weights import bindings_of, constrained_weights
from stiefel.layout import Layout
from stiefel.manifold.geometry import project_tangent

METHODS = stiefel.available()
FEASIBLE = [m for m in METHODS if stiefel.get(m).feasible]
FORWARD = [m for m in METHODS if stiefel.get(m).place == "forward"]
IN_PLACE = [m for m in METHODS if stiefel.get(m).place != "forward"]
NOT_STEPPED = [m for m in METHODS if stiefel.get(m).place != "step"]

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.05}),
    "momentum": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"lr": 0.02}),
}


# --- helpers ---


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def batch(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: int = 3) -> None:
    """A few steps that pull the output towards a constant; seeded, as for a network with dropout."""
    torch.manual_seed(steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (output(model, x) - 0.3).square().mean() + stiefel.penalty(model)
        loss.backward()
        optimizer.step()


def output(model: nn.Module, x: Tensor) -> Tensor:
    """What a layer returns first; a recurrent cell runs twice, since its first state is zero."""
    y = model(x, x, x) if isinstance(model, nn.MultiheadAttention) else model(x)
    if isinstance(model, nn.RNNCellBase):
        y = model(x, y)
    return y[0] if isinstance(y, tuple) else y


def names(model: nn.Module) -> list[str]:
    return [row.name for row in stiefel.report(model).rows]


def gram_error(rows: Tensor, scale: float = 1.0) -> float:
    """Largest entry of W Wᵀ/s² − I, of a matrix or a batch, by definition rather than through the library."""
    x = rows.double() / scale
    return (x @ x.mT - torch.eye(x.shape[-2], dtype=x.dtype)).abs().max().item()


def polar_factor(matrix: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ vh


def assert_feasible(model: nn.Module, method: str) -> None:
    if stiefel.get(method).feasible:
        assert stiefel.report(model).worst < 1e-5


def state_copy(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same_state(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return list(one) == list(two) and all(torch.equal(one[k], two[k]) for k in one)


# --- constrain: what is selected ---


@pytest.mark.parametrize("method", METHODS)
def test_constrain_returns_the_module_and_starts_feasible(method: str) -> None:
    model = mlp()
    assert stiefel.constrain(model, method) is model
    assert names(model) == ["0.weight", "2.weight", "4.weight"]
    assert stiefel.report(model).worst < 1e-6


def test_own_is_the_default_constraint() -> None:
    assert {row.method for row in stiefel.report(stiefel.constrain(mlp())).rows} == {"own"}


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 4), (2, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3), (2, 3, 6)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3), (2, 3, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 3, 3, 3)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 3, 3), (2, 4, 5)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 3, 3), (2, 4, 4, 4)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(3, 2, 2), (2, 3, 3, 3, 3)),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_supported_layer_is_selected_even_as_the_root_and_trains(method: str, layer: str) -> None:
    build, shape = LAYERS[layer]
    torch.manual_seed(0)
    model = stiefel.constrain(build(), method, scale="relu")
    assert names(model) == ["weight"]
    start = model.weight.detach().clone()
    train(model, stiefel.optimizer(model, torch.optim.SGD, lr=0.01, momentum=0.9), batch(*shape))
    assert not torch.equal(model.weight, start)
    assert_feasible(model, method)


@pytest.mark.parametrize("method", METHODS)
def test_other_layers_are_left_alone(method: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"e": nn.Embedding(5, 4), "n": nn.LayerNorm(4), "r": nn.GRU(4, 4), "l": nn.Linear(4, 4)})
    before = state_copy(model)
    stiefel.constrain(model, method)
    assert names(model) == ["l.weight"]
    for key, value in model.state_dict().items():
        if not key.startswith("l."):
            assert torch.equal(value, before[key])


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
        self.rnn = nn.LSTM(4, 3)
        self.attn = nn.MultiheadAttention(4, 2)
        self.basis = nn.Parameter(torch.randn(2, 3, 5))
        self.embedding = nn.Embedding(7, 4)


SELECTIONS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "names": ({"layers": ["body.0", "attn.out_proj"]}, ["body.0.weight", "attn.out_proj.weight"]),
    "one string": ({"layers": "body.0"}, ["body.0.weight"]),
    "container": ({"layers": "body"}, ["body.0.weight", "body.1.0.weight"]),
    "weight of another kind of layer": ({"layers": "embedding"}, ["embedding.weight"]),
    "recurrent tensor": ({"layers": ["rnn.weight_hh_l0"]}, ["rnn.weight_hh_l0"]),
    "attention tensor": ({"layers": "attn.in_proj_weight"}, ["attn.in_proj_weight"]),
    "bare parameter": ({"layers": "basis"}, ["basis"]),
    "predicate": ({"layers": lambda name, layer: name.endswith("0")}, ["body.0.weight", "body.1.0.weight"]),
    "exclude a layer": ({"exclude": ["attn.out_proj"]}, ["body.0.weight", "body.1.0.weight"]),
    "exclude one string": ({"exclude": "body.0"}, ["body.1.0.weight", "attn.out_proj.weight"]),
    "exclude a container": ({"exclude": "body"}, ["attn.out_proj.weight"]),
    "exclude a tensor": ({"layers": "body", "exclude": "body.0.weight"}, ["body.1.0.weight"]),
    "exclude from a predicate": ({"layers": lambda name, layer: True, "exclude": "body"}, ["attn.out_proj.weight"]),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_layers_and_exclude(method: str, selection: str) -> None:
    arguments, expected = SELECTIONS[selection]
    torch.manual_seed(0)
    model = Nested()
    stiefel.constrain(model, method, **arguments)
    assert sorted(names(model)) == sorted(expected)


def test_a_predicate_sees_the_layers_name_and_the_layer() -> None:
    seen: dict[str, nn.Module] = {}
    model = mlp()
    stiefel.constrain(model, "soft", layers=lambda name, layer: seen.setdefault(name, layer) is not None)
    assert seen == {"0": model[0], "2": model[2], "4": model[4]}


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_used_twice_can_be_named_by_either_of_its_names(method: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": layer, "second": layer})
    stiefel.constrain(model, method, layers="second")
    assert len(stiefel.report(model).rows) == 1


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam])
def test_parts_of_one_model_carry_different_methods_under_one_optimizer(cls: type[torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(5, 5) for _ in METHODS], nn.Linear(5, 2))
    for i, method in enumerate(METHODS):
        stiefel.constrain(model, method, layers=str(i))
    assert [row.method for row in stiefel.report(model).rows] == METHODS
    before = [layer.weight.detach().clone() for layer in model]
    train(model, stiefel.optimizer(model, cls, lr=0.05), batch(8, 5))
    for layer, old in zip(model, before, strict=True):
        assert not torch.equal(layer.weight, old)
    for row, method in zip(stiefel.report(model).rows, METHODS, strict=True):
        claim = stiefel.get(method).claim
        assert row.relative > 1e-5 if claim is None else claim.allows(row.relative, torch.float32, 5)


def test_a_constraint_object_is_taken_as_it_is() -> None:
    method = stiefel.get("soft", strength=0.5, scale="relu")
    model = stiefel.constrain(mlp(), method)
    assert bindings_of(model[0])["weight"].constraint is method


# --- constrain: where training starts ---


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1.0, "relu", 0.5])
@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (5, 5)])
def test_training_starts_at_the_scaled_polar_factor(method: str, scale: float | str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0]).double()
    s = math.sqrt(2) if scale == "relu" else scale
    expected = s * polar_factor(layer.weight.detach())
    options = stiefel.get(method).comparison  # uncentred, so that all methods have one set
    stiefel.constrain(layer, method, scale=scale, **options)
    assert layer.weight.dtype == torch.float64
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=0, atol=1e-12)


def test_centred_own_starts_at_the_polar_factor_of_the_centred_weight() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(7, 3).double()
    v = layer.weight.detach()
    expected = polar_factor(v - v.mean(dim=1, keepdim=True))
    stiefel.constrain(layer, "own")
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=0, atol=1e-12)
    assert layer.weight.sum(dim=1).abs().max() < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_groups_of_rows_are_orthonormal(method: str) -> None:
    torch.manual_seed(0)
    layer = stiefel.constrain(nn.Linear(4, 6), method, group_size=3)
    assert gram_error(layer.weight.detach().reshape(2, 3, 4)) < 1e-6


PACKED: dict[str, tuple[Callable[[], nn.Module], str, int, tuple[int, ...]]] = {
    "rnn": (lambda: nn.RNN(4, 5), "weight_hh_l0", 1, (3, 2, 4)),
    "lstm": (lambda: nn.LSTM(4, 5), "weight_hh_l0", 4, (3, 2, 4)),
    "gru": (lambda: nn.GRU(4, 5, num_layers=2, bidirectional=True), "weight_hh_l1_reverse", 3, (3, 2, 4)),
    "lstm input": (lambda: nn.LSTM(4, 3), "weight_ih_l0", 4, (3, 2, 4)),
    "lstm cell": (lambda: nn.LSTMCell(4, 5), "weight_hh", 4, (2, 4)),
    "gru cell": (lambda: nn.GRUCell(4, 5), "weight_hh", 3, (2, 4)),
    "rnn cell": (lambda: nn.RNNCell(4, 5), "weight_hh", 1, (2, 4)),
    "attention": (lambda: nn.MultiheadAttention(4, 2), "in_proj_weight", 3, (3, 2, 4)),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("packed", PACKED)
def test_packed_weights_are_orthogonal_per_block_and_train(method: str, packed: str) -> None:
    build, tensor, blocks, shape = PACKED[packed]
    torch.manual_seed(0)
    model = stiefel.constrain(build(), method, layers=tensor)

    def weight() -> Tensor:
        return getattr(model, tensor).detach().clone()

    start = weight()
    assert gram_error(start.reshape(blocks, -1, start.shape[1])) < 1e-6
    x = batch(*shape)
    before = output(model, x).detach()
    train(model, stiefel.optimizer(model, torch.optim.SGD, lr=0.2), x)
    assert (weight() - start).abs().max() > 1e-6
    assert not torch.equal(output(model, x), before)
    claim, error = stiefel.get(method).claim, gram_error(weight().reshape(blocks, -1, start.shape[1]))
    assert error > 1e-6 if claim is None else error < claim.bound + 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("packed", PACKED)
def test_the_layer_computes_with_the_constrained_weight(method: str, packed: str) -> None:
    build, tensor, _, shape = PACKED[packed]
    torch.manual_seed(0)
    model, plain, x = build(), build(), batch(*shape)
    stiefel.constrain(model, method, layers=tensor, scale=0.7)
    train(model, stiefel.optimizer(model, torch.optim.SGD, lr=0.1), x)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            owner = model.get_submodule(name.rpartition(".")[0])
            parameter.copy_(getattr(owner, name.rpartition(".")[2]))
    torch.testing.assert_close(output(model, x), output(plain, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("packed", ["rnn", "lstm", "attention"])
def test_packed_weights_survive_a_copy_after_use(method: str, packed: str) -> None:
    build, tensor, _, shape = PACKED[packed]
    torch.manual_seed(0)
    model, x = stiefel.constrain(build(), method, layers=tensor), batch(*shape)
    expected = output(model, x)
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin, x), expected)
    train(twin, stiefel.optimizer(twin, torch.optim.SGD, lr=0.1), x)
    assert torch.equal(output(model, x), expected)
    assert not torch.equal(output(twin, x), expected)
    assert_feasible(twin, method)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_what_the_optimizer_trains(method: str) -> None:
    torch.manual_seed(0)
    model = stiefel.constrain(nn.LSTM(4, 5), method, layers="weight_hh_l0")
    output(model, batch(3, 2, 4)).sum().backward()
    (found,) = constrained_weights(model)
    assert found.parameter.is_leaf
    assert any(found.parameter is p for p in model.parameters())
    assert found.parameter.grad is not None
    assert found.parameter.grad.abs().max() > 0


@pytest.mark.parametrize("method", METHODS)
def test_the_last_two_dimensions_of_a_bare_parameter_are_a_matrix(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Module()
    model.basis = nn.Parameter(torch.randn(2, 3, 4, 6))
    stiefel.constrain(model, method, layers="basis")
    assert gram_error(model.basis.detach()) < 1e-6
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.05)
    start = model.basis.detach().clone()
    (model.basis * batch(2, 3, 4, 6)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.basis, start)
    assert_feasible(model, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolution_kernels_are_flattened_per_group(method: str, groups: int) -> None:
    torch.manual_seed(0)
    conv = stiefel.constrain(nn.Conv2d(4, 8, 3, groups=groups), method)
    assert gram_error(conv.weight.detach().reshape(groups, 8 // groups, -1)) < 1e-6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_transposed_kernels_are_read_as_outputs_by_inputs(method: str, groups: int) -> None:
    torch.manual_seed(0)
    conv = stiefel.constrain(nn.ConvTranspose2d(8, 4, 3, groups=groups), method)
    kernels = conv.weight.detach().reshape(groups, 8 // groups, 4 // groups, 9)
    assert gram_error(kernels.transpose(1, 2).reshape(groups, 4 // groups, -1)) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_depthwise_filters_are_unit_vectors(method: str) -> None:
    torch.manual_seed(0)
    conv = stiefel.constrain(nn.Conv2d(6, 6, 3, groups=6), method, scale=2.0)
    torch.testing.assert_close(conv.weight.detach().flatten(1).norm(dim=1), torch.full((6,), 2.0))


# --- penalty ---


@pytest.mark.parametrize("method", METHODS)
def test_penalty_is_a_scalar_with_a_graph_only_where_there_is_one(method: str) -> None:
    model = stiefel.constrain(mlp(), method)
    value = stiefel.penalty(model)
    assert value.shape == ()
    if stiefel.get(method).place == "loss":
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


# --- optimizer ---


@pytest.mark.parametrize("method", NOT_STEPPED)
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.LBFGS])
def test_the_optimizer_is_cls_itself_where_the_method_acts_elsewhere(
    method: str, cls: type[torch.optim.Optimizer]
) -> None:
    assert type(stiefel.optimizer(stiefel.constrain(mlp(), method), cls, lr=0.1)) is cls


def test_the_optimizer_is_geoopts_for_riemannian_weights() -> None:
    model = stiefel.constrain(mlp(), "riemannian")
    import geoopt

    assert isinstance(stiefel.optimizer(model, torch.optim.SGD, lr=0.1), geoopt.optim.RiemannianSGD)
    assert isinstance(stiefel.optimizer(model, torch.optim.Adam, lr=0.1), geoopt.optim.RiemannianAdam)
    assert isinstance(model[0].weight, geoopt.ManifoldParameter)


def test_the_optimizer_of_a_plain_module_is_cls_itself() -> None:
    assert type(stiefel.optimizer(mlp(), torch.optim.SGD, lr=0.1)) is torch.optim.SGD


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("choice", OPTIMIZERS)
def test_training_lowers_the_loss_and_stays_on_the_set(method: str, choice: str) -> None:
    cls, hyper = OPTIMIZERS[choice]
    model, x = stiefel.constrain(mlp(), method), batch(16, 6)
    optimizer = stiefel.optimizer(model, cls, **hyper)
    before = (output(model, x) - 0.3).square().mean().item()
    start = [model[i].weight.detach().clone() for i in (0, 2, 4)]
    train(model, optimizer, x, steps=150)
    assert (output(model, x) - 0.3).square().mean().item() < before / 2
    for i, old in zip((0, 2, 4), start, strict=True):
        assert not torch.equal(model[i].weight, old)
    assert_feasible(model, method)


@pytest.mark.parametrize("method", METHODS)
def test_all_parameters_are_trained_unless_params_says_otherwise(method: str) -> None:
    model = stiefel.constrain(mlp(), method)
    (group,) = stiefel.optimizer(model, torch.optim.SGD, lr=0.1).param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]

    groups = [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters()}]
    optimizer = stiefel.optimizer(model, torch.optim.SGD, groups, lr=0.01)
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.01]
    first, last = model[0].weight.detach().clone(), model[4].weight.detach().clone()
    train(model, optimizer, batch(4, 6))
    assert not torch.equal(model[0].weight, first)
    assert torch.equal(model[4].weight, last)
    assert_feasible(model, method)


@pytest.mark.parametrize("method", METHODS)
def test_each_groups_rate_is_used(method: str) -> None:
    """A group with rate zero stands still beside one that moves."""
    torch.manual_seed(0)
    model = stiefel.constrain(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), method)
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[1].parameters(), "lr": 0.1}]
    still, moves = (model[i].weight.detach().clone() for i in (0, 1))
    train(model, stiefel.optimizer(model, torch.optim.SGD, groups), batch(4, 4), steps=1)
    torch.testing.assert_close(model[0].weight.detach(), still, rtol=0, atol=1e-6)
    assert (model[1].weight - moves).abs().max() > 1e-4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("choice", OPTIMIZERS)
def test_schedulers_set_the_rate(method: str, choice: str) -> None:
    cls, hyper = OPTIMIZERS[choice]
    model = stiefel.constrain(mlp(), method)
    optimizer = stiefel.optimizer(model, cls, **hyper)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for k in range(3):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(hyper["lr"] * 0.5**k)
        train(model, optimizer, batch(4, 6), steps=1)
        scheduler.step()
    assert_feasible(model, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam])
def test_a_gradient_scaler_changes_nothing_but_skips_infinite_steps(
    method: str, cls: type[torch.optim.Optimizer]
) -> None:
    x = batch(4, 6, dtype=torch.float64)
    plain, scaled = (stiefel.constrain(mlp().double(), method) for _ in range(2))
    train(plain, stiefel.optimizer(plain, cls, lr=0.05), x, steps=1)
    optimizer, scaler = stiefel.optimizer(scaled, cls, lr=0.05), torch.amp.GradScaler("cpu", init_scale=1024.0)
    torch.manual_seed(1)  # as train does
    scaler.scale((output(scaled, x) - 0.3).square().mean() + stiefel.penalty(scaled)).backward()
    scaler.step(optimizer)
    scaler.update()
    for one, two in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(one.detach().as_subclass(Tensor), two.detach().as_subclass(Tensor))
    before = state_copy(scaled)
    for p in scaled.parameters():
        p.grad = torch.full_like(p, float("inf")).as_subclass(Tensor)
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    scaler.update()
    assert same_state(scaled.state_dict(), before)


@pytest.mark.parametrize("method", METHODS)
def test_a_closure_is_evaluated_once_and_its_loss_returned(method: str) -> None:
    model, x, calls = stiefel.constrain(mlp(), method), batch(4, 6), []
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.05)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = output(model, x).square().mean() + stiefel.penalty(model)
        loss.backward()
        calls.append(loss.item())
        return loss

    returned = optimizer.step(closure)
    assert calls == [returned.item()]
    assert_feasible(model, method)


@pytest.mark.parametrize("method", METHODS)
def test_frozen_weights_start_on_the_set_and_stay(method: str) -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    stiefel.constrain(model, method)
    (found, *_) = constrained_weights(model)
    assert not found.parameter.requires_grad
    start = model[0].weight.detach().clone()
    train(model, stiefel.optimizer(model, torch.optim.SGD, lr=0.05, momentum=0.9), batch(4, 6))
    assert torch.equal(model[0].weight, start)
    assert gram_error(start.mT) < 1e-6
    stiefel.release(model)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True, True, True]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("choice", OPTIMIZERS)
def test_a_late_first_gradient(method: str, choice: str) -> None:
    cls, hyper = OPTIMIZERS[choice]
    torch.manual_seed(0)
    model = stiefel.constrain(nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)]), method)
    optimizer, x = stiefel.optimizer(model, cls, **hyper), batch(4, 5)
    late = model[1].weight.detach().clone()
    for step in range(4):
        optimizer.zero_grad()
        y = model[0](x)
        if step == 1:
            assert torch.equal(model[1].weight, late)
        (model[1](y) if step >= 2 else y).square().mean().backward()
        optimizer.step()
    assert not torch.equal(model[1].weight, late)
    assert_feasible(model, method)


# --- tied weights ---


def tied() -> nn.ModuleDict:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(5, 5, bias=False), "b": nn.Linear(5, 5, bias=False)})
    model["b"].weight = model["a"].weight
    return model


def tied_loss(model: nn.ModuleDict) -> Tensor:
    return (model["b"](torch.tanh(model["a"](batch(4, 5)))) - 0.3).square().mean() + stiefel.penalty(model)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["fixed", "learnable"])
def test_tied_weights_stay_one_weight(method: str, kind: str) -> None:
    if kind == "learnable" and not stiefel.get(method).can_learn_scale:
        with pytest.raises(stiefel.OptionError):
            stiefel.constrain(tied(), method, scale="learnable")
        return
    model = stiefel.constrain(tied(), method, scale="learnable" if kind == "learnable" else 1.5)
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.1)
    start = model["a"].weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        tied_loss(model).backward()
        optimizer.step()
    assert not torch.equal(model["a"].weight, start)
    assert torch.equal(model["a"].weight, model["b"].weight)
    assert_feasible(model, method)


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_of_tied_weights_is_tied(method: str) -> None:
    twin = copy.deepcopy(stiefel.constrain(tied(), method))
    optimizer = stiefel.optimizer(twin, torch.optim.SGD, lr=0.1)
    tied_loss(twin).backward()
    optimizer.step()
    assert torch.equal(twin["a"].weight, twin["b"].weight)
    (one, two) = constrained_weights(twin, ties=True)
    assert one.parameter is two.parameter


@pytest.mark.parametrize("method", METHODS)
def test_releasing_tied_weights_keeps_tie_and_values(method: str) -> None:
    model = stiefel.constrain(tied(), method, scale="relu")
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.3)
    for _ in range(5):
        optimizer.zero_grad()
        tied_loss(model).backward()
        optimizer.step()
    weight, loss = model["a"].weight.detach().clone(), model["b"](model["a"](batch(4, 5))).detach()
    stiefel.release(model)
    assert model["a"].weight is model["b"].weight
    assert torch.equal(model["a"].weight, weight)
    assert torch.equal(model["b"](model["a"](batch(4, 5))), loss)


# --- report ---


@pytest.mark.parametrize("method", METHODS)
def test_report_measures_by_definition(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 8))
    stiefel.constrain(model, method, scale=2.0)
    with torch.no_grad():
        for found in constrained_weights(model):
            found.parameter.data.add_(batch(*found.parameter.shape), alpha=0.01)
    report, expected = stiefel.report(model), []
    for row, w in zip(report.rows, (model[0].weight.detach(), model[1].weight.detach().mT), strict=True):
        x = w.double() / 2.0
        sigma = torch.linalg.svdvals(x)
        error = (x @ x.mT - torch.eye(len(x), dtype=x.dtype)).norm().item()
        assert row.scale == 2.0
        assert row.method == method
        assert row.error == pytest.approx(error, rel=1e-6, abs=1e-12)
        assert row.relative == pytest.approx(error / math.sqrt(len(x)), rel=1e-6, abs=1e-12)
        assert row.sigma_max == pytest.approx(sigma[0].item(), rel=1e-9)
        assert row.sigma_min == pytest.approx(sigma[-1].item(), rel=1e-9)
        assert row.condition == pytest.approx((sigma[0] / sigma[-1]).item(), rel=1e-9)
        expected.append(row.relative)
    assert report.worst == max(expected)


@pytest.mark.parametrize("method", METHODS)
def test_report_is_a_table_and_json(method: str) -> None:
    report = stiefel.report(stiefel.constrain(mlp(), method, scale="relu"))
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["worst"] == report.worst
    assert [row["name"] for row in data["weights"]] == ["0.weight", "2.weight", "4.weight"]
    lines = str(report).splitlines()
    assert lines[0].split()[:4] == ["weight", "method", "layout", "scale"]
    rows = [line for line in lines if method in line]
    assert len(rows) == 3
    assert all("1.414" in row for row in rows)
    assert "8×6 columns" in rows[0]


def test_report_of_a_nan_weight_is_nan_and_never_fine() -> None:
    model = stiefel.constrain(mlp(), "unconstrained")
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    report = stiefel.report(model)
    assert math.isnan(report.worst)
    assert math.isnan(report.rows[1].sigma_max)
    assert report.rows[0].relative < 1e-6


@pytest.mark.parametrize("method", [m for m in FORWARD if stiefel.get(m).can_learn_scale and stiefel.get(m).feasible])
def test_report_divides_by_learned_scales(method: str) -> None:
    torch.manual_seed(0)
    model = stiefel.constrain(nn.Linear(6, 4), method, scale="learnable")
    start = model.weight.detach().clone()
    train(model, stiefel.optimizer(model, torch.optim.SGD, lr=0.5), batch(8, 6), steps=5)
    assert gram_error(start) < 1e-6
    assert gram_error(model.weight.detach()) > 1e-3
    report = stiefel.report(model)
    assert report.worst < 1e-5
    assert report.rows[0].scale == "learnable"


# --- release ---


def trained(method: str, steps: int = 3) -> nn.Sequential:
    model = stiefel.constrain(mlp(), method, scale="relu")
    train(model, stiefel.optimizer(model, torch.optim.SGD, lr=0.05), batch(4, 6), steps=steps)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_release_leaves_an_ordinary_module(method: str) -> None:
    model, plain, x = trained(method), mlp(), batch(4, 6)
    expected = model(x)
    assert stiefel.release(model) is model
    assert torch.equal(model(x), expected)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert [type(p) for p in model.parameters()] == [nn.Parameter] * 6
    assert all(p.is_contiguous() for p in model.parameters())
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [set(vars(m)) for m in model.modules()] == [set(vars(m)) for m in plain.modules()]
    for one, two in zip(model.modules(), plain.modules(), strict=True):
        for hooks in ("_state_dict_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"):
            assert len(getattr(one, hooks)) == len(getattr(two, hooks))
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(plain(x), expected)
    with pytest.raises(stiefel.SelectionError):
        stiefel.report(model)


@pytest.mark.parametrize("method", METHODS)
def test_a_released_model_is_pickled_trained_and_constrained_again(method: str) -> None:
    model, x, file = stiefel.release(trained(method)), batch(4, 6), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x), model(x))
    before = model[0].weight.detach().clone()
    train(model, torch.optim.SGD(model.parameters(), lr=0.05), x)
    assert not torch.equal(model[0].weight, before)
    for again in METHODS:
        stiefel.constrain(loaded, again)
        train(loaded, stiefel.optimizer(loaded, torch.optim.SGD, lr=0.01), x)
        assert_feasible(loaded, again)
        stiefel.release(loaded)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("released", ["copy", "original"])
def test_releasing_a_copy_or_its_original_does_not_hurt_the_other(method: str, released: str) -> None:
    original, x = trained(method), batch(4, 6)
    twin = copy.deepcopy(original)
    freed, kept = (twin, original) if released == "copy" else (original, twin)
    expected = kept(x)
    stiefel.release(freed)
    assert torch.equal(kept(x), expected)
    assert len(stiefel.report(kept).rows) == 3
    train(kept, stiefel.optimizer(kept, torch.optim.SGD, lr=0.05), x)
    assert_feasible(kept, method)
    assert torch.equal(freed(x), expected)
    stiefel.release(kept)


@pytest.mark.parametrize("method", METHODS)
def test_release_of_part_of_a_model(method: str) -> None:
    model = trained(method)
    stiefel.release(model[2])
    assert names(model) == ["0.weight", "4.weight"]


def test_release_of_a_plain_module_does_nothing() -> None:
    model = mlp()
    before = state_copy(model)
    assert stiefel.release(model) is model
    assert same_state(model.state_dict(), before)


@pytest.mark.parametrize("method", [m for m in FORWARD if stiefel.get(m).can_learn_scale])
def test_release_with_learned_scales_keeps_the_function(method: str) -> None:
    torch.manual_seed(0)
    model, x = stiefel.constrain(nn.Linear(6, 4), method, scale="learnable"), batch(8, 6)
    train(model, stiefel.optimizer(model, torch.optim.SGD, lr=0.5), x, steps=5)
    expected = model(x)
    stiefel.release(model)
    assert torch.equal(model(x), expected)
    assert [n for n, _ in model.named_parameters()] == ["weight", "bias"]


@pytest.mark.parametrize("method", METHODS)
def test_several_tensors_of_one_layer(method: str) -> None:
    torch.manual_seed(0)
    model, x = nn.LSTM(5, 5, num_layers=2), batch(3, 2, 5)
    plain = copy.deepcopy(model)
    tensors = ["weight_hh_l1", "weight_ih_l0", "weight_hh_l0"]
    stiefel.constrain(model, method, layers=tensors)
    assert sorted(names(model)) == sorted(tensors)
    train(model, stiefel.optimizer(model, torch.optim.SGD, lr=0.1), x)
    assert_feasible(model, method)
    expected = output(model, x)
    stiefel.release(model)
    assert torch.equal(output(model, x), expected)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]


# --- copies, dtypes, checkpoints ---


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


# --- methods registered by a user ---


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


@pytest.fixture
def projection() -> Iterator[str]:
    yield from registered(Projection)


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


# --- precision ---


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


# --- memory formats ---


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
