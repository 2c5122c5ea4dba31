"""``constrain``: what it selects, where training starts, and weights that are tied."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import (
    METHODS,
    assert_feasible,
    batch,
    gram_error,
    mlp,
    names,
    output,
    polar_factor,
    state_copy,
    tied,
    train,
)
from torch import Tensor, nn

import stiefel
import stiefel.methods
from stiefel.attach.weights import bindings_of, constrained_weights


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


@pytest.mark.sampled(4)
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


@pytest.mark.sampled(6)
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
        claim, moves = stiefel.get(method).claim, stiefel.get(method).coefficients
        if claim is not None:
            assert claim.allows(row.relative, torch.float32, 5)
        elif moves is None:  # those that move along the set leave it in second order only
            assert row.relative > 1e-5


def test_a_constraint_object_is_taken_as_it_is() -> None:
    method = stiefel.get("soft", strength=0.5, scale="relu")
    model = stiefel.constrain(mlp(), method)
    assert bindings_of(model[0])["weight"].constraint is method


@pytest.mark.sampled(4)
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


@pytest.mark.sampled(4)
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
    chosen, error = stiefel.get(method), gram_error(weight().reshape(blocks, -1, start.shape[1]))
    if chosen.claim is not None:
        assert error < chosen.claim.bound + 1e-5
    elif chosen.coefficients is None:  # steps along the set leave it to second order alone
        assert error > 1e-6


@pytest.mark.sampled(4)
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


@pytest.mark.sampled(3)
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
