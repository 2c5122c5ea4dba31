"""From records to one row per method and setting: choice, scores with intervals, feasibility, cost, failures.

Imports ``records``, ``plan``, ``spec``, ``methods``, pandas, numpy and scipy.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from stiefel.compare.plan import cell_key, on_edge, winners
from stiefel.compare.records import ENDED, Record
from stiefel.compare.spec import RunSpec
from stiefel.methods import control

TOLERANCES = (1e-6, 1e-3)
"""Orthogonality errors ‖XXᵀ − I‖_F/√p, worst layer and moment, at which a method counts as feasible."""


@dataclass(frozen=True)
class Interval:
    """A mean over n runs with a 95 % bootstrap interval; the interval is None for n = 1."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Percentile bootstrap over at least one value, with a fixed seed."""
        from scipy.stats import bootstrap

        mean = float(np.mean(values))
        if len(values) < 2:
            return cls(mean, None, None, len(values))
        if len(set(values)) == 1:
            return cls(mean, mean, mean, len(values))
        ci = bootstrap((values,), np.mean, n_resamples=2000, method="percentile", rng=0).confidence_interval
        return cls(mean, float(ci.low), float(ci.high), len(values))

    def __str__(self) -> str:
        form = ".3f" if 0.01 <= abs(self.mean) < 100 else ".4g"
        if self.low is None or self.high is None:
            return f"{self.mean:{form}}"
        width = self.high - self.low
        if width > 0 and form == ".3f":  # as many decimals as tell the ends apart
            form = f".{max(3, math.ceil(-math.log10(width)))}f"
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"


@dataclass(frozen=True)
class Row:
    """One method in one setting."""

    label: str
    lr: float | None
    edge: bool
    test: Interval | None
    error_worst: float
    error_final: float
    steps_to_target: float
    seconds_to_target: float
    runs: int
    failures: dict[str, int]
    tuning_runs: int
    tuning_failures: int
    final: tuple[Record, ...] = field(repr=False)
    tuning: tuple[Record, ...] = field(repr=False)

    @property
    def broken(self) -> int:
        """Reported runs that did not train to their end."""
        return sum(record.status not in ENDED for record in self.final)

    @property
    def feasible(self) -> float | None:
        """The tightest tolerance that its worst error meets, or None."""
        return next((tolerance for tolerance in TOLERANCES if self.error_worst <= tolerance), None)

    @property
    def failed(self) -> str:
        """Failures among the reported runs, in words."""
        kinds = ", ".join(f"{n} {status}" for status, n in sorted(self.failures.items()))
        return f"{sum(self.failures.values())}/{self.runs}" + (f" ({kinds})" if kinds else "")


@dataclass(frozen=True)
class CostRow:
    """What a step of one method costs in one setting, beside the control in the same process."""

    label: str
    setting: str
    fields: dict[str, Any]
    step: dict[str, float]
    control: dict[str, float]
    ratio: float
    share: float
    memory: float | None
    gpu: dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One point of the grid of factors and scale, with its rows, best first."""

    title: str
    fields: dict[str, Any]
    target: float | None
    rows: tuple[Row, ...]

    def best(self, tolerance: float | None = None) -> Row | None:
        """The row with the best test metric, among those within an orthogonality tolerance where one is given.

        A method some of whose runs did not train to their end comes after those whose every run did.
        """
        candidates = (row for row in self.rows if row.test is not None)
        return next((r for r in candidates if tolerance is None or r.error_worst <= tolerance), None)


@dataclass(frozen=True)
class Summary:
    """A comparison, summarized."""

    problem: str
    metric: str
    higher_is_better: bool
    settings: tuple[Setting, ...]
    cost: tuple[CostRow, ...]
    notes: tuple[str, ...]
    failures: tuple[Record, ...]
    records: tuple[Record, ...] = field(repr=False)

    @cached_property
    def labels(self) -> list[str]:
        """All methods by name: the order of colours."""
        return sorted({record.spec.label for record in self.records})

    @property
    def device(self) -> str:
        """The device that ran it."""
        return self.records[0].spec.device

    def step_ratio(self, setting: Setting, row: Row) -> float | None:
        """Step time as a multiple of the control's, from the cost run of the same method and factors."""
        for cost in self.cost:
            if cost.label == row.label and cost.fields == setting.fields:
                return cost.ratio
        return None

    @classmethod
    def of(cls, records: Sequence[Record]) -> Summary:
        """Summarize the records of the problem that ran last, on its device; others are left out, with a note."""
        last = max(records, key=lambda r: r.written).spec
        kept = [r for r in records if _family(r.spec) == _family(last)]
        quality = [r for r in kept if r.spec.kind == "quality"]
        summaries = [r.summary for r in quality if r.summary]
        metric = summaries[0]["metric"] if summaries else "metric"
        factors = _varying(kept)
        cells: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
        for record in quality:
            cells[_title(record, factors)][record.spec.label].append(record)
        higher = not summaries or summaries[0].get("higher_is_better", True)
        settings = tuple(_setting(title, methods, higher) for title, methods in sorted(cells.items()))
        cost = tuple(_cost_row(r, kept, factors) for r in kept if r.spec.kind == "cost" and r.status == "done")
        failures = tuple(r for r in kept if r.status in ("error", "timeout", "skipped"))
        notes = _notes(records, kept, settings)
        order = sorted(cost, key=lambda c: (c.setting, c.ratio))
        return cls(last.problem, metric, higher, settings, tuple(order), notes, failures, tuple(kept))


