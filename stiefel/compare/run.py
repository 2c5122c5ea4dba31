"""One run: train a model and measure it, or time its steps beside the control. Runs in a process of its own.

Under ``torchrun`` the processes of a run train one model on their shares of each batch. Imports the public face,
``measure``, ``batches`` and ``problem``.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from stiefel.attach import constrained_weights, optimizer, release
from stiefel.compare.batches import Batch, Batches, mover, seed_everything, share, size_of
from stiefel.compare.problem import Data, Problem
from stiefel.compare.records import RunFolder, writing
from stiefel.compare.spec import RunSpec
from stiefel.errors import DivergenceError, LayoutError, OptimizerError, OptionError, WeightError
from stiefel.measure.cost.clock import StepClock, as_dict, interleaved
from stiefel.measure.cost.compilation import CompileClock
from stiefel.measure.cost.memory import peak_allocated_bytes, peak_resident_bytes
from stiefel.measure.cost.step import computed, gpu_cost
from stiefel.measure.model.dependence import dependence
from stiefel.measure.model.effective_rate import effective_rates
from stiefel.measure.model.orthogonality import errors
from stiefel.measure.model.signal import preservation, redundancy
from stiefel.measure.model.variance import activation_variance
from stiefel.methods import control, get

WARMUP, REPEATS = 20, 60
SIGNAL_BATCH = 256
"""Examples on which signals and gradients are measured."""
RATES = 10
"""Epochs of a reported run, evenly spread, after which effective rates are measured; tuning runs measure none."""
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


def load_data(problem: Problem) -> Data:
    """The problem's data, the same in every run also where its loading draws from the global generators."""
    seed_everything(0)
    return problem.make_data()


def parts(problem: Problem, spec: RunSpec, device: torch.device) -> dict[str, Batches]:
    """The parts of a problem's data by name, on the run's device and in its dtype, in an order of its seed."""
    data, prepare = load_data(problem), mover(device, getattr(torch, spec.dtype))
    found = {"train": data.train, "validation": data.validation, "test": data.test}
    # Tensors move once, here; the batches of an iterable one by one.
    moved = {name: prepare(part) if isinstance(part, tuple) else part for name, part in found.items()}
    limit = problem.steps_per_epoch
    return {
        name: Batches(part, problem.batch_size, spec.seed, prepare, limit if name == "train" else None)
        for name, part in moved.items()
    }


def join(spec: RunSpec) -> torch.device:
    """Where this process runs; joins the others of its run under ``torchrun``."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return torch.device(spec.device)
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if spec.device == "cuda" else "gloo")
    if spec.device != "cuda":
        return torch.device(spec.device)
    device = torch.device(spec.device, int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def own_share(batch: Batch) -> Batch:
    """This process's share of a batch."""
    if not distributed.is_initialized():
        return batch
    return share(batch, distributed.get_rank(), distributed.get_world_size())


def run_quality(problem: Problem, spec: RunSpec, folder: RunFolder) -> dict[str, Any]:
    """Train once and write a row of measurements per epoch.

    The clock runs during training steps, projections, retractions and penalties included, and stops during evaluation
    and while torch compiles, which is reported apart.

    Returns:
        The record's ``status``, ``reason`` and ``summary``.
    """
    device = join(spec)
    data = parts(problem, spec, device)
    try:
        training = Training(problem, spec, device)
    except UNSUPPORTED as error:
        return {"status": "skipped", "reason": str(error), "summary": {}}
    schedule = problem.schedule(training.optimizer)
    steps, seconds, compiling = 0, 0.0, CompileClock()
    reported = spec.phase == "final"
    measured = [_measure(training, data, steps, 0, seconds, None, folder, signals=True, gradients=reported)]
    diverged = None
    for epoch in range(1, problem.epochs + 1):
        clock, losses, compiled = StepClock(device), [], compiling.seconds
        try:
            for batch in map(own_share, data["train"].epoch()):
                with clock, compiling:
                    losses.append(training.step(batch))
                steps += 1
        except (RuntimeError, ArithmeticError) as error:
            if training.finite() and not isinstance(error, DivergenceError):
                raise
            diverged = f"gradients or weights became non-finite after step {steps}"
            break
        if not losses:
            raise ValueError(
                f"the training data give no batch: {size_of(data['train'].part)}, batch_size={problem.batch_size}"
            )
        if schedule is not None:
            schedule.step()
        seconds += clock.total() - (compiling.seconds - compiled)
        loss = torch.stack(losses).mean().item()
        if not (math.isfinite(loss) and training.finite()):
            diverged = f"loss or weights became non-finite in epoch {epoch}, by step {steps}"
            break
        last, every = epoch == problem.epochs, math.ceil(problem.epochs / RATES)
        gradients = reported and (last or epoch % every == 0)
        measured.append(
            _measure(training, data, steps, epoch, seconds, loss, folder, signals=last, gradients=gradients)
        )
    if not diverged and _first():
        with writing(folder.path):
            training.keep(folder.path)
    outcome = _conclude(problem, measured, steps, seconds, diverged, device)
    outcome["summary"] |= {
        "compile_seconds": compiling.seconds,
        "faults": get(spec.method, **spec.method_options).faults,
    }
    return outcome


