"""The verdict in pictures: scores with intervals, and against what a step costs. Imports ``verdict``, ``sheet``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from matplotlib.ticker import MaxNLocator, NullLocator

from stiefel.compare.analyse.candidates import Candidate
from stiefel.compare.analyse.verdict import Verdict
from stiefel.compare.present.figures.sheet import LETTER, Panel, Sheet, room_for
from stiefel.compare.present.figures.style import (
    GREY,
    OTHER,
    PLAIN,
    POWERS,
    in_decades,
    method_styles,
    short_name,
)

Styles: TypeAlias = dict[str, dict[str, Any]]
Box: TypeAlias = tuple[float, float, float, float]
MOST = 20
"""Candidates that are drawn, beside the controls: the best."""
NAMED = 12
"""Candidates up to which each has its name beside its dot; of more, each coloured method once, at its best."""
TICKS = (0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 100)


def scores(verdict: Verdict) -> Sheet | None:
    """Each candidate's score with its interval, best first; the band is that of no constraint. None without any.

    A hollow dot is a bound: its best rate lies on the edge of those tried.
    """
    shown, styles = _shown(verdict), method_styles(verdict.summary)
    if not shown:
        return None

    def draw(ax: Any) -> None:
        _band(ax, verdict)
        for height, candidate in enumerate(shown[::-1]):
            _mark(ax, candidate, styles, (candidate.score.value if candidate.score else math.nan, height))
            low, high = _ends(candidate)
            ax.plot([low, high], [height] * 2, color=_colour(candidate, styles), lw=2, zorder=3, solid_capstyle="butt")
        ax.set_ylim(-0.7, len(shown) - 0.3)
        ax.set_yticks(range(len(shown)), [short_name(candidate.name) for candidate in shown[::-1]], **PLAIN)
        ax.set_xlabel(_metric(verdict), **PLAIN)
        ax.grid(visible=False, axis="y")
        _along(ax, verdict, "x")

    names = [candidate.name for candidate in shown]
    size = (3.4, 0.25 + 0.27 * len(shown))
    return Sheet((Panel(draw, size, left=room_for(names), right=0.25, above=0.1),), columns=1)


def against_cost(verdict: Verdict) -> Sheet | None:
    """Each candidate's score against what its step costs; the upper left is best where more is better.

    None where fewer than two costs are credible.
    """
    shown = [candidate for candidate in _shown(verdict) if candidate.step is not None]
    if len(shown) < 2:
        return None
    styles = method_styles(verdict.summary)

    def draw(ax: Any) -> None:
        _band(ax, verdict, upright=False)
        for candidate in shown:
            colour = _colour(candidate, styles)
            score, step = candidate.score, candidate.step
            if score is None or step is None:
                continue
            _mark(ax, candidate, styles, (step.value, score.value))
            ax.plot([step.value] * 2, _ends(candidate), color=colour, lw=1.2, zorder=3)
            if step.low is not None and step.high is not None:
                ax.plot([step.low, step.high], [score.value] * 2, color=colour, lw=1.2, zorder=3)
        ax.set(xlabel="step cost, times that without a constraint")
        ax.set_ylabel(_metric(verdict), **PLAIN)
        _along(ax, verdict, "y")
        in_decades(ax)
        low, high = ax.get_xlim()
        ax.set_xlim(min(low, 0.9), max(high, 2.0))
        known = [tick for tick in TICKS if ax.get_xlim()[0] <= tick <= ax.get_xlim()[1]]
        ax.set_xticks(known, [f"{tick:g}×" for tick in known])
        ax.xaxis.set_minor_locator(NullLocator())
        _names(ax, shown, styles)

    return Sheet((Panel(draw, (4.1, 2.3), above=0.15),), columns=1)


def _shown(verdict: Verdict) -> list[Candidate]:
    return [c for place, c in enumerate(verdict.candidates) if place < MOST or c.control]


def _names(ax: Any, shown: Sequence[Candidate], styles: Styles) -> None:
    """A name beside each dot, where the fewest other names and dots are."""
    size = np.asarray(ax.get_position().size) * ax.figure.get_size_inches()
    to_axes = ax.transData + ax.transAxes.inverted()
    found = [c for c in shown if c.score is not None and c.step is not None]
    dots = [size * to_axes.transform((c.step.value, c.score.value)) for c in found if c.step and c.score]
    taken = [(*(dot - 0.05), *(dot + 0.05)) for dot in dots]
    named: set[str] = set()
    for candidate, dot in zip(found, dots, strict=True):
        if len(found) > NAMED and (candidate.label in named or styles[candidate.label]["label"] == OTHER["label"]):
            continue
        named.add(candidate.label)
        name = short_name(candidate.name if len(found) <= NAMED else candidate.label)
        wide = LETTER * len(name)
        places = [np.add(dot, (side * (0.09 + wide / 2), up)) for up in (0.09, -0.09, 0.24, -0.24) for side in (1, -1)]
        places += [np.add(dot, (0, up)) for up in (0.18, -0.18, 0.33, -0.33)]
        boxes = [(x - wide / 2, y - 0.07, x + wide / 2, y + 0.07) for x, y in places]
        best = min(range(len(boxes)), key=lambda i: _crowded(boxes[i], taken, size))
        taken.append(boxes[best])
        at = {"transform": ax.transAxes, "color": _colour(candidate, styles), "ha": "center", "va": "center"}
        ax.text(*(places[best] / size), name, **at, **PLAIN)


def _crowded(box: Box, taken: Sequence[Box], size: Any) -> float:
    """How much of a box others cover or lies outside of the panel, in square inches."""
    panel = (0.0, 0.0, float(size[0]), float(size[1]))
    area = (box[2] - box[0]) * (box[3] - box[1])
    return sum(_shared(box, other) for other in taken) + area - _shared(box, panel)


def _shared(a: Box, b: Box) -> float:
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, wide) * max(0.0, high)


def _mark(ax: Any, candidate: Candidate, styles: Styles, at: tuple[float, float]) -> None:
    colour = _colour(candidate, styles)
    filling = {"mfc": "none", "mew": 1.6} if candidate.bound else {}
    ax.plot(*([value] for value in at), ls="", marker="s" if candidate.control else "o", ms=6, color=colour, **filling)


def _ends(candidate: Candidate) -> tuple[float, float]:
    score = candidate.score
    if score is None or score.low is None or score.high is None:
        return math.nan, math.nan
    return score.low, score.high


def _band(ax: Any, verdict: Verdict, *, upright: bool = True) -> None:
    """The interval of no constraint."""
    if verdict.control is not None and verdict.control.score is not None:
        low, high = _ends(verdict.control)
        span = ax.axvspan if upright else ax.axhspan
        line = ax.axvline if upright else ax.axhline
        if math.isfinite(low):
            span(low, high, color=GREY, alpha=0.13, lw=0, zorder=0)
        line(verdict.control.score.value, color=GREY, lw=0.9, ls=(0, (4, 2)), zorder=1)


def _along(ax: Any, verdict: Verdict, axis: str) -> None:
    """The axis of the metric."""
    chosen = ax.xaxis if axis == "x" else ax.yaxis
    if any(candidate.log_scale for candidate in verdict.candidates):
        getattr(ax, f"set_{axis}scale")("log")
        chosen.set_minor_locator(NullLocator())
        chosen.set_major_formatter(POWERS)
    else:
        chosen.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))


def _metric(verdict: Verdict) -> str:
    better = "more" if verdict.summary.higher_is_better else "less"
    return f"test {verdict.summary.metric} ({better} is better)"


def _colour(candidate: Candidate, styles: Styles) -> str:
    return str(styles[candidate.label]["color"])
