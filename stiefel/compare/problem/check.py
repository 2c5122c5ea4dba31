"""Whether a problem works, before the first run fails for it: each of its methods is tried once. Imports ``load``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from stiefel.compare.problem.batches import Batch, Batches, examples, mover, seed_everything, size_of
from stiefel.compare.problem.load import load_data
from stiefel.compare.problem.problem import Data, Problem
from stiefel.constraint import control, get
from stiefel.errors import DataError, ProblemError

T = TypeVar("T")


def check(problem: Problem, at: Callable[[str], object] = lambda what: None) -> None:
    """Build the model, load the data, take one batch through loss and evaluation, on the CPU.

    Args:
        problem: what is tried.
        at: called with the name of each part before it is tried: where the process was, if its code ends that.

    Raises:
        ProblemError: what fails or returns the wrong thing, what was expected, and what came.
        DataError: as the problem's data raise it.
    """
    # In the order of a run, so that the first message is about the cause and not about what follows from it.
    trial = _Trial(problem, at)
    seed_everything(0)
    model = trial.model()
    batch, validation = trial.batches(next(model.parameters()).dtype)
    optimizer = trial.training(model, batch)
    trial.evaluation(model, validation)
    model.train()  # evaluation left it in evaluation mode
    loss = trial.attempt("train_step()", lambda: problem.train_step(model, optimizer, batch))
    scalar = isinstance(loss, Tensor) and loss.ndim == 0 and not loss.requires_grad
    expected = "return the loss as a scalar tensor without a graph (use .detach())"
    trial.expect(scalar, "train_step()", expected, _shape(loss))
    target = problem.target
    valid = target is None or (isinstance(target, (int, float)) and math.isfinite(target))
    trial.expect(valid, "target", "be a finite number or None", repr(target))


class _Trial:
    """Tries a problem's methods one by one; the error names the first that fails."""

    def __init__(self, problem: Problem, at: Callable[[str], object]) -> None:
        self.problem, self.name, self.at = problem, type(problem).__name__, at

    def attempt(self, what: str, call: Callable[[], T]) -> T:
        """Return what a call returns; its errors become :class:`ProblemError`."""
        self.at(what)
        try:
            return call()
        except (DataError, ProblemError):  # they say what to do already
            raise
        except (Exception, SystemExit) as error:
            raise ProblemError(f"{self.name}: {what} fails: {type(error).__name__}: {error}") from error

    def expect(self, holds: bool, what: str, expected: str, came: Any) -> None:
        """Raise where something is not as expected."""
        if not holds:
            raise ProblemError(f"{self.name}: {what} must {expected}, got {came}")

    def model(self) -> nn.Module:
        """The model, after a trial that its layers can be constrained."""
        problem = self.problem
        model = self.attempt("make_model()", problem.make_model)
        self.expect(isinstance(model, nn.Module), "make_model()", "return a torch.nn.Module", type(model).__name__)
        # The control selects the same layers as every method: a wrong name in `layers` or `exclude` shows here.
        self.attempt("constraining the model (layers, exclude)", lambda: problem.constrain(model, get(control())))
        return model

    def batches(self, dtype: torch.dtype) -> tuple[Batch, list[Batch]]:
        """A batch of the training data, and a few of the validation data."""
        problem = self.problem
        data = self.attempt("make_data()", lambda: load_data(problem))
        self.expect(isinstance(data, Data), "make_data()", "return a stiefel.compare.Data", type(data).__name__)
        for part in ("train", "validation", "test"):
            self.attempt("make_data()", partial(_check_part, self.name, part, getattr(data, part)))
        prepare = mover(torch.device("cpu"), dtype)
        # At most one batch: an iterable may never end.
        train = Batches(data.train, problem.batch_size, 0, prepare, 1)
        batch = self.attempt("make_data().train", lambda: next(train.epoch(), None))
        if batch is None:
            expected = f"give at least one batch of {problem.batch_size}"
            raise ProblemError(
                f"{self.name}: make_data().train must {expected}, got {size_of(data.train)}; give more data, or lower "
                "batch_size where the data are tensors"
            )
        return batch, _few(Batches(data.validation, problem.batch_size, 0, prepare).all())

    def training(self, model: nn.Module, batch: Batch) -> torch.optim.Optimizer:
        """The optimizer, after the loss and the schedule were tried."""
        problem = self.problem
        loss = self.attempt("loss()", lambda: problem.loss(model, batch))
        scalar = isinstance(loss, Tensor) and loss.ndim == 0 and loss.requires_grad
        expected = "return a scalar tensor that depends on the model's parameters"
        self.expect(scalar, "loss()", expected, _shape(loss))
        build: Any = problem.optimizer
        optimizer = self.attempt("optimizer(**hyper)", lambda: build(model.parameters(), lr=0.1, **problem.hyper))
        self.attempt("schedule()", lambda: problem.schedule(optimizer))
        return optimizer

    def evaluation(self, model: nn.Module, validation: list[Batch]) -> None:
        """Check that evaluation returns numbers, the metric among them."""
        problem = self.problem
        model.eval()
        with torch.no_grad():
            measures = self.attempt("evaluate() or measure()", lambda: problem.measure(model, validation))
        # measure() by default averages evaluate() and returns a dictionary: another result is from a problem's own.
        self.expect(isinstance(measures, dict), "measure()", "return a dictionary of numbers", type(measures).__name__)
        known = ", ".join(map(repr, measures)) or "no entries"
        self.expect(
            problem.metric in measures,
            "evaluate() or measure()",
            f"return the metric {problem.metric!r}",
            f"a dictionary with {known}",
        )
        for key, value in measures.items():
            number = isinstance(value, (int, float))
            self.expect(number, f"{key!r} of evaluate() or measure()", "be a number (use .item())", _shape(value))


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
            raise ProblemError(f"{where} must hold tensors of one length (first dimension), at least 1, got {lengths}")
    elif not isinstance(value, Iterable):
        raise ProblemError(f"{where} must be a tuple of tensors or an iterable of batches, got {type(value).__name__}")
    elif iter(value) is value:  # an iterator, such as a generator: used up after one epoch
        raise ProblemError(
            f"{where} can be iterated only once ({type(value).__name__}), but every epoch needs it; give a list, a "
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
