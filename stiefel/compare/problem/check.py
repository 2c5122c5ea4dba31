"""Whether a problem works, before the first run fails for it: each of its methods is tried once. Imports ``load``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from stiefel.compare.problem.batches import Batch, Batches, examples, mover, seed_everything, size_of
from stiefel.compare.problem.load import load_data
from stiefel.compare.problem.problem import Data, Problem
from stiefel.constraint import control, get
from stiefel.errors import DataError, ProblemError

T = TypeVar("T")


def check(problem: Problem) -> None:
    """Build the model, load the data, take one batch through loss and evaluation, on the CPU.

    Raises:
        ProblemError: what fails or returns the wrong thing, what was expected, and what came.
        DataError: as the problem's data raise it.
    """
    name = type(problem).__name__

    def attempt(what: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except (DataError, ProblemError):
            raise
        except Exception as error:
            raise ProblemError(f"{name}: {what} fails: {type(error).__name__}: {error}") from error

    def expect(holds: bool, what: str, expected: str, came: Any) -> None:
        if not holds:
            raise ProblemError(f"{name}: {what} must {expected}, got {came}")

    seed_everything(0)
    model = attempt("make_model()", problem.make_model)
    expect(isinstance(model, nn.Module), "make_model()", "return a torch.nn.Module", type(model).__name__)
    attempt("layers, exclude", lambda: problem.constrain(model, get(control())))
    data = attempt("make_data()", lambda: load_data(problem))
    expect(isinstance(data, Data), "make_data()", "return a stiefel.compare.Data", type(data).__name__)
    for part in ("train", "validation", "test"):
        attempt("make_data()", lambda part=part: _check_part(name, part, getattr(data, part)))  # type: ignore[misc]
    prepare = mover(torch.device("cpu"), next(model.parameters()).dtype)
    train = Batches(data.train, problem.batch_size, 0, prepare, 1)
    batch = attempt("make_data().train", lambda: next(train.epoch(), None))
    expect(batch is not None, "make_data().train", f"hold a batch of {problem.batch_size}", size_of(data.train))
    loss = attempt("loss()", lambda: problem.loss(model, batch))
    scalar = isinstance(loss, Tensor) and loss.ndim == 0 and loss.requires_grad
    expect(scalar, "loss()", "return a scalar tensor that depends on the model's parameters", _shape(loss))
    build: Any = problem.optimizer
    optimizer = attempt("optimizer, hyper", lambda: build(model.parameters(), lr=0.1, **problem.hyper))
    attempt("schedule()", lambda: problem.schedule(optimizer))
    model.eval()
    validation = _few(Batches(data.validation, problem.batch_size, 0, prepare).all())
    with torch.no_grad():
        measures = attempt("evaluate()", lambda: problem.measure(model, validation))
    expect(isinstance(measures, dict), "evaluate()", "return a dictionary of numbers", type(measures).__name__)
    known = ", ".join(map(repr, measures)) or "nothing"
    expect(problem.metric in measures, "evaluate()", f"return the metric {problem.metric!r}", f"{known} alone")
    for key, value in measures.items():
        expect(isinstance(value, (int, float)), f"evaluate()[{key!r}]", "be a number (use .item())", _shape(value))
    model.train()
    loss = attempt("train_step()", lambda: problem.train_step(model, optimizer, batch))
    scalar = isinstance(loss, Tensor) and loss.ndim == 0 and not loss.requires_grad
    expect(scalar, "train_step()", "return the loss as a scalar tensor without a graph (use .detach())", _shape(loss))
    target = problem.target
    valid = target is None or (isinstance(target, (int, float)) and math.isfinite(target))
    expect(valid, "target", "be a number or None", repr(target))


def _check_part(name: str, part: str, value: Any) -> None:
    where = f"{name}: make_data().{part}"
    if isinstance(value, tuple):
        if not value or not all(isinstance(t, Tensor) and t.ndim for t in value):
            kinds = ", ".join(type(t).__name__ for t in value) or "nothing"
            raise ProblemError(
                f"{where} must be a tuple of tensors or an iterable of batches, got a tuple of {kinds}; convert arrays "
                "with torch.as_tensor, and give batches as a list"
            )
        lengths = [len(t) for t in value]
        if len(set(lengths)) > 1 or lengths[0] == 0:
            raise ProblemError(f"{where} must hold tensors of one length, at least 1, got lengths {lengths}")
    elif not isinstance(value, Iterable):
        raise ProblemError(f"{where} must be a tuple of tensors or an iterable of batches, got {type(value).__name__}")
    elif iter(value) is value:
        raise ProblemError(
            f"{where} can be iterated once only ({type(value).__name__}), and is needed in every epoch; give a list, a "
            "DataLoader, or an object whose __iter__ starts anew"
        )


def _few(batches: Iterable[Batch], most: int = 256) -> list[Batch]:
    """The first batches, up to so many examples: enough to see that evaluation works."""
    found, count = [], 0
    for batch in batches:
        found.append(batch)
        count += examples(batch)
        if count >= most:
            break
    return found


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        grown = " with a graph" if value.requires_grad else " without a graph"
        return f"a tensor of shape {tuple(value.shape)}{grown}"
    return type(value).__name__
