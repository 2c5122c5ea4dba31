"""From the records of one problem to one row per method and setting: choice, scores, feasibility, cost, failures.

Imports ``summary``, ``rows``, ``scores``, ``record`` and numpy.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from stiefel.compare.analyse.rows import CostRow, Row
from stiefel.compare.analyse.scores import iqm, median, resample
from stiefel.compare.analyse.summary import Setting, Summary, hardware
from stiefel.compare.record.choice import Choice, cell_key, on_edge, winners
from stiefel.compare.record.records import BROKEN, ENDED, Record
from stiefel.compare.record.spec import RunSpec


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

    # Another digest is another problem, although its name is the same: of each name only the source that ran last is
    # reported, and records of the others are counted.
    families = []
    for sources in groups.values():
        digest = max(sources, key=lambda digest: last(sources[digest]))
        families.append((sources[digest], sum(len(found) for d, found in sources.items() if d != digest)))
    for found, older in sorted(families, key=lambda family: -last(family[0])):
        yield _summary(found, older)


def _summary(records: list[Record], older: int) -> Summary:
    first = records[0].spec
    # Skipped runs do not say what the problem measures: ask the first run that does.
    declared = next((r.summary for r in records if "metric" in r.summary), {})
    higher = bool(declared.get("higher_is_better", True))
    factors = _varying(records)
    cost = _cost(records, factors)
    cells: dict[Any, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record.spec.kind == "quality":
            cells[_order(record.spec, factors)][record.label].append(record)
    drafts = [_draft(methods, higher, cost) for _, methods in sorted(cells.items())]
    scored = [row for rows in drafts for row in rows if row.final]
    # One bootstrap for all rows is faster than one for each; rows find their intervals ready.
    resample((row.scores.values() for row in scored), iqm)
    resample((results.values() for row in scored for results in (row.steps, row.seconds)), median)
    failures = tuple(
        r for r in records if r.status in (*BROKEN, "skipped") or (r.status == "diverged" and r.spec.phase == "final")
    )  # divergence in tuning is expected at large rates: counted in the table, not listed
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
        for name, value in record.spec.fields.items():  # repr: a value may be a list, which has no hash
            values[name].add(repr(value))
    return [name for name, seen in values.items() if len(seen) > 1]


def _order(spec: RunSpec, factors: list[str]) -> tuple[Any, ...]:
    """A key that sorts settings: numbers by size, before words."""
    # (0, number, "") or (1, 0, word): a number is never compared with a word.
    values = [spec.fields.get(name) for name in factors] + [spec.options.get("scale", 1.0)]
    return tuple((0, v, "") if isinstance(v, (int, float)) else (1, 0, str(v)) for v in values)


def scale_name(scale: Any) -> str:
    """A scale as people write it."""
    return "√2" if scale == "relu" else f"{scale:g}" if isinstance(scale, (int, float)) else str(scale)


def _draft(methods: dict[str, list[Record]], higher: bool, cost: dict[tuple[str, str], CostRow]) -> list[Row]:
    """The rows of one setting, in no order."""
    # A cost run is made at one scale, and its result stands at every scale of the point: `_at` ignores the scale.
    return [_row(label, runs, higher, cost.get((label, _at(runs[0].spec)))) for label, runs in methods.items()]


def _setting(rows: list[Row], factors: list[str], higher: bool) -> Setting:
    records = [record for row in rows for record in (*row.tuning, *row.final)]
    spec = records[0].spec
    point, scale = _point(spec, factors), scale_name(spec.options.get("scale", 1.0))
    sign = -1 if higher else 1

    # Known faults last, then rows without a score; of equal scores, fewer failures first.
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
    # The grid that the choice may lie on the edge of. Knobs are tried at the best rate alone, so they add no rates.
    rates = sorted({r.spec.lr for r in tuning if not r.spec.knobs})
    return Row(
        label=label,
        control=records[0].control,
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
    for record in sorted(records, key=lambda r: r.written):  # of several runs the one written last stays
        if record.spec.kind == "cost" and record.status == "done":
            measured[record.label, _at(record.spec)] = record
    # Peak memory comes from training runs; the label "" collects the control's.
    peaks = defaultdict(list)
    for record in records:
        peak = record.summary.get("peak_resident_bytes")
        if record.spec.kind == "quality" and record.status in ENDED and peak is not None:
            peaks[record.label, _at(record.spec)].append(peak)
            if record.control:
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
