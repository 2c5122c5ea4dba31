"""One run: train a model and measure it. Under ``torchrun`` several processes train it on their shares of each batch.

Imports ``training``, ``data``, ``processes``, ``probes`` and ``measure``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.utils import parametrize

from stiefel.compare.problem.batches import Batches, size_of
from stiefel.compare.problem.problem import Problem
from stiefel.compare.record.run_folder import RunFolder
from stiefel.compare.record.spec import RunSpec
from stiefel.compare.worker.data import parts
from stiefel.compare.worker.probes import Moment, probe
from stiefel.compare.worker.processes import is_first, join, own_share
from stiefel.compare.worker.training import UNSUPPORTED, Training
from stiefel.constraint import get
from stiefel.errors import DivergenceError
from stiefel.measure.cost.clock import StepClock
from stiefel.measure.cost.compilation import CompileClock
from stiefel.measure.cost.memory import peak_allocated_bytes, peak_resident_bytes
from stiefel.measure.model.orthogonality import errors

EVERY = 200
"""Steps between two measurements of orthogonality, late in a training."""


def run_quality(problem: Problem, spec: RunSpec, folder: RunFolder) -> dict[str, Any]:
    """Train once and write a row of measurements per epoch.

    Returns:
        The record's ``status``, ``reason`` and ``summary``.
    """
    try:
        run = QualityRun(problem, spec, folder)
    except UNSUPPORTED as error:
        return {"status": "skipped", "reason": str(error), "summary": {}}
    run.train()
    return run.conclude()


class QualityRun:
    """A training under way: what it trains, how far it is, and the rows of measurements so far.

    The clock runs during training steps, projections, retractions and penalties included, and stops during evaluation
    and while torch compiles, which is reported apart.

    Raises:
        LayoutError, OptimizerError, OptionError, WeightError: the method cannot hold a layer of the problem's model, or
            be served by its optimizer.
    """

    def __init__(self, problem: Problem, spec: RunSpec, folder: RunFolder) -> None:
        self.problem, self.spec, self.folder, self.device = problem, spec, folder, join(spec)
        # Data before Training: loading them seeds the global generators with 0, Training with the seed of the run.
        self.data = parts(problem, spec, self.device)
        self.training = Training(problem, spec, self.device)
        self.schedule = problem.schedule(self.training.optimizer)
        self.steps, self.seconds, self.compiling = 0, 0.0, CompileClock()
        self.rows: list[dict[str, Any]] = []
        self.diverged: str | None = None
        self.worst, self.moments = (0.0, 0), 0

    def train(self) -> None:
        """All epochs, with a row before the first and after each, until one diverges."""
        self.measure(0, None)  # epoch 0: the network at its start, the same for all methods of a seed
        for epoch in range(1, self.problem.epochs + 1):
            loss = self.train_epoch(epoch)
            if loss is None:
                return
            self.measure(epoch, loss)
        if is_first():
            self.training.keep(self.folder.path)  # its errors are the problem's, not the disk's

    def train_epoch(self, epoch: int) -> float | None:
        """The mean loss of an epoch's steps; None where it diverged: ``diverged`` then says where."""
        clock, losses, compiled = StepClock(self.device), [], self.compiling.seconds
        try:
            for batch in map(own_share, self.data["train"].epoch()):
                with clock, self.compiling:
                    losses.append(self.training.step(batch))  # left on the device: reading it would synchronize
                self.steps += 1
                if due(self.steps):
                    with parametrize.cached():
                        self.note(max(errors(self.training.model).values()))
        except (RuntimeError, ArithmeticError) as error:
            # Factorizations raise on non-finite input: with non-finite weights the error is divergence, else a fault.
            if self.training.finite() and not isinstance(error, DivergenceError):
                raise
            self.diverged = f"gradients or weights became non-finite after step {self.steps}"
            return None
        if not losses:
            part, batch_size = size_of(self.data["train"].part), self.problem.batch_size
            raise ValueError(f"training data ({part}) give no batch; tensors need batch_size={batch_size} or more")
        if self.schedule is not None:
            self.schedule.step()
        # The clock also ran while torch compiled inside a step: that time is reported apart.
        self.seconds += clock.total() - (self.compiling.seconds - compiled)
        loss = torch.stack(losses).mean().item()  # of this process's shares of the batches
        if not (math.isfinite(loss) and self.training.finite()):
            self.diverged = f"loss or weights became non-finite in epoch {epoch}, by step {self.steps}"
            return None
        return loss

    def measure(self, epoch: int, loss: float | None) -> None:
        """Add a row: scores, orthogonality, and what the probes find at this moment."""
        training, moment = self.training, Moment(epoch, self.problem.epochs, self.spec.phase == "final")
        with parametrize.cached():  # the weights do not change meanwhile: compute them once
            layers = errors(training.model)
            test, test_parts = self.scored()
            row = {
                "step": self.steps,
                "epoch": epoch,
                "seconds": self.seconds,
                "train_loss": loss,
                "validation": training.evaluate(self.data["validation"]),
                "test": test,
                "orthogonality": {"worst": max(layers.values()), "layers": layers},
                **probe(training, self.data["validation"], moment, copies=False),
            }
        # Outside cached(): a copy that takes steps would keep the weights computed before them.
        row |= probe(training, self.data["validation"], moment, copies=True)
        if is_first():
            self.folder.append(row)
        self.note(max(layers.values()))
        self.rows.append(row | {"test_parts": test_parts})  # of which the summary keeps those of the best epoch

    def scored(self) -> tuple[dict[str, float], list[float] | None]:
        """Measures on the test set; of a reported run also the metric on parts of it."""
        if self.spec.phase == "final":
            return self.training.evaluate_parts(self.data["test"])
        return self.training.evaluate(self.data["test"]), None

    def note(self, error: float) -> None:
        """Keep the largest orthogonality error of all moments that are measured, and its step."""
        self.moments += 1
        if error > self.worst[0]:
            self.worst = (error, self.steps)

    def stationarity(self) -> dict[str, Any]:
        """The gradient's norm where a reported run has ended; None, with a reason, where it cannot be measured."""
        if self.spec.phase != "final":
            return {}
        try:
            return {"gradient_norm": self.training.gradient_norm(self.data["train"])}
        except Exception as error:
            return {"gradient_norm": None, "gradient_norm_reason": f"{type(error).__name__}: {error}"}

    def conclude(self) -> dict[str, Any]:
        """The record's ``status``, ``reason`` and ``summary``."""
        outcome = _outcome(self.problem, self.rows, self.diverged)
        outcome["summary"] |= {
            "compile_seconds": self.compiling.seconds,
            "faults": get(self.spec.method, **self.spec.method_options).faults,
        }
        if "best_validation" in outcome["summary"]:  # missing where no epoch had a finite metric
            outcome["summary"] |= {
                "orthogonality_worst": self.worst[0],
                "orthogonality_worst_step": self.worst[1],
                "orthogonality_moments": self.moments,
                "test_examples": _examples(self.data["test"]),
                **self.stationarity(),
                "steps": self.steps,
                "seconds": self.seconds,
                "peak_resident_bytes": peak_resident_bytes(),
                "gpu_peak_bytes": peak_allocated_bytes(self.device),
            }
        return outcome