def _measure(
    training: Training,
    data: dict[str, Batches],
    steps: int,
    epoch: int,
    seconds: float,
    loss: float | None,
    folder: RunFolder,
    *,
    signals: bool = False,
    gradients: bool = False,
) -> dict[str, Any]:
    with parametrize.cached():  # the weights do not change meanwhile: compute them once
        layers = errors(training.model)
        row = {
            "step": steps,
            "epoch": epoch,
            "seconds": seconds,
            "train_loss": loss,
            "validation": training.evaluate(data["validation"]),
            "test": training.evaluate(data["test"]),
            "orthogonality": {"worst": max(layers.values()), "layers": layers},
        }
        if signals:
            row |= training.signals(next(data["validation"].all(SIGNAL_BATCH)))
    if gradients:  # of copies, for which torch's cache of weights must be off
        row |= training.gradients(next(data["validation"].all(SIGNAL_BATCH)), pairs=signals)
    if _first():
        folder.append(row)
    return row


def _first() -> bool:
    """Whether this is a run's only process, or the one that writes."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def _conclude(
    problem: Problem, rows: list[dict[str, Any]], steps: int, seconds: float, diverged: str | None, device: torch.device
) -> dict[str, Any]:
    sign = 1 if problem.higher_is_better else -1
    known = [row for row in rows if math.isfinite(row["validation"][problem.metric])]
    if not known:
        why = diverged or f"the validation {problem.metric} is never finite"
        return {"status": "diverged", "reason": why, "summary": _declared(problem)}
    best = max(known, key=lambda row: sign * row["validation"][problem.metric])
    value = best["validation"][problem.metric]
    reached = [
        r
        for r in known
        if problem.target is not None and sign * r["validation"][problem.metric] >= sign * problem.target
    ]
    status: str
    reason: str | None
    if diverged:
        status, reason = "diverged", diverged
    elif problem.target is not None and not reached:
        status, reason = "target missed", f"best validation {problem.metric} {value:.4g}, target {problem.target:g}"
    else:
        status, reason = "done", None
    summary = {
        **_declared(problem),
        "best_epoch": best["epoch"],
        "best_validation": value,
        "test_at_best": best["test"][problem.metric],
        "final_validation": rows[-1]["validation"][problem.metric],
        "steps": steps,
        "seconds": seconds,
        "steps_to_target": reached[0]["step"] if reached else None,
        "seconds_to_target": reached[0]["seconds"] if reached else None,
        "orthogonality_worst": max(row["orthogonality"]["worst"] for row in rows),
        "orthogonality_final": rows[-1]["orthogonality"]["worst"],
        "peak_resident_bytes": peak_resident_bytes(),
        "gpu_peak_bytes": peak_allocated_bytes(device),
    }
    return {"status": status, "reason": reason, "summary": summary}


def _declared(problem: Problem) -> dict[str, Any]:
    """What a report needs to know of a problem, whose file may be gone by then."""
    return {
        "metric": problem.metric,
        "target": problem.target,
        "higher_is_better": problem.higher_is_better,
        "default_rate": problem.default_rate,
    }


def run_cost(problem: Problem, spec: RunSpec, folder: RunFolder) -> dict[str, Any]:
    """Time whole training steps of a method and of the unconstrained control, in turn, in one process.

    Returns:
        The record's ``status``, ``reason`` and ``summary``: seconds per step of both with quartiles, their ratio, the
        share of the step that the constraint takes, and the GPU's fields or the reason why they are null.
    """
    device = join(spec)
    batch = own_share(next(parts(problem, spec, device)["train"].epoch()))
    control_spec = RunSpec.from_dict(
        {**spec.to_dict(), "method": control(), "options": control_options(spec.options), "knobs": {}}
    )
    try:
        trainings = {"control": Training(problem, control_spec, device), "method": Training(problem, spec, device)}
    except UNSUPPORTED as error:
        return {"status": "skipped", "reason": str(error), "summary": {}}
    steps = {name: partial(training.step, batch) for name, training in trainings.items()}
    spreads = interleaved(steps, device, warmup=WARMUP, repeats=REPEATS)
    ratio = spreads["method"].median / spreads["control"].median
    parameters = sum(p.numel() for p in trainings["method"].model.parameters())
    summary = {
        "step_seconds": as_dict(spreads),
        "step_ratio": ratio,
        "constraint_share": 1 - 1 / ratio,
        "parameters": parameters,
        "constrained_weights": len(list(constrained_weights(trainings["method"].model))),
        **computed(steps["method"]),
        **gpu_cost(device, steps["method"]),
    }
    return {"status": "done", "reason": None, "summary": summary}


KINDS = {"quality": run_quality, "cost": run_cost}
