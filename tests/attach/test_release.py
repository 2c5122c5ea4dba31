"""``release``: ordinary modules with the current weights."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from contract import (
    FORWARD,
    METHODS,
    assert_feasible,
    batch,
    mlp,
    names,
    output,
    same_state,
    state_copy,
    train,
    trained,
)
from torch import nn

import stiefel
import stiefel.methods


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


@pytest.mark.sampled(3, values=False)
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


@pytest.mark.sampled(3)
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
