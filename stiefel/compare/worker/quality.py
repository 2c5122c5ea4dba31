"""One run: train a model and measure it. Under ``torchrun`` several processes train it on their shares of each batch.

Imports ``training``, ``data``, ``processes`` and ``measure``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.utils import parametrize

from stiefel.compare.problem.batches import Batches, size_of
from stiefel.compare.problem.problem import Problem
from stiefel.compare.record.folder import RunFolder, writing
from stiefel.compare.record.spec import RunSpec
from stiefel.compare.worker.data import parts
from stiefel.compare.worker.processes import is_first, join, own_share
from stiefel.compare.worker.training import UNSUPPORTED, Training
from stiefel.constraint import get
from stiefel.errors import DivergenceError
from stiefel.measure.cost.clock import StepClock
from stiefel.measure.cost.compilation import CompileClock
from stiefel.measure.cost.memory import peak_allocated_bytes, peak_resident_bytes
from stiefel.measure.model.orthogonality import errors

SIGNAL_BATCH = 256
"""Examples on which signals and gradients are measured."""


RATES = 10
"""Epochs of a reported run, evenly spread, after which effective rates are measured; tuning runs measure none."""


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
    if not diverged and is_first():
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
    if is_first():
        folder.append(row)
    return row


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
