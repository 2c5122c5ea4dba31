"""One method in one setting: its runs, and what is read off them. Imports ``records``, ``plan``, ``scores``, numpy."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from stiefel.compare.analyse.scores import Interval, iqm, median
from stiefel.compare.record.choice import Choice
from stiefel.compare.record.measurements import lines_of, parsed
from stiefel.compare.record.records import ENDED, Record

TOLERANCES = (1e-6, 1e-3)
"""Orthogonality errors ‖XXᵀ − I‖_F/√p, worst layer and moment, at which a method counts as feasible."""


POINTS = 40
"""Points of a curve at most: more cannot be seen, and a report of many settings must stay small and fast."""


def powers(tolerance: float) -> str:
    """A tolerance as people write it: 1e-6."""
    return f"{tolerance:.0e}".replace("e-0", "e-")  # Python writes 1e-06


def number(value: Any) -> float:
    """A recorded number; NaN where it is null."""
    return math.nan if value is None else float(value)


@dataclass(frozen=True)
class CostRow:
    """What a step of one method costs at one point of the grid, beside the control in the same process.

    Args:
        step, control: seconds per step: ``median``, ``q1``, ``q3``, ``n``.
        ratio: of their medians.
        share: of the step that the constraint takes.
        memory: peak resident bytes of its training runs, less the control's.
        counts: ``matmul_flops``, ``factorization_flops`` and ``operators`` per step; None where not recorded.
        gpu: the ``gpu_*`` fields, null with ``gpu_reason``.
        hardware: what it was measured on.
    """

    label: str
    setting: str
    fields: dict[str, Any]
    step: dict[str, float]
    control: dict[str, float]
    ratio: float
    share: float
    memory: float | None
    counts: dict[str, float | None]
    gpu: dict[str, Any]
    hardware: str


@dataclass(frozen=True)
class Trial:
    """Tuning runs with one choice: how many, and their mean best validation metric; infinite where one failed."""

    choice: Choice
    validation: float
    runs: int


@dataclass(frozen=True)
class Row:
    """One method in one setting.

    Args:
        label: the method with its options.
        control: whether it is the one that others are compared with.
        choice: what tuning chose; None where every tuning run failed or there is none.
        edge: whether the chosen rate is at an end of those tried with default knobs.
        final: the runs with fresh seeds of that choice.
        tuning: the runs that chose.
        worst: the score of a failed run: −∞ where higher is better, else ∞.
        cost: its cost run.
    """

    label: str
    control: bool
    choice: Choice | None
    edge: bool
    final: tuple[Record, ...] = field(repr=False)
    tuning: tuple[Record, ...] = field(repr=False)
    worst: float = -math.inf
    cost: CostRow | None = None

    @cached_property
    def scores(self) -> dict[int, float]:
        """Test metric at the best validation epoch, by seed."""
        return {r.spec.seed: value(r, "test_at_best", self.worst) for r in self.final}

    @cached_property
    def steps(self) -> dict[int, float]:
        """Training steps to the target, by seed; infinite where it is not reached."""
        return {r.spec.seed: value(r, "steps_to_target") for r in self.final}

    @cached_property
    def seconds(self) -> dict[int, float]:
        """Training seconds to the target, by seed; infinite where it is not reached."""
        return {r.spec.seed: value(r, "seconds_to_target") for r in self.final}

    @cached_property
    def test(self) -> Interval | None:
        """Interquartile mean of the scores of all runs; None where there is none."""
        return Interval.of(self.scores.values(), iqm) if self.final else None

    @cached_property
    def steps_to_target(self) -> Interval | None:
        """Median over all runs."""
        return Interval.of(self.steps.values(), median) if self.final else None

    @cached_property
    def seconds_to_target(self) -> Interval | None:
        """Median over all runs."""
        return Interval.of(self.seconds.values(), median) if self.final else None

    @cached_property
    def faults(self) -> str:
        """The method's known faults, in words; empty for a method that is meant to be correct."""
        return next((r.summary["faults"] for r in (*self.final, *self.tuning) if r.summary.get("faults")), "")

    @property
    def reached(self) -> bool:
        """Whether the median run reaches the target."""
        return self.steps_to_target is not None and self.steps_to_target.finite

    @property
    def error_worst(self) -> float:
        """Largest orthogonality error of any run at any time; infinite where a run failed."""
        return max((value(r, "orthogonality_worst") for r in self.final), default=math.inf)

    @property
    def error_final(self) -> float:
        """Largest orthogonality error of any run at its end; infinite where a run failed."""
        return max((value(r, "orthogonality_final") for r in self.final), default=math.inf)

    @property
    def feasible(self) -> float | None:
        """The tightest tolerance that its worst error meets, or None."""
        # From tight to loose: the first that holds is the tightest.
        return next((tolerance for tolerance in TOLERANCES if self.error_worst <= tolerance), None)

    @property
    def runs(self) -> int:
        """How many runs are reported."""
        return len(self.final)

    @property
    def failures(self) -> dict[str, int]:
        """Numbers of reported runs by status, ``done`` left out."""
        return dict(Counter(r.status for r in self.final if r.status != "done"))

    @property
    def failed(self) -> str:
        """Failures among the reported runs, in words."""
        kinds = ", ".join(f"{n} {status}" for status, n in sorted(self.failures.items()))
        return f"{sum(self.failures.values())}/{self.runs}" + (f" ({kinds})" if kinds else "")

    @property
    def tuning_failures(self) -> int:
        """Tuning runs that did not train to their end."""
        return sum(r.status not in ENDED for r in self.tuning)

    @property
    def skipped(self) -> str | None:
        """The reason where every run of the method was skipped, else None."""
        runs = (*self.tuning, *self.final)
        if not runs or any(r.status != "skipped" for r in runs):
            return None
        return runs[0].reason or "no reason given"

    @property
    def state(self) -> str:
        """Why there is no score, in words; empty where there is one."""
        if self.test is not None:
            return ""
        if self.skipped is not None:
            return "skipped"
        return "every run failed" if self.choice is None else "no fresh-seed run"

    @cached_property
    def trials(self) -> list[Trial]:
        """What tuning tried, by choice: defaults and small rates first."""
        grouped: dict[Choice, list[Record]] = defaultdict(list)
        for record in self.tuning:
            if record.status != "skipped":
                grouped[Choice.of(record.spec)].append(record)
        # One failed run makes a choice's mean infinite. `winners` of record/choice.py is milder: it averages the runs
        # that ended, and prefers choices with fewer failures.
        found = [
            Trial(choice, float(np.mean([value(r, "best_validation", self.worst) for r in records])), len(records))
            for choice, records in grouped.items()
        ]
        # str: the values of knobs may be of types that do not compare with each other.
        return sorted(found, key=lambda trial: (len(trial.choice.knobs), str(trial.choice.knobs), trial.choice.lr))

    @property
    def rates(self) -> list[float]:
        """Learning rates tried with default knobs, in order."""
        return [trial.choice.lr for trial in self.trials if not trial.choice.knobs]

    @property
    def tuned(self) -> Trial | None:
        """What tuning found at the chosen rate and knobs."""
        return next((trial for trial in self.trials if trial.choice == self.choice), None)

    @property
    def default(self) -> Trial | None:
        """The trial at default knobs whose rate is nearest to the problem's default rate, by their ratio."""
        plain = [trial for trial in self.trials if not trial.choice.knobs]
        wanted = next((r.summary["default_rate"] for r in self.tuning if r.summary.get("default_rate")), None)
        if wanted is None or not plain:
            return None
        return min(plain, key=lambda trial: abs(math.log(trial.choice.lr / wanted)))

    @cached_property
    def _measured(self) -> list[list[str]]:
        """The lines of measurements of each reported run that trained to its end; those that can be read."""
        found = [lines_of(record) for record in self.final if record.status in ENDED]
        return [lines for lines in found if lines]

    @cached_property
    def curves(self) -> list[list[dict[str, Any]]]:
        """Measurements of each reported run that trained to its end, thinned evenly to what a curve can show."""
        # Indices of POINTS lines, the first and the last among them; `unique` drops repeats where a run has fewer.
        kept = [np.unique(np.linspace(0, len(lines) - 1, POINTS).round().astype(int)) for lines in self._measured]
        curves = [parsed([lines[i] for i in at]) for lines, at in zip(self._measured, kept, strict=True)]
        return [curve for curve in curves if curve]  # `parsed` gives nothing where one of the lines is torn

    @cached_property
    def ends(self) -> list[dict[str, Any]]:
        """The last measurement of each reported run that trained to its end."""
        return [row for lines in self._measured for row in parsed(lines[-1:])]

    @cached_property
    def diagnoses(self) -> list[list[dict[str, Any]]]:
        """The measurements of each reported run that explain its score: those with energies or effective rates."""
        # Most lines of a long run have neither: search the text, and parse those that do.
        marks = ('"energy"', '"effective_rate"')
        return [[json.loads(line) for line in lines if any(m in line for m in marks)] for lines in self._measured]

    @property
    def redundancy(self) -> float | None:
        """Mean over layers at the end of training, median over runs; None where it was not recorded."""
        layers = [list(end["redundancy"].values()) for end in self.ends if end.get("redundancy")]
        # A run with a null among its layers is left out: a mean over fewer layers would not compare.
        means = [float(np.mean(values)) for values in layers if None not in values]
        return float(np.median(means)) if means else None


def value(record: Record, key: str, missing: float = math.inf) -> float:
    """A number of a run's summary; ``missing`` where the run did not train to its end or the number is null."""
    value = record.summary.get(key) if record.status in ENDED else None
    return missing if value is None else float(value)
