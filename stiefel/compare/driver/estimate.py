"""How long a comparison may take, from what has ended before. Imports ``plan``, ``record`` and ``worker``."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from stiefel.compare.plan.plan import RACE_SEEDS, RACED, Plan
from stiefel.compare.plan.variants import label_of
from stiefel.compare.record.records import Record
from stiefel.compare.record.spec import RunSpec
from stiefel.compare.worker.cost import REPEATS, WARMUP
from stiefel.constraint import control


class Times:
    """Seconds by method and setting; without a run of both, those of the setting, then those of the method."""

    def __init__(self) -> None:
        self._found: dict[Any, list[float]] = defaultdict(list)

    def add(self, spec: RunSpec, seconds: float) -> None:
        """Note what one run took."""
        for key in _keys(spec):
            self._found[key].append(seconds)

    def __contains__(self, spec: RunSpec) -> bool:
        """Whether there is a time of this method in this setting."""
        return _keys(spec)[0] in self._found

    def __bool__(self) -> bool:
        """Whether there is any time at all."""
        return bool(self._found)

    def of(self, spec: RunSpec) -> float:
        """The median time of the closest runs that are known."""
        return statistics.median(next(self._found[key] for key in _keys(spec) if key in self._found))


def _keys(spec: RunSpec) -> list[Any]:
    setting = repr(sorted(spec.fields.items()))
    label = label_of(spec)
    # From the closest to the widest; None stands for any method or any setting.
    return [(label, setting), (None, setting), (label, None), (None, None)]


class Pace:
    """How long the runs of a problem take.

    A quality run takes as long as those that have ended. A cost run starts a new process, which imports everything
    (quality runs on the CPU are forked from one that has), then takes steps of the method and of the control, whose
    times are known from training. The time to load its data is in no record, and left out.

    Args:
        records: runs of one problem on one device that have ended.
        start: seconds that a new process takes to import a module.
        forked: whether quality runs on the CPU are forked: not under torchrun, nor on other machines.
    """

    def __init__(
        self, records: Iterable[Record], start: Callable[[str], float] | None = None, *, forked: bool = True
    ) -> None:
        self._start, self._forked = start or start_seconds, forked
        self.quality, self.cost, self.step = Times(), Times(), Times()
        self.ended = 0
        for record in records:
            spec, summary = record.spec, record.summary
            if record.wall_seconds is not None:  # None where the process died without a record of its own
                (self.cost if spec.kind == "cost" else self.quality).add(spec, record.wall_seconds)
                self.ended += spec.kind == "quality"
            if spec.kind == "quality" and summary.get("steps") and summary.get("seconds"):
                # The step clock alone: evaluation and compilation are not in it.
                self.step.add(spec, summary["seconds"] / summary["steps"])

    def seconds(self, runs: Iterable[RunSpec], jobs: int) -> float:
        """The time of some runs: quality runs ``jobs`` at a time, cost runs one by one."""
        runs = list(runs)
        training = [run for run in runs if run.kind == "quality"]
        quality = sum(self.quality.of(run) for run in training)
        # A new interpreter starts for each, before the clock of wall_seconds does.
        if not self._forked or any(run.device != "cpu" for run in training):
            quality += len(training) * self._start("stiefel.compare.worker.main")
        # As if the jobs were busy all the time: a lower bound where the last runs of a stage leave some idle.
        return quality / jobs + sum(self._cost(run) for run in runs if run.kind == "cost")

    def _cost(self, run: RunSpec) -> float:
        if run in self.cost:  # its clock starts when the process has imported what runs it
            return self._start("stiefel.compare.worker.main") + self.cost.of(run)
        # No cost run of this kind has ended: add up the imports (all that a run needs) and the steps.
        started = self._start("stiefel.compare.worker.preload")
        if not self.step:
            return started
        method = self.step.of(run)
        # Where the control has not run, another method's step stands for it, which may take longer than this one's.
        beside = min(method, self.step.of(replace(run, method=control(), options={}, knobs={})))
        # Warm-up and timed steps of both, and one more of the method, whose operations are counted.
        return started + (WARMUP + REPEATS) * (method + beside) + method


STARTS = 5.0
"""Seconds of such an import where measuring them would keep the driver from its runs."""
_STARTS: dict[str, float] = {}  # seconds by module


def start_seconds(module: str) -> float:
    """Measure, once, how long a new process takes to import a module."""
    if module not in _STARTS:
        start = time.monotonic()
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True, stdin=subprocess.DEVNULL)
        _STARTS[module] = time.monotonic() - start
    return _STARTS[module]


def whole(plan: Plan, *, cost: bool) -> list[RunSpec]:
    """Every run of a plan from nothing, with cells in place of what tuning has yet to choose."""
    # What --extend adds is not counted: only results can tell whether there is any.
    return plan.tuning() + _trials(plan) + _raced(plan) + _final(plan, cost)


def left(plan: Plan, records: Mapping[str, Record], *, cost: bool, extend: bool) -> list[RunSpec]:
    """The runs of a plan without a record: exactly those as far as tuning has decided, beyond that all that may come.

    Args:
        plan: what is run.
        records: what has ended, by hash.
        cost: whether the cost of a step is measured.
        extend: whether grids on whose edge a winner lies are continued.
    """

    # Collects in ``ended`` the records that it finds: the next stage is decided from them.
    def missing(specs: list[RunSpec]) -> list[RunSpec]:
        ended.extend(records[spec.hash] for spec in specs if spec.hash in records)
        return [spec for spec in specs if spec.hash not in records]

    ended: list[Record] = []
    # A stage is known run by run once all before it have ended; from the first gap on, runs are counted by cell.
    lacking = missing(plan.tuning())
    stage = "tuning"
    while not lacking and (more := plan.following(plan.tuned(ended), extend=extend)):
        stage, runs = more
        lacking = missing(runs)
    if not lacking:
        tuned = plan.tuned(ended)
        return missing(plan.final(tuned) + (plan.cost(tuned) if cost else []))
    raced = [] if stage == "race" else _raced(plan)
    refined = _trials(plan) if stage in ("tuning", "extend") else []
    return lacking + refined + raced + _final(plan, cost)


def _trials(plan: Plan) -> list[RunSpec]:
    """What each cell may spend beyond the grid."""
    each = ((plan.trials or len(plan.rates)) - len(plan.rates)) * plan.tuning_seeds
    return [cell for cell in plan.cells() for _ in range(each)]


def _raced(plan: Plan) -> list[RunSpec]:
    """What each cell's best choices are run again, where one tuning serves all."""
    each = 0 if plan.studies or len(plan.rates) < 2 else min(RACED, len(plan.rates)) * RACE_SEEDS
    return [cell for cell in plan.cells() for _ in range(each)]


def _final(plan: Plan, cost: bool) -> list[RunSpec]:
    """Fresh seeds of each cell, and its cost."""
    fresh = [cell for cell in plan.cells() for _ in range(1 if plan.studies else plan.seeds)]
    return fresh + [replace(cell, kind="cost") for cell in plan.timed() if cost]
