"""A model of a problem with a method on it, ready to step. Imports ``problem``, ``attach`` and ``measure``."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from stiefel.attach import gradient_norm, optimizer, penalty, release
from stiefel.compare.problem.batches import Batch, Batches, examples, seed_everything
from stiefel.compare.problem.problem import Problem, mean_of
from stiefel.compare.record.spec import RunSpec
from stiefel.constraint import control, get
from stiefel.errors import LayoutError, OptimizerError, OptionError, WeightError
from stiefel.measure.model.dependence import frozen_random_state

GRADIENT_EXAMPLES, GRADIENT_BATCH = 4096, 256
"""Training examples by which it is measured how stationary a model is, and how many of them at a time."""
PARTS = 20
"""Parts of the test set on which reported runs are scored one by one, at least."""
UNSUPPORTED = (LayoutError, OptimizerError, OptionError, WeightError)
"""A method that cannot hold a layer, or be served by the optimizer, is skipped with the reason: nothing has failed."""


class Training:
    """A model of a problem with a method on it, ready to step.

    For one seed every method starts from the same network: its constrained weights are first moved to the nearest
    orthogonal ones of the scale, a point of every method's set; but for the control that takes the network as it is.
    """

    def __init__(self, problem: Problem, spec: RunSpec, device: torch.device) -> None:
        self.problem, self.device = problem, device
        seed_everything(spec.seed)
        model = problem.make_model().to(device, getattr(torch, spec.dtype))
        method = get(spec.method, **spec.method_options)
        if method.orthogonal_start:
            # Constraining moves the weights onto the set; releasing leaves them there, as plain parameters.
            release(problem.constrain(model, get(control(), **control_options(spec.options))))
        self.model = problem.constrain(model, method)
        self.optimizer = optimizer(
            self.model, problem.optimizer, problem.parameters(self.model, spec.lr), lr=spec.lr, **problem.hyper
        )
        # Averages gradients over processes. Parameters are shared, so evaluation uses the model, without communication.
        self.network: nn.Module = DistributedDataParallel(self.model) if distributed.is_initialized() else self.model

    def step(self, batch: Batch) -> Tensor:
        """One training step of the problem; returns the loss without penalties, on the device."""
        return self.problem.train_step(self.network, self.optimizer, batch)

    @torch.no_grad()
    def evaluate(self, part: Batches) -> dict[str, float]:
        """The problem's measures on a part of the data."""
        with self.evaluating():
            return self.problem.measure(self.model, part.all(self.problem.evaluation_batch))

    @torch.no_grad()
    def evaluate_parts(self, part: Batches) -> tuple[dict[str, float], list[float] | None]:
        """The problem's measures on a part of the data, and the metric on each of some 20 equal parts of that.

        The parts tell how much the choice of examples matters. There are none where the metric is not a mean over
        examples, or where the data are not tensors, whose batches are equal.
        """
        problem = self.problem
        whole = type(problem).measure is Problem.measure and isinstance(part.part, tuple)
        size = min(len(part.part[0]) // PARTS, problem.evaluation_batch) if whole else 0  # type: ignore[index]
        if not size:
            return self.evaluate(part), None
        with self.evaluating():
            found = [(examples(batch), problem.evaluate(self.model, batch)) for batch in part.all(size)]
        # The last batch may be smaller: it counts in the mean and is no part.
        return mean_of(found), [measures[problem.metric] for count, measures in found if count == size]

    def gradient_norm(self, part: Batches) -> float:
        """How stationary the model is: ‖P_X(∂L/∂W)‖_F of training loss and penalties, on a part's first examples.

        In training mode, as gradients of steps are, on a copy, whose batch statistics may change.
        """
        model, batches, count = copy.deepcopy(self.model), [], 0
        for batch in part.all(GRADIENT_BATCH):
            batches.append(batch)
            count += examples(batch)
            if count >= GRADIENT_EXAMPLES:
                break

        def losses() -> Iterator[Tensor]:
            for batch in batches:  # the last may be smaller
                yield (self.problem.loss(model, batch) + penalty(model)) * (examples(batch) * len(batches) / count)

        with frozen_random_state(model):
            return gradient_norm(model, losses)

    @torch.no_grad()
    def keep(self, folder: Path) -> None:
        """Write what the problem wants to show of the trained model."""
        with self.evaluating():
            self.problem.keep(self.model, folder)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model in evaluation mode."""
        self.model.eval()
        try:
            yield
        finally:
            self.model.train()

    def finite(self) -> bool:
        """Whether every parameter is finite; of a reparameterized weight that is its proxy."""
        return all(bool(torch.isfinite(p).all()) for p in self.model.parameters())


def control_options(options: dict[str, Any]) -> dict[str, Any]:
    """The control's options for a method's: its group size and scale; 1 for a learnable one, which starts there."""
    shared = {key: value for key, value in options.items() if key in ("scale", "group_size")}
    return {**shared, "scale": 1.0} if shared.get("scale") == "learnable" else shared
