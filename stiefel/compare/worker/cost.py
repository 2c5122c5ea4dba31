"""Timing steps beside the control's. Imports ``training`` and ``measure``."""

from __future__ import annotations

from functools import partial
from typing import Any

from stiefel.attach import constrained_weights
from stiefel.compare.problem.problem import Problem
from stiefel.compare.record.run_folder import RunFolder
from stiefel.compare.record.spec import RunSpec
from stiefel.compare.worker.data import parts
from stiefel.compare.worker.processes import join, own_share
from stiefel.compare.worker.training import UNSUPPORTED, Training, control_options
from stiefel.constraint import control
from stiefel.measure.cost.clock import as_dict, interleaved
from stiefel.measure.cost.step import computed, gpu_cost

WARMUP, REPEATS = 20, 60  # steps of each kind: untimed, then timed


def run_cost(problem: Problem, spec: RunSpec, folder: RunFolder) -> dict[str, Any]:
    """Time whole training steps of a method and of the unconstrained control, in turn, in one process.

    Returns:
        The record's ``status``, ``reason`` and ``summary``: seconds per step of both with quartiles, their ratio, the
        share of the step that the constraint takes, and the GPU's fields or the reason why they are null.
    """
    device = join(spec)
    batch = own_share(next(parts(problem, spec, device)["train"].epoch()))
    # The control keeps scale and group size, hence the starting point; other options are the method's own.
    control_spec = RunSpec.from_dict(
        {**spec.to_dict(), "method": control(), "options": control_options(spec.options), "knobs": {}}
    )
    try:
        trainings = {"control": Training(problem, control_spec, device), "method": Training(problem, spec, device)}
    except UNSUPPORTED as error:
        return {"status": "skipped", "reason": str(error), "summary": {}}
    # Every step takes the same batch: loading data is not part of the cost.
    steps = {name: partial(training.step, batch) for name, training in trainings.items()}
    spreads = interleaved(steps, device, warmup=WARMUP, repeats=REPEATS)
    ratio = spreads["method"].median / spreads["control"].median
    parameters = sum(p.numel() for p in trainings["method"].model.parameters())
    summary = {
        "step_seconds": as_dict(spreads),
        "step_ratio": ratio,
        "constraint_share": 1 - 1 / ratio,  # (t_method − t_control) / t_method
        "parameters": parameters,
        "constrained_weights": len(list(constrained_weights(trainings["method"].model))),
        # These take further steps, after the timing: counting intercepts every operator and slows the step.
        **computed(steps["method"]),
        **gpu_cost(device, steps["method"]),
    }
    return {"status": "done", "reason": None, "summary": summary}
