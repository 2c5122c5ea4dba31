"""Timing steps beside the control's. Imports ``training`` and ``measure``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from stiefel.attach import constrained_weights
from stiefel.compare.problem.batches import size_of
from stiefel.compare.problem.problem import Problem
from stiefel.compare.record.run_folder import RunFolder
from stiefel.compare.record.spec import RunSpec
from stiefel.compare.worker.data import parts
from stiefel.compare.worker.processes import join, own_share
from stiefel.compare.worker.training import UNSUPPORTED, Training, control_options
from stiefel.constraint import control
from stiefel.measure.cost.clock import Spread, as_dict, interleaved
from stiefel.measure.cost.step import computed, gpu_cost

WARMUP, REPEATS = 20, 60  # steps of each kind: untimed, then timed
ATTEMPTS = 3
"""How often the steps are timed, each time twice as many, until the times can be believed."""
SELF, STEADY = 0.05, 0.15
"""How far the control may be from itself, and quartiles apart, of the median, for times to be believed."""


def run_cost(problem: Problem, spec: RunSpec, folder: RunFolder) -> dict[str, Any]:
    """Time whole training steps of a method and of the unconstrained control, in turn, in one process.

    A second copy of the control is timed as if it were a method: what differs between the two is the machine's doing.

    Returns:
        The record's ``status``, ``reason`` and ``summary``: seconds per step of all with quartiles, the ratio of the
        method to the control and of the control to itself, the share of the step that the constraint takes, why the
        times cannot be believed (null where they can), and the GPU's fields or the reason why they are null.
    """
    device = join(spec)
    data = parts(problem, spec, device)["train"]
    batch = next(map(own_share, data.epoch()), None)
    if batch is None:
        raise ValueError(f"the training data ({size_of(data.part)}) give no batch of {problem.batch_size}")
    # The control keeps scale and group size, hence the starting point; other options are the method's own.
    control_spec = replace(spec, method=control(), options=control_options(spec.options), knobs={})
    # Of the control itself the copy is the method.
    specs = {"control": control_spec, "again": control_spec} | ({"method": spec} if spec != control_spec else {})
    try:
        trainings = {name: Training(problem, each, device) for name, each in specs.items()}
    except UNSUPPORTED as error:
        return {"status": "skipped", "reason": str(error), "summary": {}}
    # Every step takes the same batch: loading data is not part of the cost.
    steps = {name: partial(training.step, batch) for name, training in trainings.items()}
    for attempt in range(ATTEMPTS):
        spreads = interleaved(steps, device, warmup=0 if attempt else WARMUP, repeats=REPEATS * 2**attempt)
        doubt = doubt_of(spreads)
        if doubt is None:
            break
    timed = {"control": spreads["control"], "method": spreads.get("method", spreads["control"])}
    ratio = timed["method"].median / timed["control"].median
    training = trainings.get("method", trainings["control"])
    del trainings, steps  # so that the peak of a GPU's memory is that of the method alone
    summary = {
        "step_seconds": as_dict(timed),
        "step_ratio": ratio,
        "self_ratio": spreads["again"].median / spreads["control"].median,
        "cost_doubt": doubt,
        "cost_attempts": attempt + 1,
        "constraint_share": 1 - 1 / ratio,  # (t_method − t_control) / t_method
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "constrained_weights": len(list(constrained_weights(training.model))),
        # These take further steps, after the timing: counting intercepts every operator and slows the step.
        **computed(partial(training.step, batch)),
        **gpu_cost(device, partial(training.step, batch)),
    }
    return {"status": "done", "reason": None, "summary": summary}


def doubt_of(spreads: Mapping[str, Spread]) -> str | None:
    """Why the times of the control, of its copy ``again`` and of a method cannot be believed; None where they can."""
    itself = spreads["again"].median / spreads["control"].median
    if abs(itself - 1) > SELF:
        return f"the machine was busy: the step without a constraint took {itself:.2f} times itself"
    width = max((spread.q3 - spread.q1) / spread.median for spread in spreads.values())
    if width > STEADY:
        return f"the machine was busy: step times differ by {width:.0%} between their quartiles"
    return None
