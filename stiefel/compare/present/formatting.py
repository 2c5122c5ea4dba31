"""Numbers as reports write them. Imports ``rows`` and ``scores``."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from stiefel.compare.analyse.rows import TOLERANCES, Row, powers
from stiefel.compare.analyse.statistics.scores import Interval
from stiefel.compare.analyse.summary import Summary
from stiefel.compare.record.records import ENDED

NONE, NOT_REACHED, DOUBTED = "—", "not reached", "not credible"


def rate(row: Row) -> str:
    """The chosen learning rate, with a mark where it is on the edge of its grid."""
    return NONE if row.choice is None else f"{row.choice.lr:g}" + ("*" if row.edge else "")


def bound(row: Row) -> str:
    """The sign of a score that a better rate may beat, where the best one lies on the edge; else empty."""
    return "" if not row.edge else "≥ " if row.metric.higher_is_better else "≤ "


def knobs(row: Row) -> str:
    """The chosen knobs; empty where they are the defaults."""
    return "" if row.choice is None else ", ".join(f"{key}={value}" for key, value in row.choice.knobs)


def choice(row: Row) -> str:
    """The chosen learning rate and knobs."""
    return ", ".join(filter(None, (rate(row), knobs(row))))


def error(value: float) -> str:
    """An orthogonality error, with one digit."""
    if math.isinf(value):
        return "∞"
    return f"{value:.1g}" if 0.01 <= value < 100 else powers(value)


def tone(value: float) -> str:
    """Whether an orthogonality error is within any tolerance."""
    return "good" if value <= max(TOLERANCES) else "bad"


def steps(interval: Interval | None) -> str:
    """Steps to the target with their interval."""
    return NONE if interval is None else interval.format(".0f", NOT_REACHED)


def seconds(interval: Interval | None) -> str:
    """Seconds to the target with their interval."""
    return NONE if interval is None else interval.format(".3g", NOT_REACHED)


def ratio(value: float) -> str:
    """Step time as a multiple of the control's."""
    return f"{value:.1f}×"


def milliseconds(value: float) -> str:
    """A duration in ms."""
    return f"{value * 1e3:.2f}"


def megabytes(value: float | None, form: str = "+.0f") -> str:
    """Memory in MB, by default as a difference."""
    return NONE if value is None else f"{value / 1e6:{form}} MB"


def count(value: float | None) -> str:
    """A large number, in powers of thousand."""
    if value is None:
        return NONE
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def score(value: float) -> str:
    """A metric; infinite is a failure."""
    return "failed" if math.isinf(value) else f"{value:.3f}" if 0.01 <= abs(value) < 100 else f"{value:.4g}"


def number(value: float, form: str) -> str:
    """A number, or the sign of infinity."""
    return Interval(value, None, None, 1).format(form)


def key(value: Any) -> str:
    """What the page sorts a cell by: nothing comes last."""
    # value != value: NaN. The page sorts by JavaScript's Number(), which reads "Infinity" and not "inf".
    return "" if value is None or value != value else str(value).replace("inf", "Infinity")


def dashes(style: dict[str, Any]) -> str:
    """The line style of a matplotlib line as the dash array of an SVG line; empty where it is solid."""
    named = {"-": "", "--": "5 3", "-.": "6 2 1.5 2", ":": "1.5 2", "": "0 99"}
    look = style.get("ls", "-")
    return named[look] if isinstance(look, str) else " ".join(f"{1.3 * length:g}" for length in look[1])


def budget(summary: Summary) -> str:
    """What a run and its tuning had, in words; empty where no run has ended."""
    trained = [r for r in summary.records if r.spec.kind == "quality" and r.status in ENDED]
    if not trained:
        return ""
    steps = _span(r.summary.get("steps") for r in trained)
    names = (("epochs", "{} epochs"), ("batch_size", "batches of {}"))
    factors = [form.format(_span(r.spec.fields.get(name) for r in trained)) for name, form in names]
    known = [part for part in (f"{steps} steps", *factors) if "—" not in part]
    rows = [row for setting in summary.settings for row in setting.rows if row.tuning and row.choice is not None]
    tuned = _span(len(row.tuning) / max(1, len(row.choices)) for row in rows)
    count = _span(row.runs for row in rows if row.runs)
    if summary.studies:
        design = f"{count} studies of each method: a tuning of {tuned} runs, then a fresh run"
    else:
        design = f"one tuning of {tuned} runs for each method, then {count} fresh runs"
    targets = sorted({setting.target for setting in summary.settings if setting.target is not None})
    aim = [f"target: validation {summary.metric} {' or '.join(f'{target:g}' for target in targets)}"] if targets else []
    return " · ".join([*([f"a run: {', '.join(known)}"] if known else []), *([design] if rows else []), *aim])


def _span(values: Iterable[Any]) -> str:
    """A number, or the range of several."""
    known = sorted({value for value in values if isinstance(value, (int, float))})
    if not known:
        return NONE
    return f"{known[0]:g}" if len(known) == 1 else f"{known[0]:g} to {known[-1]:g}"
