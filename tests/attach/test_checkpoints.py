"""Checkpoints of one method, or of none, loaded into another: the weights move over, or it is refused by name."""

from __future__ import annotations

import copy
import io
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from contract import METHODS, batch, mlp, train
from torch import Tensor, nn

import stiefel
from stiefel.attach.weights import bindings_of
from stiefel.layout import Layout

PROXIED = [m for m in METHODS if stiefel.get(m).place == "forward"]
HELD = [m for m in METHODS if stiefel.get(m).feasible]
LAYERS = (0, 2, 4)


def trained(method: str, seed: int = 0, **options: Any) -> nn.Module:
    model = stiefel.constrain(mlp(seed=seed), method, **options)
    train(model, stiefel.optimizer(model, torch.optim.SGD, lr=0.3), batch(4, 6), steps=5)
    return model


def through_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def weights(model: nn.Module) -> list[Tensor]:
    return [model[i].weight.detach().clone() for i in LAYERS]


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).norm() / y.norm()) for x, y in zip(a, b, strict=True))


@pytest.mark.sampled(8)
@pytest.mark.parametrize("saved", METHODS)
@pytest.mark.parametrize("loaded", METHODS)
@pytest.mark.parametrize("strict", [True, False])
def test_between_any_two_methods_the_weight_moves_over_or_its_move_is_told(saved, loaded, strict):
    source, model = trained(saved, seed=1, scale="relu"), stiefel.constrain(mlp(), loaded, scale="relu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.load_state_dict(through_file(source.state_dict()), strict=strict)
    moved = distance(weights(model), weights(source))
    told = [w for w in caught if "nearest point" in str(w.message) and ".weight'" in str(w.message)]
    if saved == loaded or (saved in HELD and not told):
        assert moved <= 2e-5
    else:
        assert bool(told) == (moved > 1e-4) or moved < 1e-3
        assert moved <= 1.5
    assert saved != loaded or not told
    train(model, stiefel.optimizer(model, torch.optim.SGD, lr=0.1), batch(4, 6), steps=2)
    if loaded in HELD:
        assert stiefel.report(model).worst < 1e-5


@pytest.mark.parametrize(
    ("method", "first", "second"),
    [
        ("own", {"scale": "relu"}, {}),
        ("cayley", {"scale": "relu"}, {}),
        ("householder", {}, {"scale": "relu"}),
        ("own", {"group_size": 2}, {}),
        ("bjorck", {"iterations": 30}, {"iterations": 2}),
        ("oni", {"iterations": 3}, {}),
        ("torch_orthogonal", {"map": "matrix_exp"}, {"map": "cayley"}),
        ("own", {}, {"center": False}),
        ("own", {"scale": "learnable"}, {"scale": "relu"}),
        ("own", {"scale": "relu"}, {"scale": "learnable"}),
    ],
)
def test_between_options_the_weight_moves_over_or_its_move_is_told(method, first, second):
    source = stiefel.constrain(mlp(seed=1), method, layers=["2"], **first)
    train(source, stiefel.optimizer(source, torch.optim.SGD, lr=0.3), batch(4, 6), steps=5)
    model = stiefel.constrain(mlp(), method, layers=["2"], **second)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.load_state_dict(source.state_dict())
    moved = distance([model[2].weight.detach()], [source[2].weight.detach()])
    told = [str(w.message) for w in caught]
    assert (moved > 1e-5) == bool(told)
    if told:
        assert "'2.weight'" in told[0]
        assert f"{moved:.1e}" in told[0]  # how far


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strict", [True, False])
def test_a_plain_checkpoint_says_how_far_each_weight_has_moved(method, strict):
    plain, model = mlp(seed=4), stiefel.constrain(mlp(), method)
    expected = stiefel.release(stiefel.constrain(copy.deepcopy(plain), method))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.load_state_dict(through_file(plain.state_dict()), strict=strict)
    told = [str(w.message) for w in caught if "nearest point" in str(w.message)]
    moved = distance(weights(model), weights(plain))
    if stiefel.get(method).claim is None and method not in PROXIED:
        assert moved == 0
        assert not told
        return
    assert sorted(t.split("'")[1] for t in told) == ["0.weight", "2.weight", "4.weight"] or moved < 1e-6
    if method in HELD:
        assert distance(weights(model), weights(expected)) < 1e-6


@pytest.mark.parametrize("method", PROXIED)
@pytest.mark.parametrize("to", ["same", "other"])
def test_a_checkpoint_without_metadata_goes_into_its_own_method_or_is_refused(method, to):
    source = trained(method, seed=1)
    state = OrderedDict(through_file(source.state_dict()))  # a copy without the metadata, as safetensors keeps it
    if to == "same":
        model = stiefel.constrain(mlp(), method)
        model.load_state_dict(state)
        assert distance(weights(model), weights(source)) == 0
        return
    with pytest.raises(stiefel.WeightError, match=r"'0\.weight' was saved as the proxy .* does not say of which one"):
        stiefel.constrain(mlp(), "retraction").load_state_dict(state)


@dataclass(frozen=True, kw_only=True)
class Unknown(stiefel.Reparameterization):
    """A user's own, which the process that loads has not registered."""

    name = "test_unknown"
    summary = "rows of unit length"
    reference = "none"

    def forward(self, proxy: Tensor, layout: Layout) -> Tensor:
        return torch.nn.functional.normalize(proxy, dim=-1)


def test_a_proxy_of_a_method_that_is_not_registered_is_refused_by_name():
    state = stiefel.constrain(mlp(), Unknown()).state_dict()
    with pytest.raises(stiefel.WeightError, match="'test_unknown', which is needed to compute it: no method is named"):
        stiefel.constrain(mlp(), "retraction").load_state_dict(state)


def test_the_metadata_has_method_options_layout_and_tally():
    model = stiefel.constrain(mlp(), "own", layers=["2"], group_size=2, scale="relu")
    train(model, stiefel.optimizer(model, torch.optim.SGD, lr=0.3), batch(4, 6), steps=5)
    facts = through_file(model.state_dict())._metadata["2"]["stiefel"]["weight"]
    assert (facts["method"], facts["steps"], facts["version"]) == ("own", 5, 1)
    assert facts["options"] == {"group_size": 2, "scale": "relu"}
    assert Layout(**facts["layout"]) == bindings_of(model[2])["weight"].layout


def test_a_checkpoint_of_the_first_release_loads_as_it_did():
    source, model = trained("own", seed=1), stiefel.constrain(mlp(), "own")
    state = source.state_dict()
    for facts in state._metadata.values():
        for tensor, known in facts.get("stiefel", {}).items():
            facts["stiefel"][tensor] = (known["steps"], known["shortened"])
    model.load_state_dict(state)
    assert distance(weights(model), weights(source)) == 0
    assert bindings_of(model[2])["weight"].tally.steps == 5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("below", [False, True])
def test_save_pretrained_writes_the_weights_that_a_plain_model_reads(method, below):
    """As transformers, peft, diffusers and the hub's mixin save: by a method of that name, from the state dict."""

    class Pretrained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp(seed=1)

        def save_pretrained(self) -> dict[str, Tensor]:
            return dict(self.state_dict())

    model = Pretrained()
    stiefel.constrain(model.body if below else model, method)
    train(model.body, stiefel.optimizer(model, torch.optim.SGD, lr=0.3), batch(4, 6), steps=2)
    reloaded = Pretrained()
    reloaded.load_state_dict(model.save_pretrained(), strict=True)
    assert distance(weights(reloaded.body), weights(model.body)) == 0
    assert set(model.state_dict()) != set(reloaded.state_dict()) or method not in PROXIED  # elsewhere: the proxies


def test_a_tied_and_a_recurrent_weight_move_over():
    def net() -> nn.Module:
        model = nn.ModuleDict({"rnn": nn.LSTM(4, 6), "a": nn.Linear(6, 5), "b": nn.Linear(6, 5)})
        model["b"].weight = model["a"].weight
        return model

    names = ["rnn.weight_hh_l0", "a"]
    source = stiefel.constrain(net(), "cayley", layers=names)
    model = stiefel.constrain(net(), "retraction", layers=names)
    model.load_state_dict(source.state_dict())
    for layer, tensor in (("rnn", "weight_hh_l0"), ("a", "weight"), ("b", "weight")):
        torch.testing.assert_close(getattr(model[layer], tensor), getattr(source[layer], tensor), rtol=0, atol=1e-6)
    back = stiefel.constrain(net(), "cayley", layers=names)
    back.load_state_dict(model.state_dict())
    for layer, tensor in (("rnn", "weight_hh_l0"), ("a", "weight"), ("b", "weight")):
        torch.testing.assert_close(getattr(back[layer], tensor), getattr(model[layer], tensor), rtol=0, atol=1e-6)


def warmed_up(step: int) -> float:
    return 0.05 * step


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@pytest.mark.parametrize(
    "hyper", [{"lr": 0.1}, {"lr": 0.1, "momentum": 0.9}, {"lr": 0.05, "betas": (0.9, 0.99)}], ids=str
)
@pytest.mark.parametrize(
    ("method", "options"),
    [("rsdm", {}), ("soft", {"strength": warmed_up}), ("soft", {"strength": warmed_up, "decoupled": True})],
    ids=["draws", "schedule", "decoupled schedule"],
)
def test_what_depends_on_the_steps_taken_goes_on_from_a_format_that_keeps_tensors_alone(method, options, hyper, order):
    """The optimizer's state has the count too, for formats that lose a state dict's metadata."""
    model, again = (stiefel.constrain(mlp(seed=seed), method, **options) for seed in (0, 1))
    cls = torch.optim.Adam if "betas" in hyper else torch.optim.SGD
    optimizer, other = (stiefel.optimizer(each, cls, **hyper) for each in (model, again))
    train(model, optimizer, batch(4, 6), steps=3)
    tensors, state = dict(through_file(dict(model.state_dict()))), through_file(optimizer.state_dict())
    loads = [lambda: again.load_state_dict(tensors), lambda: other.load_state_dict(state)]
    for load in loads if order == "model first" else reversed(loads):
        load()
    for each, by in ((model, optimizer), (again, other)):
        train(each, by, batch(4, 6), steps=3)
    assert [b.tally.steps for i in LAYERS for b in bindings_of(again[i]).values()] == [6] * 3
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_a_weight_of_another_shape_is_told_with_both_shapes(method, strict):
    model = stiefel.constrain(nn.Linear(6, 4), method)
    before = model.weight.detach().clone()
    state = {"weight": torch.randn(4, 5), "bias": torch.zeros(4)}
    with pytest.raises(RuntimeError, match=r"size mismatch .*\[4, 5\].*\[4, 6\]"):
        model.load_state_dict(state, strict=strict)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("on_meta", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_an_assigned_state_keeps_its_precision_and_device(method, on_meta):
    plain = nn.Linear(6, 4, dtype=torch.float64)
    with torch.no_grad():
        plain.weight.copy_(torch.linalg.qr(plain.weight.T)[0].T)
    model = stiefel.constrain(nn.Linear(6, 4), method, **type(stiefel.get(method)).comparison)
    if on_meta:
        model.to("meta")
    model.load_state_dict(plain.state_dict(), assign=True)
    assert {p.dtype for p in model.parameters() if p.ndim > 1} == {torch.float64}
    assert model.weight.device.type == "cpu"
    if method in HELD:
        torch.testing.assert_close(model.weight, plain.weight, rtol=0, atol=1e-12)
    model(torch.randn(2, 6, dtype=torch.float64)).sum().backward()


def test_a_state_with_a_part_of_a_proxy_is_refused_by_name():
    state = stiefel.constrain(nn.Linear(6, 4), "cayley").state_dict()
    del state["parametrizations.weight.0.parts.base"]
    with pytest.raises(stiefel.WeightError, match=r"'weight' was saved as the proxy of cayley, .* expected"):
        stiefel.constrain(nn.Linear(6, 4), "own").load_state_dict(state, strict=False)