def _varying(records: Iterable[Record]) -> list[str]:
    """The problem's factors that take more than one value."""
    values = defaultdict(set)
    for record in records:
        for name, value in record.spec.fields.items():
            values[name].add(repr(value))
    return [name for name, seen in values.items() if len(seen) > 1]


def scale_name(scale: Any) -> str:
    """A scale as people write it."""
    return "√2" if scale == "relu" else f"{scale:g}" if isinstance(scale, (int, float)) else str(scale)


def _title(record: Record, factors: list[str], scale: bool = True) -> str:
    parts = [f"{name} {record.spec.fields[name]}" for name in factors]
    if scale:
        parts.append(f"scale {scale_name(record.spec.options.get('scale', 1.0))}")
    return ", ".join(parts) or "default"


def _family(spec: RunSpec) -> tuple[str, str, str]:
    """What the records of one report share."""
    return spec.problem, spec.digest, spec.device


def _setting(title: str, methods: dict[str, list[Record]], higher_is_better: bool) -> Setting:
    records = [record for runs in methods.values() for record in runs]
    target = next((r.summary["target"] for r in records if r.summary), None)
    rows = [_row(label, runs, higher_is_better) for label, runs in methods.items()]
    return Setting(title, records[0].spec.fields, target, _sorted(rows, higher_is_better))


def _row(label: str, records: list[Record], higher_is_better: bool) -> Row:
    tuning = [r for r in records if r.spec.phase == "tuning"]
    chosen = winners(tuning, higher_is_better)
    # Records of an earlier, smaller grid may hold final runs at a rate that has lost since.
    final = [r for r in records if r.spec.phase == "final" and chosen.get(cell_key(r.spec), r.spec.lr) == r.spec.lr]
    ended = [r for r in final if r.status in ENDED]
    rates = sorted({r.spec.lr for r in tuning})
    lr = final[0].spec.lr if final else None
    failures: dict[str, int] = defaultdict(int)
    for record in final:
        if record.status != "done":
            failures[record.status] += 1
    return Row(
        label=label,
        lr=lr,
        edge=lr is not None and on_edge(lr, rates),
        test=Interval.of([r.summary["test_at_best"] for r in ended]) if ended else None,
        error_worst=max((_value(r, "orthogonality_worst") for r in final), default=math.inf),
        error_final=max((_value(r, "orthogonality_final") for r in final), default=math.inf),
        steps_to_target=_median([_value(r, "steps_to_target") for r in final]),
        seconds_to_target=_median([_value(r, "seconds_to_target") for r in final]),
        runs=len(final),
        failures=dict(failures),
        tuning_runs=len(tuning),
        tuning_failures=sum(r.status not in ENDED for r in tuning),
        final=tuple(final),
        tuning=tuple(tuning),
    )


