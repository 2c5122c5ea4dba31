"""A model that is changed after ``constrain``: pruned, parametrized again, its layers and weights replaced."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from contract import FEASIBLE, METHODS, batch, mlp, train
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import stiefel
from stiefel.attach.weights import ConstrainedWeight, constrained_weights

PROXIED = [m for m in METHODS if stiefel.get(m).place == "forward"]


def constrained(method: str) -> nn.Module:
    return stiefel.constrain(mlp(), method)


@pytest.mark.parametrize("method", METHODS)
def test_pruning_is_refused_by_name(method):
    model = constrained(method)

    def pruned() -> Tensor:
        prune.l1_unstructured(model[2], "weight", 0.3)
        return model(batch(4, 6))

    with pytest.raises(stiefel.WeightError, match=r"'2\.weight' is .*pruning.*stiefel\.release\(model\)"):
        pruned()
    if method not in PROXIED:
        with pytest.raises(stiefel.WeightError, match=r"'2\.weight'"):
            stiefel.optimizer(model, torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_pruning_after_release_is_torchs_own(method):
    model = stiefel.release(constrained(method))
    prune.l1_unstructured(model[2], "weight", 0.25)
    assert (model[2].weight == 0).sum() == round(0.25 * model[2].weight.numel())


class Doubled(nn.Module):
    """A parametrization of somebody else's."""

    def forward(self, x: Tensor) -> Tensor:
        """Twice the tensor."""
        return 2 * x


@pytest.mark.parametrize("method", [m for m in METHODS if m not in PROXIED and m != "riemannian"])
def test_another_parametrization_of_a_weight_is_refused_by_name(method):
    model = constrained(method)
    parametrize.register_parametrization(model[2], "weight", Doubled())
    with pytest.raises(stiefel.WeightError, match=r"'2\.weight' is no longer a parameter"):
        model(batch(4, 6))
    parametrize.remove_parametrizations(model[2], "weight", leave_parametrized=False)
    model(batch(4, 6))  # undone


@pytest.mark.parametrize("method", METHODS)
def test_an_assigned_parameter_is_where_training_goes_on(method):
    model, new = constrained(method), nn.Parameter(torch.linalg.qr(torch.randn(5, 5))[0].repeat(2, 2)[:8, :8])
    kept = model[2].weight
    model[2].weight = new
    moved = method not in PROXIED and stiefel.get(method).claim is not None
    with pytest.warns(UserWarning, match="assigned off its constraint's set") if moved else nullcontext():
        optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.1)
    assert not torch.equal(model[2].weight, kept)
    train(model, optimizer, batch(4, 6))
    if method in FEASIBLE:
        assert stiefel.report(model).worst < 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("call", ["report", "optimizer"])
def test_a_replaced_layer_is_told(method, call):
    model = constrained(method)
    model[2] = nn.Linear(8, 8)
    with pytest.warns(UserWarning, match=r"layers of '2\.weight' have been replaced .* layers=\['2\.weight'\]"):
        stiefel.report(model) if call == "report" else stiefel.optimizer(model, torch.optim.SGD, lr=0.1)
    stiefel.constrain(model, method, layers=["2.weight"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(stiefel.report(model).to_dict()) == len(stiefel.report(constrained(method)).to_dict())


@pytest.mark.parametrize("method", ["own", "retraction"])
def test_nothing_is_told_of_layers_that_are_free_on_purpose(method):
    model = constrained(method)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stiefel.release(model[2])
        stiefel.report(model)
        twin = copy.deepcopy(model)
        stiefel.optimizer(twin, torch.optim.SGD, lr=0.1)
        del twin[4]  # a layer taken out
        stiefel.report(twin)
        stiefel.release(model)
        model[0] = nn.Linear(6, 8)
        stiefel.optimizer(model, torch.optim.SGD, lr=0.1)


def averages(method: str) -> nn.Module:
    """The average of five weights that are far apart."""
    model = constrained(method)
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=1.0)
    for _ in range(5):
        train(model, optimizer, batch(4, 6), steps=1)
        average.update_parameters(model)
    return average.module


@pytest.mark.sampled(3)
@pytest.mark.parametrize("how", ["eval", "no_grad", "inference"])
@pytest.mark.parametrize("method", METHODS)
def test_an_average_off_its_set_is_told_where_it_is_evaluated(method, how):
    average, x = averages(method), batch(4, 6)
    leaves = method not in PROXIED and not all(f.allows(f.residual()) for f in constrained_weights(average))
    assert leaves or stiefel.report(average).worst < 1e-5 or not stiefel.get(method).feasible

    def evaluate() -> None:
        if how == "eval":
            average.eval()(x)
        else:
            with torch.no_grad() if how == "no_grad" else torch.inference_mode():
                average(x)

    with pytest.warns(UserWarning, match=r"'\d\.weight' is off .* stiefel\.project") if leaves else nullcontext():
        evaluate()
    evaluate()  # told once
    stiefel.project(average)
    evaluate()


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_only_optimizers_change_are_not_looked_at_in_evaluation(method, monkeypatch):
    model, looked = constrained(method), []
    monkeypatch.setattr(ConstrainedWeight, "residual", lambda self: looked.append(self.name) or 0.0)
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.1)
    looked.clear()
    for _ in range(3):
        train(model, optimizer, batch(4, 6), steps=2)
        model.eval()(batch(4, 6))
        model.train()
    assert looked == []


def test_weights_of_one_pass_and_conversions_are_no_changes(monkeypatch):
    model, x = constrained("retraction"), batch(4, 6)
    optimizer, looked = stiefel.optimizer(model, torch.optim.SGD, lr=0.1), []
    residual = ConstrainedWeight.residual
    monkeypatch.setattr(ConstrainedWeight, "residual", lambda self: looked.append(self.name) or residual(self))
    teacher = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        train(model, optimizer, x, steps=1)
        with torch.no_grad():
            torch.func.functional_call(model, teacher, (x,))
            model(x)
    assert looked == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.double().eval()(x.double())  # on its set to the rounding of what it was before


def test_a_frozen_target_that_follows_by_averaging_is_told():
    model, x = constrained("retraction"), batch(4, 6)
    target = copy.deepcopy(model)
    optimizer = stiefel.optimizer(nn.ModuleList([model, target]), torch.optim.SGD, lr=1.0)
    for _ in range(3):
        train(model, optimizer, x, steps=1)
        with torch.no_grad():
            for p, q in zip(target.parameters(), model.parameters(), strict=True):
                p.lerp_(q, 0.5)
    optimizer.step()  # which steps no weight of the target
    with pytest.warns(UserWarning, match="is off its constraint's set where the model is evaluated"):
        target.eval()(x)
