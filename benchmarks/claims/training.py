"""What the claims train: the deep MLP of ``omdsm.py``, step by step, with whatever looks on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from omdsm import OMDSM
from torch import Tensor, nn

import stiefel
from stiefel.compare.problem.batches import Part

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large an experiment is.

    Args:
        data, examples: of ``datasets.load``.
        depth, width: hidden layers and their units.
        epochs, batch: passes over the data, examples a step.
        seeds: how many networks of each kind.
        rates: learning rates tried.
    """

    data: str = "digits"
    examples: int | None = None
    depth: int = 8
    width: int = 100
    epochs: int = 35
    batch: int = 128
    seeds: int = 3
    rates: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)

    def problem(self, **factors: Any) -> OMDSM:
        """The problem of that size, with factors such as ``norm`` and ``bias``."""
        return OMDSM(
            data=self.data, examples=self.examples, depth=self.depth, width=self.width, epochs=self.epochs,
            batch_size=self.batch, **factors,
        )  # fmt: skip

    def seeded(self) -> Iterator[int]:
        """The seeds."""
        return iter(range(self.seeds))


SHOWN = Size()
TINY = Size(depth=3, width=32, epochs=2, seeds=2, rates=(0.3, 1.0))


@dataclass
class Run:
    """A network in training.

    Args:
        problem: of which.
        method: on its hidden weights, a name or an object.
        lr, seed: learning rate of plain SGD; seed of the start and of the batches' order.
        options: of the method.
    """

    problem: OMDSM
    method: str | stiefel.Constraint
    lr: float
    seed: int
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        data = self.problem.make_data()
        self.train, self.validation, self.test = map(_pair, (data.train, data.validation, data.test))
        self.model: nn.Module = self.problem.make_model()
        given = self.method
        method = stiefel.get(given, **self.options) if isinstance(given, str) else replace(given, **self.options)
        self.model = self.problem.constrain(self.model, method)
        self._optimize()
        self.order = torch.Generator().manual_seed(self.seed)
        self.steps, self.diverged = 0, False

    def _optimize(self) -> None:
        self.optimizer = stiefel.optimizer(self.model, torch.optim.SGD, lr=self.lr)
        self.schedule: Any = self.problem.schedule(self.optimizer)

    def exchange(self, cls: type[M], make: Callable[[M], nn.Module]) -> Run:
        """Put other modules in the place of those of a class, before training."""
        for name, part in list(self.model.named_children()):
            if isinstance(part, cls):
                setattr(self.model, name, make(part))
        self._optimize()
        return self

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the training data."""
        x, y = self.train
        size = self.problem.batch_size
        for rows in torch.randperm(len(y), generator=self.order).split(size):
            if len(rows) == size:
                yield x[rows], y[rows]

    def go(self, each: Callable[[Run, Tensor], None] | None = None, epoch: Callable[[Run], None] | None = None) -> Run:
        """Train; stops where it diverges.

        Args:
            each: called after every step with the run and the loss.
            epoch: called at the start and after every epoch.
        """
        if epoch:
            epoch(self)
        for _ in range(self.problem.epochs):
            for batch in self.batches():
                try:
                    loss = self.problem.train_step(self.model, self.optimizer, batch)
                except stiefel.DivergenceError:
                    self.diverged = True
                    return self
                self.steps += 1
                if each:
                    each(self, loss)
            self.schedule.step()
            if epoch:
                epoch(self)
        self.diverged = not all(p.isfinite().all() for p in self.model.parameters())
        return self

    @torch.no_grad()
    def accuracy(self, part: tuple[Tensor, Tensor] | None = None) -> float:
        """On the test data, or a part given; in evaluation mode. 0 where training has diverged."""
        if self.diverged:
            return 0.0
        x, y = self.test if part is None else part
        was = self.model.training
        self.model.eval()
        found = (self.model(x).argmax(1) == y).double().mean().item()
        self.model.train(was)
        return found


def _pair(part: Part) -> tuple[Tensor, Tensor]:
    assert isinstance(part, tuple)
    inputs, targets = part
    return inputs, targets
