"""Bad input: each fault has a named error that says which weight and what to do, and leaves the model as it was."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from common import Projection
from torch import Tensor, nn
from torch.nn.utils import parametrize

import stiefel
import stiefel.errors
import stiefel.methods
from stiefel.attach.weights import bindings_of

METHODS = stiefel.available()


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def snapshot(model: nn.Module) -> list[Any]:
    """All that constraining could have changed: classes, attributes, hooks, bindings, parameters."""
    return [
        (
            name,
            type(module),
            sorted(vars(module)),
            dict(bindings_of(module)),
            [len(hooks) for key, hooks in vars(module).items() if key.endswith("_hooks")],
            [(n, id(p), type(p), p.requires_grad) for n, p in module._parameters.items() if p is not None],
        )
        for name, module in model.named_modules()
    ]


def values(model: nn.Module) -> dict[str, Tensor]:
    """Bit patterns, so that NaN equals itself."""
    lazy = (nn.UninitializedParameter, nn.UninitializedBuffer)
    return {
        key: value.detach().clone()
        for key, value in model.state_dict(keep_vars=True).items()
        if not isinstance(value, lazy) and not value.is_meta
    }


def assert_refused(
    model: nn.Module, error: type[stiefel.StiefelError], words: list[str], *arguments: Any, **options: Any
) -> None:
    """``constrain`` raises exactly that error, its message has all the words, and nothing has changed."""
    structure, before = snapshot(model), values(model)
    with pytest.raises(stiefel.StiefelError) as caught:
        stiefel.constrain(model, *arguments, **options)
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value)
    assert snapshot(model) == structure
    after = values(model)
    assert list(after) == list(before)
    for key, value in after.items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)


def test_all_errors_are_one_family_and_documented() -> None:
    classes = [c for c in vars(stiefel.errors).values() if inspect.isclass(c) and c.__module__ == "stiefel.errors"]
    assert stiefel.StiefelError in classes
    for cls in classes:
        assert issubclass(cls, stiefel.StiefelError)
        assert cls.__doc__
        assert getattr(stiefel, cls.__name__) is cls


# --- methods and options ---


def test_unknown_method_names_the_nearest() -> None:
    assert_refused(mlp(), stiefel.UnknownMethodError, ["'riemanian'", "'riemannian'"], "riemanian")
    assert_refused(mlp(), stiefel.UnknownMethodError, ["'zzz'", *METHODS], "zzz")
    with pytest.raises(stiefel.UnknownMethodError, match="soft"):
        stiefel.get("soff")


@pytest.mark.parametrize("method", METHODS)
def test_unknown_option_names_the_nearest_and_all(method: str) -> None:
    words = ["'grup_size'", "'group_size'", "scale"]
    assert_refused(mlp(), stiefel.OptionError, words, method, grup_size=2)


def test_a_methods_own_options_are_suggested() -> None:
    assert_refused(mlp(), stiefel.OptionError, ["'centre'", "'center'"], "own", centre=True)
    assert_refused(mlp(), stiefel.OptionError, ["'retractions'", "'retraction'"], "riemannian", retractions="qr")


BAD_OPTIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "scale of zero": ("own", {"scale": 0}, "positive"),
    "negative scale": ("soft", {"scale": -1.0}, "positive"),
    "infinite scale": ("riemannian", {"scale": float("inf")}, "positive"),
    "nan scale": ("own", {"scale": float("nan")}, "positive"),
    "boolean scale": ("own", {"scale": True}, "positive"),
    "scale by an unknown word": ("own", {"scale": "gelu"}, "'relu'"),
    "scale of no kind": ("own", {"scale": None}, "positive"),
    "scale as a list": ("own", {"scale": [1.0]}, "positive"),
    "group size of zero": ("own", {"group_size": 0}, "positive"),
    "fractional group size": ("own", {"group_size": 2.0}, "whole"),
    "boolean group size": ("own", {"group_size": True}, "whole"),
    "centre by an unknown word": ("own", {"center": "yes"}, "'auto'"),
    "centre by a number": ("own", {"center": 0}, "'auto'"),
    "order as a float": ("bjorck", {"order": 2.0}, "whole number from 1 to 4"),
    "eps of zero": ("own", {"eps": 0.0}, "between"),
    "eps too large": ("own", {"eps": 0.5}, "between"),
    "eps as text": ("own", {"eps": "small"}, "between"),
    "unknown metric": ("riemannian", {"metric": "euclid"}, "'euclidean'"),
    "metric that has no hash": ("riemannian", {"metric": ["euclidean"]}, "'euclidean'"),
    "unknown retraction": ("riemannian", {"retraction": "caley"}, "'cayley'"),
    "negative strength": ("soft", {"strength": -0.1}, "callable"),
    "nan strength": ("soft", {"strength": float("nan")}, "callable"),
    "strength as text": ("soft", {"strength": "strong"}, "callable"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_option_values_are_named_with_what_was_expected(case: str) -> None:
    method, options, expected = BAD_OPTIONS[case]
    (option,) = options
    assert_refused(mlp(), stiefel.OptionError, [f"{option}={options[option]!r}", expected], method, **options)


@pytest.mark.parametrize("method", [m for m in METHODS if not stiefel.get(m).can_learn_scale])
def test_a_learnable_scale_needs_a_reparameterization(method: str) -> None:
    words = [method, "learnable", "reparameterization"]
    assert_refused(mlp(), stiefel.OptionError, words, method, scale="learnable")


def test_options_belong_inside_a_constraint_object() -> None:
    assert_refused(mlp(), stiefel.OptionError, ["scale", "inside"], stiefel.get("own"), scale=2.0)


@pytest.mark.parametrize("constraint", [None, 3, stiefel.Constraint])
def test_a_constraint_is_a_name_or_an_object(constraint: Any) -> None:
    assert_refused(mlp(), stiefel.OptionError, ["name", "stiefel.Constraint"], constraint)


# --- selection ---


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        (nn.ReLU(), {}),
        (nn.Sequential(nn.Embedding(3, 3), nn.LSTM(2, 2)), {}),
        (mlp(), {"layers": []}),
        (mlp(), {"layers": lambda name, layer: False}),
        (mlp(), {"exclude": ["0", "2"]}),
        (mlp(), {"exclude": ""}),
        (mlp(), {"layers": "0", "exclude": "0.weight"}),
    ],
)
def test_nothing_to_constrain(model: nn.Module, arguments: dict[str, Any]) -> None:
    words = ["nothing to constrain", type(model).__name__, "layers="]
    assert_refused(model, stiefel.SelectionError, words, "own", **arguments)


def named() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"encoder": nn.Linear(4, 4), "head": nn.Linear(4, 2), "rnn": nn.GRU(4, 4), "act": nn.ReLU()})


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("encodr", "encoder"), ("head.wieght", "head.weight"), ("rnn.weight_hh_l1", "rnn.weight_hh_l0"), ("hed", "head")],
)
@pytest.mark.parametrize("argument", ["layers", "exclude"])
def test_unknown_names_are_answered_with_the_nearest(argument: str, wrong: str, meant: str) -> None:
    words = [f"'{wrong}'", f"'{meant}'"]
    assert_refused(named(), stiefel.SelectionError, words, "own", **{argument: [wrong]})
    assert_refused(named(), stiefel.SelectionError, words, "own", **{argument: wrong})


def test_a_layer_without_a_weight_is_answered_with_its_tensors() -> None:
    words = ["'rnn'", "GRU", "rnn.weight_hh_l0"]
    assert_refused(named(), stiefel.SelectionError, words, "own", layers="rnn")
    assert_refused(named(), stiefel.SelectionError, ["'act'", "ReLU"], "own", layers="act")


@pytest.mark.parametrize("second", METHODS)
@pytest.mark.parametrize("first", METHODS)
def test_the_same_weight_in_two_calls(first: str, second: str) -> None:
    model = stiefel.constrain(mlp(), first, layers="2")
    words = ["'2.weight'", first, "exclude", "release"]
    assert_refused(model, stiefel.SelectionError, words, second)
    assert_refused(model, stiefel.SelectionError, words, second, layers="2")


@pytest.mark.parametrize("layers", [["0", "0"], ["2", "0", "0.weight"]])
def test_the_same_weight_listed_twice(layers: list[str]) -> None:
    assert_refused(mlp(), stiefel.SelectionError, ["'0.weight'", "once"], "own", layers=layers)


def test_half_of_a_tie_cannot_be_excluded() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    words = ["'a.weight'", "'b.weight'", "both"]
    assert_refused(model, stiefel.SelectionError, words, "own", exclude="b")


def test_a_weight_tied_to_a_constrained_one_is_constrained_already() -> None:
    model = stiefel.constrain(nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)}), "soft", layers="a")
    model["b"].weight = model["a"].weight
    assert_refused(model, stiefel.SelectionError, ["'a.weight'", "release"], "soft", layers="b")


class Halve(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@pytest.mark.parametrize("method", METHODS)
def test_weights_under_another_parametrization(method: str) -> None:
    model = mlp()
    parametrize.register_parametrization(model[2], "weight", Halve())
    words = ["'2.weight'", "parametrization", "remove", "exclude"]
    assert_refused(model, stiefel.SelectionError, words, method)
    assert_refused(model, stiefel.SelectionError, words, method, layers="2.weight")


@pytest.mark.parametrize("method", METHODS)
def test_weights_under_an_old_hook(method: str) -> None:
    model = mlp()
    nn.utils.spectral_norm(model[2])
    words = ["'2.weight'", "spectral_norm", "remove", "exclude"]
    assert_refused(model, stiefel.SelectionError, words, method)


# --- weights ---


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.int64], ids=str
)
def test_dtypes(method: str, dtype: torch.dtype) -> None:
    if dtype in stiefel.get(method).dtypes:
        return  # a unitary weight
    model = mlp()
    model[2].weight = nn.Parameter(torch.ones(4, 8, dtype=dtype), requires_grad=False)
    words = ["'2.weight'", str(dtype), "float32"]
    assert_refused(model, stiefel.WeightError, words, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("entry", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_entries(method: str, entry: float) -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[1, 2] = entry
    assert_refused(model, stiefel.WeightError, ["'2.weight'", "1 entries", "re-initialize"], method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["0.bias", "scalar"])
def test_too_few_dimensions(method: str, name: str) -> None:
    model = mlp()
    model.scalar = nn.Parameter(torch.tensor(1.0))
    assert_refused(model, stiefel.WeightError, [f"'{name}'", "two dimensions", "exclude"], method, layers=["0", name])


@pytest.mark.parametrize("method", METHODS)
def test_empty_weights(method: str) -> None:
    model = mlp()
    model.none = nn.Parameter(torch.empty(0, 3))
    assert_refused(model, stiefel.WeightError, ["'none'", "(0, 3)", "exclude"], method, layers=["0", "none"])


@pytest.mark.parametrize("method", METHODS)
def test_lazy_layers_that_share_a_weight(method: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(4), nn.LazyLinear(4))
    model[2].weight = model[1].weight
    assert_refused(model, stiefel.WeightError, ["'1.weight'", "lazy", "forward pass"], method)


@pytest.mark.parametrize("method", METHODS)
def test_meta_weights(method: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 4, device="meta"))
    assert_refused(model, stiefel.WeightError, ["'1.weight'", "meta", "materialize"], method)


# --- shapes that a set does not have ---


@pytest.mark.parametrize("method", METHODS)
def test_a_group_size_that_does_not_divide(method: str) -> None:
    words = ["'2.weight'", "group_size=8", "[1, 2, 4]"]
    assert_refused(mlp(), stiefel.LayoutError, words, method, group_size=8, layers="2")
    words = ["'0.weight'", "group_size=3", "[1, 2, 4]"]
    assert_refused(mlp(), stiefel.LayoutError, words, method, group_size=3)


@pytest.mark.parametrize("method", METHODS)
def test_a_group_size_beyond_the_fan_in(method: str) -> None:
    words = ["'0.weight'", "group_size=8", "fan-in 6", "group_size ≤ 6"]
    assert_refused(mlp(), stiefel.LayoutError, words, method, group_size=8)


@pytest.mark.parametrize(
    ("layer", "options", "why"),
    [
        (nn.Linear(5, 5), {}, "rank"),
        (nn.Linear(4, 6), {}, "column"),
        (nn.Linear(3, 6), {"group_size": 3}, "rank"),
        (nn.Conv2d(1, 9, 3), {}, "rank"),
    ],
)
def test_centring_where_rows_cannot_stay_orthonormal(layer: nn.Module, options: dict[str, Any], why: str) -> None:
    model = nn.Sequential(nn.Linear(4, 2), layer)
    words = ["'1.weight'", "center=True", why, "center=False"]
    assert_refused(model, stiefel.LayoutError, words, "own", center=True, layers="1", **options)


@pytest.mark.parametrize(("fan_in", "out"), [(5, 5), (4, 6), (3, 12), (2, 2), (6, 6)])
def test_the_group_size_that_the_centring_error_offers_works(fan_in: int, out: int) -> None:
    layer = nn.Linear(fan_in, out)
    with pytest.raises(stiefel.LayoutError) as caught:
        stiefel.constrain(layer, "own", center=True)
    offered = int(str(caught.value).rpartition("≤ ")[2])
    size = max(d for d in range(1, offered + 1) if out % d == 0)
    stiefel.constrain(layer, "own", center=True, group_size=size)
    assert stiefel.report(layer).worst < 1e-6


@pytest.mark.parametrize("layer", [nn.Linear(1, 3), nn.Conv1d(4, 4, 1, groups=4)])
def test_no_impossible_group_size_is_offered(layer: nn.Module) -> None:
    """A filter of length one has no centred direction at all."""
    with pytest.raises(stiefel.LayoutError) as caught:
        stiefel.constrain(layer, "own", center=True)
    assert "group_size ≤ 0" not in str(caught.value)


def test_a_learnable_scale_needs_rows() -> None:
    words = ["'0.weight'", "learnable", "rows", "group_size"]
    assert_refused(mlp(), stiefel.LayoutError, words, "own", scale="learnable")
    stiefel.constrain(mlp(), "own", scale="learnable", group_size=4)


def test_a_fault_in_the_last_weight_leaves_the_first_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2), nn.Linear(2, 2))
    assert_refused(model, stiefel.LayoutError, ["'2.weight'"], "own", center=True)


# --- optimizers ---


STEPPED = ["riemannian", Projection.name]


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Rprop])
def test_riemannian_weights_take_sgd_and_adam(cls: type[torch.optim.Optimizer]) -> None:
    with pytest.raises(stiefel.OptimizerError) as caught:
        stiefel.optimizer(stiefel.constrain(mlp(), "riemannian"), cls, lr=0.1)
    for word in (cls.__name__, "torch.optim.SGD", "torch.optim.Adam", "a reparameterization"):
        assert word in str(caught.value)


@pytest.mark.parametrize("option", ["maximize", "fused", "capturable", "differentiable", "decoupled_weight_decay"])
def test_options_that_riemannian_adam_would_ignore(option: str) -> None:
    model = stiefel.constrain(mlp(), "riemannian")
    with pytest.raises(stiefel.OptimizerError, match=option):
        stiefel.optimizer(model, torch.optim.Adam, lr=0.1, **{option: True})
    stiefel.optimizer(model, torch.optim.Adam, lr=0.1, **{option: False})


@pytest.mark.parametrize("option", ["maximize", "fused", "differentiable"])
def test_options_that_riemannian_sgd_would_ignore(option: str) -> None:
    model = stiefel.constrain(mlp(), "riemannian")
    with pytest.raises(stiefel.OptimizerError, match=option):
        stiefel.optimizer(model, torch.optim.SGD, lr=0.1, **{option: True})
    with pytest.raises(stiefel.OptimizerError, match=option):
        stiefel.optimizer(model, torch.optim.SGD, [{"params": list(model.parameters()), option: True}], lr=0.1)
    stiefel.optimizer(model, torch.optim.SGD, lr=0.1, foreach=True, **{option: False})


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam])
def test_an_option_that_no_optimizer_has(cls: type[torch.optim.Optimizer]) -> None:
    with pytest.raises(stiefel.OptimizerError, match="momentun"):
        stiefel.optimizer(stiefel.constrain(mlp(), "riemannian"), cls, lr=0.1, momentun=0.9)


@pytest.mark.parametrize("cls", [torch.optim.Rprop, torch.optim.SparseAdam])
def test_optimizers_that_cannot_be_lifted(projection: str, cls: type[torch.optim.Optimizer]) -> None:
    with pytest.raises(stiefel.OptimizerError) as caught:
        stiefel.optimizer(stiefel.constrain(mlp(), projection), cls, lr=0.1)
    assert cls.__name__ in str(caught.value)
    assert "use SGD or Adam" in str(caught.value)


def test_an_optimizer_for_matrices_only_refuses_other_weights_by_a_named_error(projection: str) -> None:
    if not hasattr(torch.optim, "Muon"):
        return
    with pytest.raises(stiefel.OptimizerError, match="Muon"):
        stiefel.optimizer(stiefel.constrain(mlp(), projection), torch.optim.Muon, lr=0.1)


@dataclass(frozen=True, kw_only=True)
class Failing(stiefel.Reparameterization):
    """A nearest point that cannot be computed for wide matrices."""

    name = "test_failing"
    summary = "fails"
    reference = "none"

    def nearest(self, points: Tensor, layout: Any) -> Tensor:
        if layout.columns:
            return super().nearest(points, layout)
        raise RuntimeError("no nearest point")

    def forward(self, proxy: Tensor, layout: Any) -> Tensor:
        return proxy


def test_a_method_that_fails_at_the_second_weight_leaves_the_first_alone() -> None:
    model = mlp()
    structure, before = snapshot(model), values(model)
    with pytest.raises(RuntimeError, match="no nearest point"):
        stiefel.constrain(model, Failing())
    assert snapshot(model) == structure
    for key, value in values(model).items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("cls", [None, "SGD", nn.Linear, torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)])
def test_what_is_not_an_optimizer_class(cls: Any) -> None:
    with pytest.raises(stiefel.OptimizerError, match=r"torch\.optim\.SGD"):
        stiefel.optimizer(stiefel.constrain(mlp(), "own"), cls, lr=0.1)


PLAIN: list[Callable[[Any], torch.optim.Optimizer]] = [
    lambda params: torch.optim.SGD(params, lr=0.1),
    lambda params: torch.optim.AdamW(params, lr=0.1),
]


@pytest.mark.parametrize("build", PLAIN, ids=["sgd", "adamw"])
@pytest.mark.parametrize("when", ["before", "after", "copied model", "copied pair", "loaded"])
@pytest.mark.parametrize("method", STEPPED)
def test_a_plain_optimizer_may_not_step_a_weight_that_a_method_steps(
    projection: str, method: str, when: str, build: Callable[[Any], torch.optim.Optimizer]
) -> None:
    model = mlp()
    optimizer = build(model.parameters()) if when == "before" else None
    stiefel.constrain(model, method, exclude="0")
    if when == "copied model":
        model = copy.deepcopy(model)
    if when == "loaded":
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    optimizer = optimizer or build(model.parameters())
    if when == "copied pair":
        model, optimizer = copy.deepcopy((model, optimizer))
    model(torch.ones(2, 6)).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(stiefel.OptimizerError) as caught:
        optimizer.step()
    for word in ("'2.weight'", type(optimizer).__name__, "stiefel.optimizer", "stiefel.release"):
        assert word in str(caught.value)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    stiefel.release(model)
    optimizer.step()


@pytest.mark.parametrize("method", STEPPED)
def test_an_optimizer_made_for_other_constraints_may_not_step(projection: str, method: str) -> None:
    """Made while nothing was on a manifold, or while another part was."""
    model = stiefel.constrain(mlp(), next(m for m in STEPPED if m != method), layers="0")
    stale = stiefel.optimizer(model, torch.optim.SGD, lr=0.1)
    stiefel.constrain(model, method, layers="2")
    model(torch.ones(2, 6)).sum().backward()
    with pytest.raises(stiefel.OptimizerError, match=r"2\.weight"):
        stale.step()


@pytest.mark.parametrize("method", [m for m in METHODS if stiefel.get(m).place != "step"])
def test_plain_optimizers_step_all_other_weights(method: str) -> None:
    model = stiefel.constrain(mlp(), method)
    model(torch.ones(2, 6)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_weights_are_not_stepped(dtype: torch.dtype) -> None:
    model = stiefel.constrain(mlp(), "riemannian")
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.1)
    model.to(dtype)
    for p in model.parameters():
        p.grad = torch.ones_like(p.detach())
    with pytest.raises(stiefel.WeightError) as caught:
        optimizer.step()
    for word in ("'0.weight'", str(dtype), "float32", "autocast"):
        assert word in str(caught.value)


# --- report ---


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.ReLU(), stiefel.release(stiefel.constrain(mlp(), "soft"))])
def test_a_report_on_nothing(model: nn.Module) -> None:
    with pytest.raises(stiefel.SelectionError) as caught:
        stiefel.report(model)
    assert type(model).__name__ in str(caught.value)
    assert "stiefel.constrain" in str(caught.value)


@pytest.mark.parametrize("argument", ["layers", "exclude"])
def test_names_must_be_names(argument: str) -> None:
    with pytest.raises(stiefel.SelectionError, match="take names"):
        stiefel.constrain(mlp(), "own", **{argument: [0]})


@pytest.mark.parametrize("value", [-1.0, float("nan"), None])
def test_a_schedule_that_returns_no_strength(value: float | None) -> None:
    model = stiefel.constrain(mlp(), "soft", strength=lambda step: value)
    with pytest.raises(stiefel.OptionError, match="at step 0"):
        stiefel.penalty(model)


def test_a_frozen_weight_is_no_business_of_the_guard() -> None:
    model = stiefel.constrain(mlp(), "riemannian")
    for p in model.parameters():
        p.requires_grad_(p.ndim == 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("cls", "options", "said"),
    [
        (torch.optim.SGD, {"lr": -1.0}, "SGD .* lr=-1.0"),
        (torch.optim.SGD, {"momentun": 1}, "SGD .* momentun=1"),
        (torch.optim.SGD, {"nesterov": True}, "SGD .* nesterov=True"),
        (torch.optim.SparseAdam, {}, "SparseAdam .* dense gradients"),
        (torch.optim.Adam, {"differentiable": True}, "Adam .* differentiable=True"),
        (torch.optim.Adam, {"capturable": True}, "Adam .* capturable=True"),
        (torch.optim.Muon, {"lr": 0.1}, "Muon takes matrices only"),
    ],
)
@pytest.mark.parametrize("method", ["own", "soft", "unconstrained"])
def test_what_torch_refuses_at_its_first_step_is_refused_when_an_optimizer_is_made(method, cls, options, said):
    model = stiefel.constrain(nn.Linear(9, 4), method)
    with pytest.raises(stiefel.OptimizerError, match=said):
        stiefel.optimizer(model, cls, **options)


def test_a_proxy_that_has_overflowed_is_told_by_name():
    model = stiefel.constrain(nn.Sequential(nn.Linear(9, 4)), "own")
    with torch.no_grad():
        model.get_parameter("0.parametrizations.weight.original").fill_(torch.inf)
    with pytest.raises(stiefel.DivergenceError, match=r"proxy of '0\.weight'.*infinite"):
        model(torch.randn(2, 9))


@pytest.mark.parametrize("method", ["soft", "own", "pogo"])
def test_a_weight_that_is_infinite_has_no_nearest_point_and_is_told_by_name(method):
    model = stiefel.constrain(nn.Sequential(nn.Linear(9, 4)), method)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.inf)
    with pytest.raises(stiefel.StiefelError, match=r"'0\.weight'.*infinite"):
        stiefel.project(model)


def test_a_gain_of_zero_is_no_reason_to_call_a_weight_off_its_set():
    model = stiefel.constrain(nn.Linear(9, 4), "own", scale="learnable")
    with torch.no_grad():
        model.parametrizations.weight[0].gain[0] = 0
    assert stiefel.report(model).worst < 1e-6
    model.weight = torch.randn(4, 9)  # may be assigned all the same
    assert stiefel.report(model).worst < 1e-6
    assert not model.weight[0].any()


@pytest.mark.parametrize("cls", [nn.RNN, nn.LSTM, nn.GRU])
def test_a_recurrent_module_copies_and_takes_weights_after_any_use(cls):
    rnn = stiefel.constrain(cls(3, 4), "own", layers=["weight_hh_l0"])
    for use in (lambda: rnn(torch.randn(5, 2, 3)), rnn.double, rnn.float):
        use()
        copy.deepcopy(rnn)(torch.randn(5, 2, 3)) if rnn.weight_ih_l0.dtype == torch.float32 else copy.deepcopy(rnn)
        rnn.weight_hh_l0 = torch.randn_like(rnn.weight_hh_l0)
        assert stiefel.report(rnn).worst < 1e-6
    stiefel.release(rnn)
    rnn.double()(torch.randn(5, 2, 3, dtype=torch.float64))
    copy.deepcopy(rnn)
