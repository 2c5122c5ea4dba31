"""The records as Markdown: the targets first, then a part per section. Imports ``targets``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from costs.maps import REFERENCE
from costs.sections import Record
from costs.targets import Results, Target, targets

NONE = "—"

Cell = Callable[[Record], str]

_MAPS = """Forward and backward pass of all matrices, count×p×n. A method's name alone is the public path: a layer per
matrix, weights computed together as the model's forward pass begins; "function" is the method on one stacked tensor,
and the other words after "own" are its solvers. Proxies are H X, X random orthonormal, H symmetric with eigenvalues at
equal ratios from 1 to the condition number; those of maps from a fixed start have left it by rows of length 0.3.
"""
_STEPS = """One step of all matrices, count×p×n, at given gradients with rows of length 1, learning rate 1e-3, from
orthonormal points; one parameter per matrix, or, where it says "stacked", one of all.
"""
_TRAINING = """Whole steps (forward, backward, plain SGD); all layers but the last are constrained, at scale √2.
"""


def markdown(records: Sequence[Record], form: str) -> str:
    """All tables, headed by what they were measured on."""
    parts = [_head(records, form), "## Targets\n\n" + _targets(Results(records), Results(records, "least"))]
    parts += [
        f"## {title}\n\n{section([r for r in records if r['section'] == name])}"
        for name, (title, section) in _SECTIONS.items()
        if any(r["section"] == name for r in records)
    ]
    return "\n".join([*parts, _skipped(records)])


def _head(records: Sequence[Record], form: str) -> str:
    r = records[0]
    where = f"GPU cost: {r['gpu']}" if r["gpu"] else f"CPU cost: {r['cpu']}, {r['cores']} cores, {r['threads']} threads"
    names = ("stiefel", "torch", "geoopt", "geotorch", "pogo-torch", "orthogonium")
    versions = {name: r.get(name) or r.get(f"version_{name.replace('-', '_')}") for name in names}
    listed = ", ".join(f"{name} {found or 'not installed'}" for name, found in versions.items())
    met, measured = _score(Results(records))
    least, comparable = _score(Results(records, "least"))
    lines = [
        f"# What orthogonality costs ({form} form)",
        f"{where}; {r['dtype']}; code {r['commit'] or 'unknown'}; {listed}.",
        f"{met} of the {measured} targets that were measured are met"
        + (
            f", by the least of the rounds {least} of {comparable}"
            if any("seconds_least" in r for r in records)
            else ""
        )
        + ". Numbers are medians, in brackets the quartiles; what a\ntable compares was timed in turn, in one process.",
        "" if r["gpu"] else f"GPU fields are null: {r['gpu_reason']}.\n",
    ]
    return "\n\n".join(filter(None, lines))


def _score(results: Results) -> tuple[int, int]:
    found = [(t, v) for t in targets() if (v := t.value(results)) is not None]
    return sum(t.met(v, t.bound) for t, v in found), len(found)


def _targets(results: Results, least: Results) -> str:
    lines = [_target(t, v, t.value(least)) for t in targets() if (v := t.value(results)) is not None]
    text = "They are set for two CPU cores and float32, and judged by the medians. "
    text += "Those that this run did not measure are left out.\n\n"
    return text + _table(["", "target", "goal", "measured", "by the least", "target met"], lines)


def _target(target: Target, value: float, least: float | None) -> list[str]:
    sign = "≤" if target.lower else "≥"
    goal = NONE if target.goal is None else f"{sign} {target.goal:g}{target.unit}"
    met = "yes" if target.met(value, target.bound) else "no"
    if target.goal is not None and target.met(value, target.goal):
        met = "yes, and the goal"
    also = NONE if least is None else f"{least:.3g}{target.unit}"
    return [target.what, f"{sign} {target.bound:g}{target.unit}", goal, f"**{value:.3g}{target.unit}**", also, met]


def _maps(records: list[Record]) -> str:
    text = _MAPS
    for condition in dict.fromkeys(r["condition"] for r in records):
        kept = [r for r in records if r["condition"] == condition]
        text += f"\n### Condition number {condition:g}\n\nMilliseconds:\n\n{_matrix(kept, _milliseconds)}"
        text += f"\nIn batched products p×n · n×p, and how many times faster than the {REFERENCE}:\n\n"
        text += _matrix(kept, partial(_units_and_speed, Results(kept)))
        text += f"\nLargest ‖XXᵀ−I‖_F/√p:\n\n{_matrix(kept, _error)}"
    return text


def _steps(records: list[Record]) -> str:
    text = f"{_STEPS}\nMilliseconds:\n\n{_matrix(records, _milliseconds)}"
    text += f"\nIn batched products p×n · n×p:\n\n{_matrix(records, _units)}"
    results, ours = Results(records), [r for r in records if r["who"] == "ours"]
    for peer, who in _owners(records).items():
        if who not in ("ours", "unit"):
            text += f"\nTimes faster than {peer}:\n\n{_matrix(ours, partial(_speed, results, than=peer))}"
    return text + f"\nLargest ‖XXᵀ−I‖_F/√p at the end:\n\n{_matrix(records, _error)}"


def _training(records: list[Record]) -> str:
    text = f"{_TRAINING}\nTimes the unconstrained control's:\n\n{_matrix(records, _spread_of_units)}"
    text += f"\nMilliseconds:\n\n{_matrix(records, _milliseconds)}"
    return text + f"\nLargest ‖XXᵀ−I‖_F/√p at the end:\n\n{_matrix(records, _error)}"


def _scaling(records: list[Record]) -> str:
    text = "Milliseconds: maps forward and backward, steps at given gradients.\n"
    for along in dict.fromkeys(r["along"] for r in records):
        kept = [r for r in records if r["along"] == along]
        text += f"\nCases count×p×n, along {along}:\n\n{_matrix(kept, _milliseconds)}"
    return text


def _rest(records: list[Record]) -> str:
    text = "Without gradients, as in evaluation. Microseconds, and times the plain layer's:\n\n"
    return text + _matrix(records, lambda r: f"{r['seconds_median'] * 1e6:.4g} ({r['units_median']:.3g}×)")


_SECTIONS: dict[str, tuple[str, Callable[[list[Record]], str]]] = {
    "maps": ("Maps", _maps),
    "steps": ("Steps", _steps),
    "training": ("Whole training steps", _training),
    "scaling": ("Scaling", _scaling),
    "rest": ("At rest", _rest),
}


def _skipped(records: Sequence[Record]) -> str:
    """Why numbers are missing."""
    rows = [[_case(r), r["candidate"], r["reason"]] for r in records if r["status"] != "timed"]
    return "\n## Not timed\n\n" + (_table(["case", "candidate", "reason"], rows) if rows else "Everything was timed.\n")


def _case(r: Record) -> str:
    return f"{r['section']}, {r['case']}" + (f", condition {r['condition']:g}" if r.get("condition") else "")


def _owners(records: Iterable[Record]) -> dict[str, str]:
    return {r["candidate"]: r["who"] for r in records}


def _matrix(records: Sequence[Record], cell: Cell) -> str:
    """Candidates down, cases across."""
    found = {(r["candidate"], r["case"]): cell(r) if r["status"] == "timed" else NONE for r in records}
    cases = list(dict.fromkeys(r["case"] for r in records))
    rows = [[name, *(found.get((name, case), NONE) for case in cases)] for name in _owners(records)]
    return _table(["", *cases], [row for row in rows if set(row[1:]) != {NONE}])


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(str(c).replace('|', '/') for c in line)} |\n" for line in lines)


def _milliseconds(r: Record) -> str:
    median, q1, q3 = (r[f"seconds_{k}"] * 1e3 for k in ("median", "q1", "q3"))
    return f"{median:.3g} [{q1:.3g}, {q3:.3g}]"


def _units(r: Record) -> str:
    return NONE if r["units_median"] is None else f"{r['units_median']:.3g}"


def _spread_of_units(r: Record) -> str:
    return f"{r['units_median']:.3g} [{r['units_q1']:.3g}, {r['units_q3']:.3g}]"


def _speed(results: Results, r: Record, than: str) -> str:
    ratio = results.ratio(r["section"], r["case"], than, r["candidate"], r.get("condition"))
    return NONE if ratio is None else f"{ratio:.3g}×"


def _units_and_speed(results: Results, r: Record) -> str:
    return f"{_units(r)} ({_speed(results, r, REFERENCE)})"


def _error(r: Record) -> str:
    return NONE if r["error"] is None else f"{r['error']:.0e}"
