"""What a problem is, and how it is loaded from a file. Imports the errors and torch."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stiefel.errors import ProblemError

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Data:
    """A data set in three parts, each a pair of tensors (inputs, targets) with equal first dimension."""

    train: Batch
    validation: Batch
    test: Batch


def where(default: Any, help: str = "") -> Any:
    """A problem's field that says where something is, not what is run: it does not enter a run's identity."""
    return field(default=default, metadata={"identity": False, "help": help})


@dataclass(frozen=True, kw_only=True)
class Problem(ABC):
    """A task on which methods are compared: a model, data, a loss, a metric with its target.

    A problem is a subclass in a file of its own, a frozen dataclass whose fields are the factors of the experiment:
    each becomes an option of ``stiefel compare FILE``, and an option with several values spans the grid.

    Args:
        epochs: passes over the training data.
        batch_size: examples per step; a last partial batch is dropped.
    """

    epochs: int = 30
    batch_size: int = 128

    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    target: ClassVar[float | None] = None
    """A validation metric that a run must reach to be `done` rather than `target missed`."""
    layers: ClassVar[Any] = None
    exclude: ClassVar[Any] = ()
    """What to constrain, as :func:`stiefel.constrain` takes it."""
    optimizer: ClassVar[type[torch.optim.Optimizer]] = torch.optim.SGD
    hyper: ClassVar[Mapping[str, Any]] = {}
    learning_rates: ClassVar[tuple[float, ...]] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    """The grid of every method: logarithmic, three decades or more."""
    scales: ClassVar[tuple[float | str, ...]] = (1.0, "relu")
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Values of factors that a comparison spans unless told otherwise; other factors keep their default."""
    budgets: ClassVar[Mapping[str, Mapping[str, tuple[Any, ...]]]] = {}
    """Named sets of values of factors, for ``--budget``."""

    @abstractmethod
    def make_model(self) -> nn.Module:
        """A new network; torch's generator is seeded before."""

    @abstractmethod
    def make_data(self) -> Data:
        """The data, the same for every run: the generators are seeded with a constant before."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The training loss of a batch, without penalties. Default: cross-entropy."""
        return F.cross_entropy(model(batch[0]), batch[1])

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """``{"loss": ..., metric: ...}`` on a part of the data. Default: cross-entropy and accuracy."""
        logits = model(batch[0])
        accuracy = (logits.argmax(-1) == batch[1]).float().mean().item()
        return {"loss": F.cross_entropy(logits, batch[1]).item(), "accuracy": accuracy}

    def schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler | None:
        """A learning-rate schedule stepped once per epoch, or None."""
        return None

    @classmethod
    def digest(cls) -> str:
        """12 hexadecimal digits that change with the problem's source; comments and layout apart."""
        source = Path(inspect.getfile(cls)).read_text(encoding="utf-8")
        return hashlib.sha256(ast.unparse(ast.parse(source)).encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """The problem's name in records and reports: its file's."""
        return type(self).__module__.rpartition(".")[2].removeprefix(_PREFIX)

    def identity(self) -> dict[str, Any]:
        """The field values that say what is run."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("identity", True)}

    def settings(self) -> dict[str, Any]:
        """All field values."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


_PREFIX = "stiefel_problem_"


def load_problem(path: str | Path) -> type[Problem]:
    """The problem class that a file defines.

    Raises:
        ProblemError: there is no such file, it fails on import, or it does not define exactly one problem.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise ProblemError(f"there is no problem file {str(path)!r}; give a Python file that defines a stiefel Problem")
    name = _PREFIX + path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ProblemError(
            f"{str(path)!r} is not a Python file; a problem is a .py file that defines a stiefel Problem"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # a problem may import the network that stands beside it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ProblemError(f"{path} fails on import: {type(error).__name__}: {error}") from error
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Problem) and value.__module__ == name
    ]
    concrete = [cls for cls in found if not inspect.isabstract(cls)]
    if len(concrete) == 1:
        return concrete[0]
    if found and not concrete:
        missing = ", ".join(sorted(found[0].__abstractmethods__))
        raise ProblemError(f"{path}: {found[0].__name__} is not complete, it does not define {missing}")
    what = f"{len(concrete)} problems ({', '.join(c.__name__ for c in concrete)})" if concrete else "no problem"
    raise ProblemError(
        f"{path} defines {what}; it must define one subclass of stiefel.compare.Problem (see benchmarks/omdsm.py)"
    )


def batches(data: Batch, size: int, generator: torch.Generator) -> Iterable[Batch]:
    """Shuffled batches of one epoch, the last partial one dropped; the order depends on the generator alone."""
    order = torch.randperm(len(data[0]), generator=generator)
    for start in range(0, len(order) - size + 1, size):
        rows = order[start : start + size].to(data[0].device)
        yield data[0][rows], data[1][rows]
