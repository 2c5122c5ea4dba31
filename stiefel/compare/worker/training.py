"""A model of a problem with a method on it, ready to step. Imports ``problem``, ``attach`` and ``measure``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from stiefel.attach import optimizer, release
from stiefel.compare.problem.batches import Batch, Batches, seed_everything
from stiefel.compare.problem.problem import Problem
from stiefel.compare.record.spec import RunSpec
from stiefel.constraint import control, get
from stiefel.errors import LayoutError, OptimizerError, OptionError, WeightError
from stiefel.measure.model.dependence import dependence
from stiefel.measure.model.effective_rate import effective_rates
from stiefel.measure.model.signal import preservation, redundancy
from stiefel.measure.model.variance import activation_variance

UNSUPPORTED = (LayoutError, OptimizerError, OptionError, WeightError)
"""A method that cannot hold a layer, or be served by the optimizer, is skipped with the reason: nothing has failed."""


class Training:
    """A model of a problem with a method on it, ready to step.

    For one seed every method starts from the same network: its constrained weights are first moved to the nearest
    orthogonal ones of the scale, a point of every method's set.
    """

    def __init__(self, problem: Problem, spec: RunSpec, device: torch.device) -> None:
        self.problem, self.device = problem, device
        seed_everything(spec.seed)
        model = problem.make_model().to(device, getattr(torch, spec.dtype))
        release(problem.constrain(model, get(control(), **control_options(spec.options))))
        self.model = problem.constrain(model, get(spec.method, **spec.method_options))
        self.optimizer = optimizer(self.model, problem.optimizer, lr=spec.lr, **problem.hyper)
        self.network: nn.Module = DistributedDataParallel(self.model) if distributed.is_initialized() else self.model

    def step(self, batch: Batch) -> Tensor:
        """One training step of the problem; returns the loss without penalties, on the device."""
        return self.problem.train_step(self.network, self.optimizer, batch)

    @torch.no_grad()
    def evaluate(self, part: Batches) -> dict[str, float]:
        """The problem's measures on a part of the data."""
        with self._evaluation():
            return self.problem.measure(self.model, part.all(self.problem.evaluation_batch))

    @torch.no_grad()
    def keep(self, folder: Path) -> None:
        """Write what the problem wants to show of the trained model."""
        with self._evaluation():
            self.problem.keep(self.model, folder)

    def signals(self, batch: Batch) -> dict[str, Any]:
        """Energy preservation and variance of each layer on a batch, and redundancy of its filters."""
        with self._evaluation():
            layers = preservation(self.model, lambda: self.problem.loss(self.model, batch))
            variance = activation_variance(self.model, lambda: self.problem.loss(self.model, batch))
        energy = {
            name: {key: value for key, value in asdict(s).items() if key != "calls"} for name, s in layers.items()
        }
        return {"energy": energy, "variance": variance, "redundancy": redundancy(self.model)}

    def gradients(self, batch: Batch, *, pairs: bool) -> dict[str, Any]:
        """Effective rates of the layers on a batch, and of each pair of them how far one's step turns the other's.

        What copies of a model cannot do costs these fields, with the reason, and not the run.
        """
        most = self.problem.dependent_layers
        if not most:
            return {}
        try:
            found: dict[str, Any] = {
                "effective_rate": effective_rates(self.model, lambda m: self.problem.loss(m, batch))
            }
            if pairs:
                turns = dependence(self.model, lambda m: self.problem.loss(m, batch), most=most)
                found["dependence"] = turns.to_dict()
        except Exception as error:
            return {"gradients_reason": f"{type(error).__name__}: {error}"}
        return found

    @contextlib.contextmanager
    def _evaluation(self) -> Iterator[None]:
        """The model in evaluation mode."""
        self.model.eval()
        try:
            yield
        finally:
            self.model.train()

    def finite(self) -> bool:
        """Whether every parameter still is."""
        return all(bool(torch.isfinite(p).all()) for p in self.model.parameters())


def control_options(options: dict[str, Any]) -> dict[str, Any]:
    """The control's options beside a method's: the same set, at the scale where a learnable one starts."""
    shared = {key: value for key, value in options.items() if key in ("scale", "group_size")}
    return {**shared, "scale": 1.0} if shared.get("scale") == "learnable" else shared
