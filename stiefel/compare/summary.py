"""From the records of one problem to one row per method and setting: choice, scores, feasibility, cost, failures.

Imports ``rows``, ``records``, ``plan``, ``spec``, ``scores``, ``methods`` and numpy.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from stiefel.compare.plan import Choice, cell_key, on_edge, winners
from stiefel.compare.records import BROKEN, ENDED, Record
from stiefel.compare.rows import TOLERANCES, CostRow, Row
from stiefel.compare.scores import iqm, median, resample
from stiefel.compare.spec import RunSpec
from stiefel.methods import control


@dataclass(frozen=True)
class Setting:
    """One point of the grid of factors at one scale, with its rows, best first.

    Args:
        title: what tells it from the other settings.
        point: that without the scale.
        scale: as people write it.
        fields: the problem's factors.
        target: validation metric that a run must reach, or None.
        rows: one per method; those with known faults last.
    """

    title: str
    point: str
    scale: str
    fields: dict[str, Any]
    target: float | None
    rows: tuple[Row, ...]

    def best(self, tolerance: float | None = None) -> Row | None:
        """The row with the best score, among those within an orthogonality tolerance where one is given."""
        return next((row for row in self.rows if self.rank(row, tolerance) == 1), None)

    def rank(self, row: Row, tolerance: float | None = None) -> int | None:
        """Its place by score, among the rows within a tolerance where one is given; equal scores share a place.

        A method with known faults has none.
        """
        return self._ranks[tolerance].get(row.label)

    @cached_property
    def _ranks(self) -> dict[float | None, dict[str, int]]:
        ranks: dict[float | None, dict[str, int]] = {}
        for tolerance in (None, *TOLERANCES):
            known = [
                (row.label, -math.copysign(1, row.worst) * row.test.value)
                for row in self.rows
                if row.test
                and row.test.finite
                and not row.faults
                and (tolerance is None or row.error_worst <= tolerance)
            ]
            ranks[tolerance] = {label: 1 + sum(other > score for _, other in known) for label, score in known}
        return ranks


@dataclass(frozen=True)
class Summary:
    """The comparison of one problem on one device, summarized.

    Args:
        problem, digest, device, dtype: what its records share.
        metric, higher_is_better: what is compared.
        settings: the grid's points and scales.
        cost: what a step costs.
        failures: runs without a result that a reader should know of.
        records: all of its runs.
        older: how many records of earlier sources of the problem are left out.
    """

    problem: str
    digest: str
    device: str
    dtype: str
    metric: str
    higher_is_better: bool
    settings: tuple[Setting, ...]
    cost: tuple[CostRow, ...]
    failures: tuple[Record, ...]
    records: tuple[Record, ...] = field(repr=False)
    older: int = 0

    @cached_property
    def labels(self) -> list[str]:
        """All methods by name: the order of colours."""
        return sorted({record.spec.label for record in self.records})

    @cached_property
    def controls(self) -> set[str]:
        """Labels of the unconstrained control."""
        name = control()
        return {record.spec.label for record in self.records if record.spec.method == name}

    @cached_property
    def faults(self) -> dict[str, str]:
        """What is knowingly wrong with methods, by label, of those that are kept apart for it."""
        return {row.label: row.faults for setting in self.settings for row in setting.rows if row.faults}

    def marked(self, label: str) -> str:
        """A method's name, with a dagger where it has known faults."""
        return dagger(label) if label in self.faults else label

    @property
    def title(self) -> str:
        """The problem, and what its costs were measured on."""
        measured = [r for r in self.records if r.spec.kind == "cost"] or list(self.records)
        return f"{self.problem} · {'GPU' if self.device == 'cuda' else 'CPU'} cost, {hardware(measured)}"

    @property
    def hardware(self) -> str:
        """What the training runs ran on."""
        return hardware(self.records)

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know before believing the numbers."""
        from stiefel.compare.notes import notes

        return notes(self)

    @classmethod
    def of(cls, records: Iterable[Record]) -> Summary:
        """Summarize the problem that ran last, at its newest source, on the device that it ran on last."""
        return next(summaries(records))


def summaries(records: Iterable[Record]) -> Iterator[Summary]:
    """A summary per problem, device and dtype, the one that ran last first; only the newest source of each problem."""
    newest: dict[str, Record] = {}
    for record in records:  # two folders may hold the same run
        key = record.spec.hash
        if key not in newest or record.written > newest[key].written:
            newest[key] = record
    groups: dict[tuple[str, str, str], dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in newest.values():
        spec = record.spec
        groups[spec.problem, spec.device, spec.dtype][spec.digest].append(record)

    def last(found: Iterable[Record]) -> float:
        return max(record.written for record in found)

    families = []
    for sources in groups.values():
        digest = max(sources, key=lambda digest: last(sources[digest]))
        families.append((sources[digest], sum(len(found) for d, found in sources.items() if d != digest)))
    for found, older in sorted(families, key=lambda family: -last(family[0])):
        yield _summary(found, older)


def _summary(records: list[Record], older: int) -> Summary:
    first = records[0].spec
    declared = next((r.summary for r in records if "metric" in r.summary), {})
    higher = bool(declared.get("higher_is_better", True))
    factors = _varying(records)
    cost = _cost(records, factors)
    cells: dict[Any, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record.spec.kind == "quality":
            cells[_order(record.spec, factors)][record.spec.label].append(record)
    drafts = [_draft(methods, higher, cost) for _, methods in sorted(cells.items())]
    scored = [row for rows in drafts for row in rows if row.final]
    resample((row.scores.values() for row in scored), iqm)
    resample((results.values() for row in scored for results in (row.steps, row.seconds)), median)
    failures = tuple(
        r for r in records if r.status in (*BROKEN, "skipped") or (r.status == "diverged" and r.spec.phase == "final")
    )  # a tuning run that diverges at a large rate is the table's business
    return Summary(
        problem=first.problem,
        digest=first.digest,
        device=first.device,
        dtype=first.dtype,
        metric=declared.get("metric", "metric"),
        higher_is_better=higher,
        settings=tuple(_setting(rows, factors, higher) for rows in drafts),
        cost=tuple(cost[key] for key in sorted(cost, key=lambda key: (cost[key].setting, cost[key].ratio))),
        failures=failures,
        records=tuple(records),
        older=older,
    )


def _varying(records: Iterable[Record]) -> list[str]:
    """The problem's factors that take more than one value."""
    values = defaultdict(set)
    for record in records:
        for name, value in record.spec.fields.items():
            values[name].add(repr(value))
    return [name for name, seen in values.items() if len(seen) > 1]


