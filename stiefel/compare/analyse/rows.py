"""One method in one setting: its runs, and what is read off them. Imports ``records``, ``plan``, ``scores``, numpy."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from stiefel.compare.analyse.costs import CostRow
from stiefel.compare.analyse.statistics.differences import mean_parts, shared_variance
from stiefel.compare.analyse.statistics.scores import Interval, Metric, exp
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
class Trial:
    """Tuning runs with one choice: how many, and their mean best validation metric; infinite where half failed."""

    choice: Choice
    validation: float
    runs: int


@dataclass(frozen=True)
class Row:
    """One method in one setting.

    Args:
        label: the method with its options.
        control: whether it is one that others are compared with.
        metric: what is compared.
        choices: what tuning chose, by study (None: one tuning for all); empty where every tuning run failed.
        edges: the studies whose chosen rate is at an end of those tried with default knobs.
        final: the runs with fresh seeds of those choices.
        tuning: the runs that chose.
        cost: its cost run.
        untuned: how many studies have no run to report, because every tuning run failed.
    """

    label: str
    control: bool
    metric: Metric
    choices: dict[int | None, Choice]
    edges: tuple[int | None, ...]
    final: tuple[Record, ...] = field(repr=False)
    tuning: tuple[Record, ...] = field(repr=False)
    cost: CostRow | None = None
    untuned: int = 0

    @cached_property
    def choice(self) -> Choice | None:
        """What most studies chose; None where nothing was chosen."""
        return Counter(self.choices.values()).most_common(1)[0][0] if self.choices else None

    @property
    def edge(self) -> bool:
        """Whether a better rate may lie outside the grid, so that the score is a lower bound of what is possible."""
        return bool(self.edges)

    @property
    def scaled(self) -> bool:
        """Whether the setting's scale is its own; the network as it is has none."""
        return any("scale" in record.spec.options for record in (*self.tuning, *self.final))

    @cached_property
    def scores(self) -> dict[int, float]:
        """Test metric at the best validation epoch, by seed, of the runs that trained to their end."""
        found = {r.spec.seed: value(r, "test_at_best", math.nan) for r in self.final}
        return {seed: score for seed, score in found.items() if math.isfinite(score)}

    @cached_property
    def parts(self) -> tuple[float, ...]:
        """The mean score on each part of the test set; empty where runs did not record them."""
        found = [r.summary.get("test_parts") or [] for r in self.final if r.status in ENDED]
        return () if self.metric.log_scale else mean_parts(found)

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
        """The mean score, geometric on a log scale; None where at most half of the runs have one."""
        if 2 * len(self.scores) <= self.runs:
            return None
        if self.metric.log_scale:
            return Interval.mean(map(self.metric.log, self.scores.values())).map(exp)
        resolution = self.metric.resolution
        return Interval.mean(self.scores.values(), resolution, shared_variance(self.parts, resolution))

    @cached_property
    def steps_to_target(self) -> Interval | None:
        """Median and range over all runs."""
        return Interval.median(self.steps.values()) if self.final else None

    @cached_property
    def seconds_to_target(self) -> Interval | None:
        """Median and range over all runs."""
        return Interval.median(self.seconds.values()) if self.final else None

    @cached_property
    def faults(self) -> str:
        """The method's known faults, in words; empty for a method that is meant to be correct."""
        return next((r.summary["faults"] for r in (*self.final, *self.tuning) if r.summary.get("faults")), "")

    @property
    def reached(self) -> bool:
        """Whether the median run reaches the target."""
        return self.steps_to_target is not None and self.steps_to_target.finite

    @property
    def at_start(self) -> bool:
        """Whether the median run meets the target before its first step, so that its time says nothing."""
        return self.steps_to_target is not None and self.steps_to_target.value == 0

    @property
    def short(self) -> int:
        """How many runs trained to their end without reaching the target."""
        return sum(r.status == "target missed" for r in self.final)

    @property
    def nearest(self) -> float | None:
        """The best validation metric of the median run."""
        known = [r.summary["best_validation"] for r in self.final if r.status in ENDED]
        return float(np.median(known)) if known else None

    @property
    def error_worst(self) -> float:
        """Largest orthogonality error of any run that trained to its end, at any moment; infinite where none did."""
        return max((value(r, "orthogonality_worst") for r in self.final if r.status in ENDED), default=math.inf)

    @property
    def error_final(self) -> float:
        """Largest orthogonality error of any run that trained to its end, at that end; infinite where none did."""
        return max((value(r, "orthogonality_final") for r in self.final if r.status in ENDED), default=math.inf)

    @property
    def feasible(self) -> float | None:
        """The tightest tolerance that its worst error meets, or None."""
        return next((tolerance for tolerance in TOLERANCES if self.error_worst <= tolerance), None)

    @property
    def runs(self) -> int:
        """How many replicates are reported, those included whose every tuning run failed."""
        return len(self.final) + self.untuned

    @property
    def failures(self) -> dict[str, int]:
        """Numbers of reported runs that did not train to their end, by status."""
        found = Counter(r.status for r in self.final if r.status not in ENDED)
        return dict(found) | ({"failed at every rate": self.untuned} if self.untuned else {})

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
        """Why there is no score; empty where there is one."""
        if self.test is not None:
            return ""
        if self.skipped is not None:
            return "skipped"
        if self.choice is None:
            return "every run failed"
        return f"failed in {self.failed} runs" if self.final else "no fresh-seed run"

    @cached_property
    def trials(self) -> list[Trial]:
        """What tuning tried, by choice: defaults and small rates first."""
        grouped: dict[Choice, list[Record]] = defaultdict(list)
        worst = self.metric.worst
        for record in self.tuning:
            if record.status != "skipped":
                grouped[Choice.of(record.spec)].append(record)
        found = []
        for choice, records in grouped.items():
            ended = [r.summary["best_validation"] for r in records if r.status in ENDED]
            # A mean of the runs that ended, where most did: as `ranked` of record/choice.py has it.
            mean = float(np.mean(ended)) if 2 * len(ended) > len(records) else worst
            found.append(Trial(choice, mean, len(records)))
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
        """The lines of measurements of each reported run that trained to its end."""
        return [lines_of(record) for record in self.final if record.status in ENDED]

    @cached_property
    def torn(self) -> tuple[str, ...]:
        """The folders of runs that trained to their end and of whose measurements some or all cannot be read."""
        ended = [record for record in self.final if record.status in ENDED]
        return tuple(
            record.path.name
            for record, lines in zip(ended, self._measured, strict=True)
            # What a copy that broke off has lost is the end of the last line.
            if not parsed(lines[-1:]) or not all(line[0] == "{" and line[-1] == "}" for line in lines)
        )

    @cached_property
    def curves(self) -> list[list[dict[str, Any]]]:
        """Measurements of each reported run that trained to its end, thinned evenly to what a curve can show."""
        kept = [sorted(set(np.linspace(0, len(s) - 1, POINTS).round().astype(int))) for s in self._measured if s]
        curves = [parsed(lines[i] for i in at) for lines, at in zip(filter(None, self._measured), kept, strict=True)]
        return [curve for curve in curves if curve]

    @cached_property
    def ends(self) -> list[dict[str, Any]]:
        """The last measurement of each reported run that trained to its end; of those with the layers of most runs."""
        last = (next((row for line in reversed(lines) for row in parsed([line])), None) for lines in self._measured)
        found = [row for row in last if row is not None]
        layers = Counter(tuple(row["orthogonality"]["layers"]) for row in found).most_common(1)
        return [row for row in found if tuple(row["orthogonality"]["layers"]) == layers[0][0]]

    @cached_property
    def diagnoses(self) -> list[list[dict[str, Any]]]:
        """The measurements of each reported run that explain its score: those with energies or effective rates."""
        # Most lines of a long run have neither: search the text, and parse those that do.
        marks = ('"energy"', '"effective_rate"')
        return [parsed(line for line in lines if any(m in line for m in marks)) for lines in self._measured]

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
