"""What a problem consists of. Imports ``batches``, ``source``, ``attach``, ``constraint``, the errors and torch."""

from __future__ import annotations

import ast
import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stiefel.attach import constrain, penalty
from stiefel.compare.problem.batches import Batch, Part, examples
from stiefel.compare.problem.source import PREFIX, sources_of
from stiefel.constraint import Constraint
from stiefel.errors import ProblemError


@dataclass(frozen=True)
class Data:
    """A data set in three parts: for training, for choosing (validation), for reporting (test).

    Each is either a tuple of tensors with equal first dimension, usually (inputs, targets), which the comparison
    shuffles and cuts into batches; or any iterable that gives batches anew each time it is iterated (a list, a
    ``DataLoader``, an object with ``__iter__``), each whatever the problem's loss takes.
    """

    train: Part
    validation: Part
    test: Part


def where(default: Any, help: str = "") -> Any:
    """A problem's field that says where something is, not what is run: it does not enter a run's identity."""
    return field(default=default, metadata={"identity": False, "help": help})


@dataclass(frozen=True, kw_only=True)
class Problem(ABC):
    """A task on which methods are compared: a model, data, a loss, a metric with its target.

    A problem is a subclass in a file of its own, a frozen dataclass whose fields are the factors of the experiment:
    each becomes an option of ``stiefel compare FILE``, and an option with several values spans the grid.

    Args:
        epochs: passes over the training data; the model is evaluated after each.
        batch_size: examples per step where the data are tensors; a last partial batch is dropped.
    """

    epochs: int = 30
    batch_size: int = 128

    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    log_scale: ClassVar[bool] = False
    """Whether the metric spans decades, as a gap to an optimum does: then means are geometric, and ratios are told."""
    target: ClassVar[float | None] = None
    """A validation metric that a run must reach to be `done` rather than `target missed`."""
    layers: ClassVar[Any] = None
    exclude: ClassVar[Any] = ()
    """What to constrain, as :func:`stiefel.constrain` takes it."""
    optimizer: ClassVar[type[torch.optim.Optimizer]] = torch.optim.SGD
    hyper: ClassVar[Mapping[str, Any]] = {}
    learning_rates: ClassVar[tuple[float, ...]] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    """The grid of every method: logarithmic, three decades or more."""
    default_rate: ClassVar[float] = 0.1
    """The learning rate that one would take untuned: reports show it beside the tuned one."""
    steps_per_epoch: ClassVar[int | None] = None
    """Batches per epoch at most; needed where the training data are an iterable that never ends."""
    evaluation_batch: ClassVar[int] = 4096
    """Examples evaluated at a time where the data are tensors."""
    dependent_layers: ClassVar[int] = 12
    """Constrained layers, evenly spread, between which reported runs measure at their start and end how far a step of
    one turns the gradient of another; a gradient of one batch for each. 0: neither that nor effective rates, for models
    that are too slow or cannot be copied."""
    scales: ClassVar[tuple[float | str, ...]] = (1.0, "relu")
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Values of factors that a comparison spans by default; other factors keep their default value."""
    budgets: ClassVar[Mapping[str, Mapping[str, tuple[Any, ...]]]] = {}
    """Named sets of values of factors, for ``--budget``."""

    def __post_init__(self) -> None:
        for f in fields(self):
            written = getattr(type(self), f.name, f.default)
            if written is not f.default:  # a dataclass takes annotated values only, and would leave this one out
                raise ProblemError(
                    f"{type(self).__name__}: {f.name} = {written!r} has no effect as it is written; write {f.name}: "
                    f"{getattr(f.type, '__name__', f.type)} = {written!r}, and @dataclass(frozen=True, kw_only=True) "
                    "above the class"
                )

    @abstractmethod
    def make_model(self) -> nn.Module:
        """A new network; torch's generator is seeded before."""

    @abstractmethod
    def make_data(self) -> Data:
        """The data, the same for every run: the generators are seeded with a constant before."""

    def constrain(self, model: nn.Module, method: Constraint) -> nn.Module:
        """Put a method on the model, in place. Default: as it is, on ``layers`` without ``exclude``.

        A problem that constrains different layers differently (groups of other sizes, say) overrides this one.
        """
        return constrain(model, method, layers=self.layers, exclude=self.exclude)

    def parameters(self, model: nn.Module, lr: float) -> Iterable[Any]:
        """What the optimizer is given: parameters, or groups with options of their own. Default: all parameters.

        Args:
            model: constrained; the name of a parameter behind a weight contains that weight's name.
            lr: the learning rate of the run, for groups at a share of it.
        """
        return model.parameters()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The training loss of a batch, a scalar, without penalties. Default: cross-entropy."""
        return F.cross_entropy(model(batch[0]), batch[1])

    def train_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
        """One training step on a batch; returns the loss to be recorded, without penalties and without a graph.

        Default: one step down :meth:`loss` and the methods' penalties. Override it for networks that are
        updated in turn, or several times a batch: each backward pass that reaches a constrained weight then has to
        include ``stiefel.penalty(model)``; parameters whose gradient is None are not stepped. The
        whole of it is timed. Under ``torchrun`` ``model`` is wrapped, and only what its own call returns is averaged.
        """
        optimizer.zero_grad()
        loss = self.loss(model, batch)
        (loss + penalty(model)).backward()
        optimizer.step()
        return loss.detach()

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """``{metric: ..., ...}``, means over the examples of a batch. Default: cross-entropy and accuracy."""
        logits = model(batch[0])
        accuracy = (logits.argmax(-1) == batch[1]).float().mean().item()
        return {"loss": F.cross_entropy(logits, batch[1]).item(), "accuracy": accuracy}

    def measure(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """The metric and what else is of interest on a part of the data.

        Default: the mean of :meth:`evaluate` over its batches, weighted by their numbers of examples. Override it
        for a metric that is not a mean over examples (an F score, a distance of distributions).
        """
        return mean_of((examples(batch), self.evaluate(model, batch)) for batch in batches)

    def keep(self, model: nn.Module, folder: Path) -> None:  # noqa: B027  may be left as it is
        """Write files that show what was learned, such as pictures, into the run's folder. Default: none.

        It is called once, when a run has trained to its end, with the model in evaluation mode and without gradients.
        """

    def schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler | None:
        """A learning-rate schedule stepped once per epoch, or None."""
        return None

    @classmethod
    def digest(cls) -> str:
        """12 hexadecimal digits that change with the problem's source and that of what it imports from its folder.

        Comments and layout apart.
        """
        # unparse drops comments and layout; docstrings stay, and change the digest.
        trees = sources_of(Path(inspect.getfile(cls)), {}).values()
        return hashlib.sha256("".join(map(ast.unparse, trees)).encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """The problem's name in records and reports: its file's."""
        return type(self).__module__.rpartition(".")[2].removeprefix(PREFIX)

    def identity(self) -> dict[str, Any]:
        """The field values that say what is run."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("identity", True)}

    def settings(self) -> dict[str, Any]:
        """All field values."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def mean_of(found: Iterable[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """The means of batches' measures, weighted by their numbers of examples."""
    sums: dict[str, float] = {}
    count = 0
    # Batches may differ in size: a mean of their means would give the examples of a small one more weight.
    for size, measures in found:
        for name, value in measures.items():
            sums[name] = sums.get(name, 0.0) + size * value
        count += size
    return {name: total / count for name, total in sums.items()}


@dataclass(frozen=True, kw_only=True)
class Regression(Problem):
    """A problem with real targets: the loss and the metric are the mean squared error, and less is better."""

    metric: ClassVar[str] = "mse"
    higher_is_better: ClassVar[bool] = False

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """``mean (model(x) − y)²`` over examples and outputs."""
        return F.mse_loss(*self._aligned(model, batch))

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """Mean squared and mean absolute error."""
        outputs, targets = self._aligned(model, batch)
        return {"mse": F.mse_loss(outputs, targets).item(), "mae": F.l1_loss(outputs, targets).item()}

    def _aligned(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        outputs, targets = model(batch[0]), batch[1]
        if outputs.shape != targets.shape:  # (b, 1) minus (b,) would broadcast to (b, b)
            raise ProblemError(
                f"{type(self).__name__}: the model's outputs of shape {tuple(outputs.shape)} and targets of shape "
                f"{tuple(targets.shape)} must have the same shape; squeeze or unsqueeze one of them"
            )
        return outputs, targets