def _order(spec: RunSpec, factors: list[str]) -> tuple[Any, ...]:
    """A key that sorts settings: numbers by size, before words."""
    values = [spec.fields.get(name) for name in factors] + [spec.options.get("scale", 1.0)]
    return tuple((0, v, "") if isinstance(v, (int, float)) else (1, 0, str(v)) for v in values)


def dagger(label: str) -> str:
    """The name of a method with known faults, as reports write it."""
    return f"{label} †"


def scale_name(scale: Any) -> str:
    """A scale as people write it."""
    return "√2" if scale == "relu" else f"{scale:g}" if isinstance(scale, (int, float)) else str(scale)


def hardware(records: Iterable[Record]) -> str:
    """The processors or GPUs that records come from, with the threads of each run."""
    found = []
    for environment in (r.environment for r in records if r.environment):
        threads = environment.get("threads")
        count = "" if not threads else f", {threads} thread{'s' * (threads != 1)}"
        found.append(environment.get("gpu") or f"{environment.get('cpu') or 'unknown processor'}{count}")
    return " and ".join(dict.fromkeys(found)) or "unknown hardware"


def _draft(methods: dict[str, list[Record]], higher: bool, cost: dict[tuple[str, str], CostRow]) -> list[Row]:
    """The rows of one setting, in no order."""
    return [_row(label, runs, higher, cost.get((label, _at(runs[0].spec)))) for label, runs in methods.items()]


def _setting(rows: list[Row], factors: list[str], higher: bool) -> Setting:
    records = [record for row in rows for record in (*row.tuning, *row.final)]
    spec = records[0].spec
    point, scale = _point(spec, factors), scale_name(spec.options.get("scale", 1.0))
    sign = -1 if higher else 1

    def place(row: Row) -> tuple[Any, ...]:
        score = sign * row.test.value if row.test else 0.0
        return bool(row.faults), row.test is None, score, sum(row.failures.values()), row.label

    return Setting(
        title=f"{point}, scale {scale}" if point else f"scale {scale}",
        point=point,
        scale=scale,
        fields=spec.fields,
        target=next((r.summary["target"] for r in records if "target" in r.summary), None),
        rows=tuple(sorted(rows, key=place)),
    )


def _point(spec: RunSpec, factors: list[str]) -> str:
    return ", ".join(f"{name} {spec.fields.get(name)}" for name in factors)


def _at(spec: RunSpec) -> str:
    return repr(sorted(spec.fields.items()))


def _row(label: str, records: list[Record], higher: bool, cost: CostRow | None) -> Row:
    tuning = [r for r in records if r.spec.phase == "tuning"]
    finals = sorted((r for r in records if r.spec.phase == "final"), key=lambda r: r.spec.seed)
    choice = winners(tuning, higher).get(cell_key(records[0].spec))
    if choice is None and not tuning and finals:  # fresh seeds alone, as a folder of results may hold them
        choice = Choice.of(max(finals, key=lambda r: r.written).spec)
    rates = sorted({r.spec.lr for r in tuning if not r.spec.knobs})
    return Row(
        label=label,
        method=records[0].spec.method,
        choice=choice,
        edge=choice is not None and on_edge(choice.lr, rates),
        # Records of an earlier, smaller grid may hold final runs of a choice that has lost since.
        final=tuple(r for r in finals if Choice.of(r.spec) == choice),
        tuning=tuple(tuning),
        worst=-math.inf if higher else math.inf,
        cost=cost,
    )


def _cost(records: list[Record], factors: list[str]) -> dict[tuple[str, str], CostRow]:
    """The newest cost run of each method and point of the grid."""
    measured: dict[tuple[str, str], Record] = {}
    for record in sorted(records, key=lambda r: r.written):
        if record.spec.kind == "cost" and record.status == "done":
            measured[record.spec.label, _at(record.spec)] = record
    peaks, baseline = defaultdict(list), control()
    for record in records:
        peak = record.summary.get("peak_resident_bytes")
        if record.spec.kind == "quality" and record.status in ENDED and peak is not None:
            peaks[record.spec.label, _at(record.spec)].append(peak)
            if record.spec.method == baseline:
                peaks["", _at(record.spec)].append(peak)
    rows = {}
    for (label, at), record in measured.items():
        summary, own, others = record.summary, peaks[label, at], peaks["", at]
        rows[label, at] = CostRow(
            label=label,
            setting=_point(record.spec, factors) or "all",
            fields=record.spec.fields,
            step=summary["step_seconds"]["method"],
            control=summary["step_seconds"]["control"],
            ratio=summary["step_ratio"],
            share=summary["constraint_share"],
            memory=float(np.median(own) - np.median(others)) if own and others else None,
            counts={key: summary.get(key) for key in ("matmul_flops", "factorization_flops", "operators")},
            gpu={key: value for key, value in summary.items() if key.startswith("gpu_")},
            hardware=hardware([record]),
        )
    return rows
