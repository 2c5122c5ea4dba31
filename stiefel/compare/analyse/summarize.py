"""From the records of one problem to one row per method and setting: choice, scores, feasibility, cost, failures.

Imports ``summary``, ``rows``, ``record`` .
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from stiefel.compare.analyse.costs import CostRow, costs_of, point_key, point_of
from stiefel.compare.analyse.rows import Row
from stiefel.compare.analyse.statistics.scores import Metric
from stiefel.compare.analyse.summary import Setting, Summary
from stiefel.compare.record.choice import Choice, on_edge, winners
from stiefel.compare.record.records import BROKEN, Record
from stiefel.compare.record.spec import RunSpec

EXACT, WHOLE = 1e-6, 0.02
"""How far float32 may put a fraction above 1, and a number of examples from a whole one."""


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
    training = [r for r in records if r.spec.kind == "quality"]
    studies = any(r.spec.study is not None for r in training)
    reported = [r for r in training if (r.spec.study is not None) is studies]
    metric = _metric(records, reported)
    factors = _varying(records)
    cost = costs_of(records, factors)
    cells = _cells(reported, factors)
    drafts = [_draft(methods, metric, cost) for _, methods in sorted(cells.items())]
    failures = tuple(
        r for r in records if r.status in (*BROKEN, "skipped") or (r.status == "diverged" and r.spec.phase == "final")
    )  # divergence in tuning is expected at large rates: counted in the table, not listed
    return Summary(
        problem=first.problem,
        digest=first.digest,
        device=first.device,
        dtype=first.dtype,
        measure=metric,
        settings=tuple(_setting(rows, factors) for rows in drafts),
        cost=tuple(cost[key] for key in sorted(cost, key=lambda key: (cost[key].setting, cost[key].ratio))),
        failures=failures,
        records=tuple(records),
        older=older,
        studies=studies,
        single=len(training) - len(reported),
    )


DECLARED: dict[str, Any] = {"metric": "metric", "higher_is_better": True, "log_scale": False}
"""What every run records of its problem, with what stands for it in a record of a version that did not."""


def _metric(every: list[Record], records: list[Record]) -> Metric:
    """The metric as the problem declared it, with its resolution."""
    # As most records say: one that was changed on the disk must not turn the order of all the others. Skipped runs do
    # not say what the problem measures.
    said = [r.summary for r in every if r.summary.get("metric")]
    told = [tuple(value if s.get(key) is None else s[key] for key, value in DECLARED.items()) for s in said]
    name, higher, log_scale = Counter(told).most_common(1)[0][0] if told else tuple(DECLARED.values())
    return Metric(name, higher, log_scale, 0.0 if log_scale else _resolution(records))


def _resolution(records: list[Record]) -> float:
    """1 / examples of the test set, where every score is a whole number of examples; else 0."""
    sizes = Counter(r.summary["test_examples"] for r in records if r.summary.get("test_examples"))
    scores = [r.summary["test_at_best"] for r in records if r.summary.get("test_at_best") is not None]
    if not sizes or not scores:
        return 0.0
    examples = sizes.most_common(1)[0][0]
    counts = [score * examples for score in scores]
    whole = all(0 <= count <= examples * (1 + EXACT) and abs(count - round(count)) < WHOLE for count in counts)
    return 1 / examples if whole else 0.0


def _cells(records: list[Record], factors: list[str]) -> dict[Any, dict[str, list[Record]]]:
    """The records of each point and scale by method; those without a scale belong to every scale of their point."""
    cells: dict[Any, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    # Those with a scale first, so that the others find the scales that there are.
    for record in sorted(records, key=lambda r: "scale" not in r.spec.options):
        *point, scale = _order(record.spec, factors)
        at = [key for key in cells if list(key[:-1]) == point] if "scale" not in record.spec.options else []
        for key in at or [(*point, scale)]:
            cells[key][record.label].append(record)
    return cells


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


def _draft(methods: dict[str, list[Record]], metric: Metric, cost: dict[tuple[str, str], CostRow]) -> list[Row]:
    """The rows of one setting, in no order."""
    # Settings may differ in their test sets, and so in what one example counts.
    here = [record for found in methods.values() for record in found]
    own = replace(metric, resolution=0.0 if metric.log_scale else _resolution(here))
    return [_row(label, runs, own, cost.get((label, point_key(runs[0].spec)))) for label, runs in methods.items()]


def _setting(rows: list[Row], factors: list[str]) -> Setting:
    records = [record for row in rows for record in (*row.tuning, *row.final)]
    spec = next((r.spec for r in records if "scale" in r.spec.options), records[0].spec)
    point, scale = point_of(spec, factors), scale_name(spec.options.get("scale", 1.0))

    # Known faults last, then rows without a score; of equal scores, fewer failures first.
    def place(row: Row) -> tuple[Any, ...]:
        score = -row.metric.better(row.test.value) if row.test else 0.0
        return bool(row.faults), row.test is None, score, sum(row.failures.values()), row.label

    return Setting(
        title=f"{point}, scale {scale}" if point else f"scale {scale}",
        point=point,
        scale=scale,
        fields=spec.fields,
        target=next((r.summary["target"] for r in records if "target" in r.summary), None),
        rows=tuple(sorted(rows, key=place)),
    )


def _row(label: str, records: list[Record], metric: Metric, cost: CostRow | None) -> Row:
    tuning = [r for r in records if r.spec.phase == "tuning"]
    finals = sorted((r for r in records if r.spec.phase == "final"), key=lambda r: r.spec.seed)
    chosen = winners(tuning, metric.higher_is_better)
    choices = {key[-1]: choice for key, choice in chosen.items()}
    if not tuning and finals:  # fresh seeds alone, as a folder of results may hold them
        choices = {r.spec.study: Choice.of(r.spec) for r in sorted(finals, key=lambda r: r.written)}
    lost = {r.spec.study for r in tuning if r.status != "skipped"} - set(choices) - {None}
    rates: dict[int | None, list[float]] = defaultdict(list)
    for record in tuning:
        if not record.spec.knobs:
            rates[record.spec.study].append(record.spec.lr)
    return Row(
        label=label,
        control=records[0].control,
        metric=metric,
        choices=choices,
        edges=tuple(study for study, choice in choices.items() if rates[study] and on_edge(choice.lr, rates[study])),
        # Records of an earlier, smaller grid may hold final runs of a choice that has lost since.
        final=tuple(r for r in finals if Choice.of(r.spec) == choices.get(r.spec.study)),
        tuning=tuple(tuning),
        cost=cost,
        untuned=len(lost),
    )
