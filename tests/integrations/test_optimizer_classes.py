"""Every optimizer class that installs: it trains on the set, in eval() too, or is refused by name."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from features import RIGHT, part
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import stiefel

PACKAGES = ("torch.optim", "schedulefree", "pytorch_optimizer")
AVERAGING = "exchanges the weight for an average"
ELSEWHERE = "computes the weight from an iterate in its state"


def classes() -> Iterator[Any]:
    for package in PACKAGES:
        try:
            module = importlib.import_module(package)
        except ImportError:
            yield pytest.param(None, id=package, marks=pytest.mark.skip(reason=f"{package} is not installed"))
            continue
        for name, cls in sorted(vars(module).items()):
            optimizes = inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and not inspect.isabstract(cls)
            if optimizes and name not in ("Optimizer", "BaseOptimizer"):
                yield pytest.param(cls, id=f"{package}.{name}")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(12, 8, bias=False), nn.Tanh(), nn.Linear(8, 8, bias=False), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(8, 3, bias=False))  # matrices alone, for Muon


def outcome(cls: type[torch.optim.Optimizer], method: str) -> str:
    """What becomes of 20 steps and a switch to eval()."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(64, 12, generator=generator), torch.randint(3, (64,), generator=generator)
    model = stiefel.constrain(net(), method)
    try:
        optimizer: Any = stiefel.optimizer(model, cls, lr=1e-2)
    except stiefel.OptimizerError as error:
        return str(error)
    for mode in ("train", "eval"):
        if callable(getattr(optimizer, mode, None)):
            getattr(optimizer, mode)()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        asks = inspect.signature(cls.step).parameters.get("closure")
        for _ in range(20 if mode == "train" else 0):
            if asks is not None and asks.default is inspect.Parameter.empty:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        worst = stiefel.report(model).worst
        assert worst < 2e-6, f"off the set in {mode}() mode by {worst:.1e}"
    return "works"


def kind(found: str) -> str:
    """A column of the document's table."""
    if found == "works":
        return RIGHT
    if AVERAGING in found or ELSEWHERE in found:
        return "refused: steps from another point"
    return "refused: needs more than gradients, or another form of parameters"


def outcomes() -> dict[str, dict[str, str]]:
    """What becomes of each class with a method on the step, by package; in words."""
    found: dict[str, dict[str, str]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for each in classes():
            (cls,), (package, name) = each.values, each.id.rsplit(".", 1)
            found.setdefault(f"`{package}`", {})[name] = kind(outcome(cls, "retraction"))
    return found


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other packages
        yield


@pytest.mark.sampled(10, values=False)
@pytest.mark.parametrize("cls", list(classes()))
def test_a_class_serves_a_method_on_the_step_or_is_refused_by_name(cls, request):
    found = outcome(cls, "retraction")
    assert found == "works" or cls.__name__ in found
    columns = [cell.strip() for cell in part("optimizers").strip().splitlines()[0].split("|")]
    package = request.node.callspec.id.rpartition(".")[0]
    (row,) = (line.split("|") for line in part("optimizers").splitlines() if f"`{package}`" in line)
    assert cls.__name__ in [name.strip() for name in row[columns.index(kind(found))].split(",")]  # make compatibility
    name = cls.__name__
    if "ScheduleFree" in name and not name.endswith(("Closure", "Wrapper")):
        assert AVERAGING in found
    if name in ("Ranger", "MADGRAD", "DAdaptSGD", "FTRL", "Nero"):
        assert ELSEWHERE in found
    if name in ("SGD", "Adam", "AdamW", "RMSprop", "NAdam", "Lion", "Adan", "Lamb", "SOAP", "Shampoo", "Prodigy"):
        assert found == "works"


@pytest.mark.sampled(10, values=False)
@pytest.mark.parametrize("cls", list(classes()))
def test_a_class_serves_a_reparameterization_as_it_is(cls):
    """What it needs beside gradients, such as a closure, it says itself, as with any model."""
    try:
        found = outcome(cls, "own")
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    needs = ("losure", "create_graph", "grad_fn", "einops")
    assert found == "works" or cls.__name__ in found or any(word in found for word in needs)


@pytest.mark.skipif(importlib.util.find_spec("schedulefree") is None, reason="schedulefree is not installed")
def test_a_schedule_free_optimizer_reaches_the_optimum_through_a_reparameterization():
    """Procrustes: min ‖X − A‖², whose optimum is the polar factor; a step method's average was 200 off the set."""
    import schedulefree

    a = torch.randn(10, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = nn.Linear(20, 10, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.qr(torch.randn(20, 10, dtype=torch.float64))[0].T)
    stiefel.constrain(model, "own", center=False)
    optimizer: Any = stiefel.optimizer(model, schedulefree.SGDScheduleFree, lr=0.05)
    optimizer.train()
    for _ in range(600):
        optimizer.zero_grad()
        (model.weight - a).square().sum().backward()
        optimizer.step()
    optimizer.eval()
    u, _, v = torch.linalg.svd(a, full_matrices=False)
    gap = float((model.weight - a).square().sum() - (u @ v - a).square().sum())
    assert stiefel.report(model).worst < 1e-13
    assert 0 <= gap < 0.02
