"""The table of the verdict: each method at each scale, over all settings. Imports ``verdict``, ``columns``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from stiefel.compare.analyse.candidates import Candidate, candidates
from stiefel.compare.analyse.rows import Row
from stiefel.compare.analyse.verdict import Comparison, Verdict
from stiefel.compare.present import formatting as words
from stiefel.compare.present.columns import BOTH, PAGE, TERMINAL, WIDE, Column, Grid, Place, shown, valued
from stiefel.compare.present.phrases import amount


@dataclass(frozen=True)
class Standing:
    """A candidate in a verdict; of one that has no score or known faults, nothing is compared."""

    verdict: Verdict
    candidate: Candidate

    @property
    def compared(self) -> bool:
        """Whether the verdict is about it too."""
        return any(other is self.candidate for other in self.verdict.candidates)

    @property
    def row(self) -> Row:
        """Its row where there is one point of the grid; over several, that of the first."""
        return self.candidate.rows[0]

    @property
    def name(self) -> str:
        """As reports write it."""
        return self.verdict.summary.marked(self.candidate.label) + self.candidate.name[len(self.candidate.label) :]

    @cached_property
    def place(self) -> tuple[int, int] | None:
        """The best and the worst place that it may have."""
        return self.verdict.place(self.candidate) if self.compared else None

    @cached_property
    def gain(self) -> Comparison | None:
        """What it is compared with no constraint; None of the control itself."""
        control = self.verdict.control
        if not self.compared or control is None or control is self.candidate:
            return None
        return self.verdict.between(self.candidate, control)


def _method(at: Standing) -> str:
    return "\n".join((at.name, _choice(at))) if at.row.choice else at.name


def _choice(at: Standing) -> str:
    """What most studies chose."""
    return at.candidate.choice if at.row.choice else words.NONE


def _place(at: Standing) -> str:
    if at.place is None:
        return words.NONE
    low, high = at.place
    return str(low) if low == high else f"{low}–{high}"


def _score(at: Standing) -> str:
    score = at.candidate.score
    if score is None:
        return next((row.state for row in at.candidate.rows if row.state), "failed")
    bound = ("≥ " if at.candidate.metric.higher_is_better else "≤ ") if at.candidate.bound else ""
    return f"{bound}{score}"


def _gain(at: Standing) -> str:
    if at.gain is None:
        return words.NONE
    return amount(at.gain, plus=True) + ("" if at.gain.difference.apart else " ≈")


def _tone(at: Standing) -> str:
    if at.gain is None or not at.gain.difference.apart:
        return "even"
    return "good" if at.gain.better else "bad"


def _failed(at: Standing) -> str:
    return f"{at.candidate.failures}/{at.candidate.runs}"


def _short(at: Standing) -> str:
    return f"{sum(row.short for row in at.candidate.rows)}/{at.candidate.runs}"


def _steps(at: Standing) -> str:
    """Of one point of the grid: over several there is no common target."""
    if at.row.at_start:
        return "at the start"
    return words.steps(at.row.steps_to_target)


def _median_steps(at: Standing) -> str:
    interval = at.row.steps_to_target
    if interval is None or not interval.finite:
        return words.NONE if interval is None else "not\nreached"
    return "at start" if at.row.at_start else words.number(interval.value, ".0f")


def _step_cost(at: Standing) -> str:
    step = at.candidate.step
    if step is not None:
        return words.ratio(step.value)
    return words.DOUBTED if any(row.cost is not None for row in at.candidate.rows) else words.NONE


def _quartiles(at: Standing) -> str:
    step = at.candidate.step
    if step is None or at.candidate.control:
        return _step_cost(at)
    ends = "" if step.low is None or step.high is None else f" ({step.low:.2g}–{step.high:.2g})"
    return f"{step.value:.2g}×{ends}"


def _target(at: Standing) -> float | None:
    """What is sorted by; None where no target is known, or several."""
    several = len(at.candidate.rows) > 1
    interval = at.row.steps_to_target
    known = any(setting.target is not None for setting in at.verdict.summary.settings)
    return interval.value if known and not several and interval is not None else None


def _any_short(at: Standing) -> int | None:
    return None if _target(at) is None else at.row.short or None


def _key(at: Standing) -> float | None:
    return at.candidate.score.value if at.candidate.score else None


STANDINGS: tuple[Column[Standing], ...] = (
    Column("method", _method, where=TERMINAL),
    Column("method", lambda at: at.name),
    Column("place", _place, lambda at: at.place and at.place[0], where=BOTH),
    Column("test {metric}\n[95 %]", _score, _key, where=TERMINAL),
    Column("test {metric}", _score, _key),
    Column(
        "over no constraint",
        _gain,
        lambda at: at.gain and at.gain.difference.value,
        where=PAGE | WIDE,
        tone=_tone,
        optional=True,
    ),
    Column(
        "failed\nof n",
        _failed,
        lambda at: at.candidate.failures or None,
        where=BOTH,
        tone=lambda at: "bad" if at.candidate.failures else "",
        optional=True,
    ),
    Column(
        "short of\ntarget",
        _short,
        lambda at: (at.row.short or None) if _target(at) is not None else None,
        optional=True,
    ),
    valued("worst\nerror", lambda at: at.candidate.error, words.error, where=TERMINAL),
    valued(
        "worst\nerror",
        lambda at: at.candidate.error if math.isfinite(at.candidate.error) else None,
        words.error,
        tone=lambda at: (
            "" if at.candidate.control or math.isinf(at.candidate.error) else words.tone(at.candidate.error)
        ),
    ),
    Column("steps to\ntarget", _median_steps, _target, where=TERMINAL, optional=True),
    Column("steps to target", _steps, _target, optional=True),
    Column("step\ncost", _step_cost, where=TERMINAL),
    Column("step cost", _quartiles, lambda at: at.candidate.step and at.candidate.step.value),
    Column("rate, knobs", _choice, lambda at: at.row.choice and at.row.choice.lr, prose=True),
)
"""Of a candidate, from left to right."""


def standings(verdict: Verdict, place: Place) -> Grid[Standing]:
    """The candidates, best first; then those without a score, then those with known faults."""
    compared = [c.name for c in verdict.candidates]
    others = [c for c in candidates(verdict.summary) if c.name not in compared and (c.faulty or not c.trained)]
    others.sort(key=lambda c: (c.faulty, c.name))
    lines = tuple(Standing(verdict, c) for c in (*verdict.candidates, *others))
    columns = shown(STANDINGS, lines, place, verdict.summary.metric)
    return Grid(columns, lines, lambda at: "ref" if at.candidate.control else "")