def _sorted(rows: list[Row], higher_is_better: bool) -> tuple[Row, ...]:
    sign = -1 if higher_is_better else 1
    return tuple(
        sorted(rows, key=lambda r: (r.test is None, r.broken > 0, sign * r.test.mean if r.test else 0.0, r.label))
    )


def _value(record: Record, key: str) -> float:
    """A number of a run's summary; infinite where the run did not train to its end, or never got there."""
    value = record.summary.get(key) if record.status in ENDED else None
    return math.inf if value is None else float(value)


def _median(values: Sequence[float]) -> float:
    """Median in which failures stand as infinite (numpy's would subtract them)."""
    if not values:
        return math.inf
    ordered = sorted(values)
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return high if math.isinf(high) else (low + high) / 2


def _cost_row(record: Record, records: list[Record], factors: list[str]) -> CostRow:
    spec, summary = record.spec, record.summary
    peers = [r for r in records if r.spec.kind == "quality" and r.status in ENDED and r.spec.fields == spec.fields]
    own = _peak([r for r in peers if r.spec.label == spec.label])
    baseline = _peak([r for r in peers if r.spec.method == control()])
    return CostRow(
        label=spec.label,
        setting=_title(record, factors, scale=False),
        fields=spec.fields,
        step=summary["step_seconds"]["method"],
        control=summary["step_seconds"]["control"],
        ratio=summary["step_ratio"],
        share=summary["constraint_share"],
        memory=None if own is None or baseline is None else own - baseline,
        gpu={key: value for key, value in summary.items() if key.startswith("gpu_")},
    )


def _peak(records: list[Record]) -> float | None:
    return _median([r.summary["peak_resident_bytes"] for r in records]) if records else None


def _notes(records: Sequence[Record], kept: Sequence[Record], settings: Sequence[Setting]) -> tuple[str, ...]:
    notes = []
    if len(kept) < len(records):
        notes.append(
            f"{len(records) - len(kept)} records are left out: of another problem, of an earlier source of this "
            "one, or of another device"
        )
    code = sorted({str(r.environment.get("commit") or r.environment.get("stiefel")) for r in kept if r.environment})
    if len(code) > 1:
        notes.append(f"these records come from {len(code)} versions of the code: {', '.join(code)}")
    machines = sorted({str(r.environment.get("cpu")) for r in kept if r.environment})
    if len(machines) > 1:
        notes.append(
            f"these records come from different machines, so their times do not compare: {', '.join(machines)}"
        )
    edges = {s.title: [row.label for row in s.rows if row.edge] for s in settings}
    where = "; ".join(f"{title}: {', '.join(labels)}" for title, labels in edges.items() if labels)
    if where:
        notes.append(f"* the best learning rate is on the edge of the grid, a better one may lie outside ({where})")
    return tuple(notes)


def table(summary: Summary) -> pd.DataFrame:
    """The rows of a summary as a frame, for notebooks and CSV."""
    rows = []
    environment: dict[str, Any] = next((r.environment for r in summary.records if r.environment), {})
    for setting in summary.settings:
        for r in setting.rows:
            test = r.test or Interval(math.nan, None, None, 0)
            rows.append(
                {
                    "setting": setting.title,
                    "method": r.label,
                    "lr": r.lr,
                    "lr_on_edge": r.edge,
                    f"test_{summary.metric}": test.mean,
                    "low": test.low,
                    "high": test.high,
                    "n": test.n,
                    "error_worst": r.error_worst,
                    "error_final": r.error_final,
                    "feasible_at": r.feasible,
                    "steps_to_target": r.steps_to_target,
                    "seconds_to_target": r.seconds_to_target,
                    "failed": sum(r.failures.values()),
                    "runs": r.runs,
                    "step_ratio": summary.step_ratio(setting, r),
                    "tuning_runs": r.tuning_runs,
                    "tuning_failures": r.tuning_failures,
                    **{name: environment.get(name) for name in ("commit", "cpu", "cores", "gpu", "torch")},
                }
            )
    return pd.DataFrame(rows)