def _outcome(problem: Problem, rows: list[dict[str, Any]], diverged: str | None) -> dict[str, Any]:
    sign = 1 if problem.higher_is_better else -1  # sign · metric is always to be maximized
    known = [row for row in rows if math.isfinite(row["validation"][problem.metric])]
    if not known:
        why = diverged or f"the validation {problem.metric} is never finite"
        return {"status": "diverged", "reason": why, "summary": _declared(problem)}
    # The epoch is chosen on validation data; the test metric is only read off there, so that it stays unbiased.
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
        "test_parts": best["test_parts"],
        "final_validation": rows[-1]["validation"][problem.metric],
        "steps_to_target": reached[0]["step"] if reached else None,
        "seconds_to_target": reached[0]["seconds"] if reached else None,
        "orthogonality_final": rows[-1]["orthogonality"]["worst"],
    }
    return {"status": status, "reason": reason, "summary": summary}


def _declared(problem: Problem) -> dict[str, Any]:
    """What a report needs to know of a problem, whose file may be gone by then."""
    return {
        "metric": problem.metric,
        "target": problem.target,
        "higher_is_better": problem.higher_is_better,
        "log_scale": problem.log_scale,
        "default_rate": problem.default_rate,
    }


def due(step: int) -> bool:
    """Whether the weights are measured after a training step, beside the ends of epochs.

    At steps 1, 2, 4, 8, … and every 200th: dense at first, where weights leave a set or come back to it, and within
    some 1 % of the time, as one measurement costs about a Gram matrix of each weight. The steps do not depend on a
    clock, so that runs of one seed measure at the same ones.
    """
    return step & (step - 1) == 0 or step % EVERY == 0


def _examples(part: Batches) -> int | None:
    return len(part.part[0]) if isinstance(part.part, tuple) else None
