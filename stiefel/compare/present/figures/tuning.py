"""What tuning found: sensitivity to the rate, and how far defaults are from the best. Imports ``style``, ``sheet``."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from stiefel.compare.analyse.rows import Row, Trial
from stiefel.compare.analyse.summary import Setting, Summary
from stiefel.compare.present.figures.sheet import Panel, Sheet, room_for
from stiefel.compare.present.figures.style import (
    GREY,
    INK,
    PLAIN,
    POWERS,
    STYLES,
    in_decades,
    label_axis,
    method_styles,
    short_name,
    spans_decades,
    wrapped,
)

MARKERS = "os^Dv"
"""With the line styles, what tells settings apart; colours are the methods'."""


def sensitivity(summary: Summary) -> Sheet:
    """Best validation metric against the learning rate at default knobs: a panel per method, a line per setting.

    A ring is the choice, knobs included; a cross at the edge is a rate at which a run failed. Of a single setting, each
    panel shows the control too.
    """
    labels = sorted(summary.labels, key=lambda label: label in summary.faults)
    titles = {label: wrapped(summary.marked(label)) for label in labels}
    styles, several = method_styles(summary), len(summary.settings) > 1
    heights = _limits(summary)

    def draw(label: str, ax: Any) -> None:
        for i, setting in enumerate(summary.settings):
            for row in setting.rows:
                if row.label == label:
                    _rates(ax, row, i, styles[label]["color"], summary)
                elif row.control and row.scaled and not several:
                    good = _reached(row)
                    ax.plot(*good, color=GREY, ls=STYLES[1], lw=1.0, zorder=1)
        label_axis(ax, titles[label], "learning rate", log=spans_decades(summary))
        ax.set_ylabel(f"validation\n{summary.metric}", **PLAIN)
        in_decades(ax)
        ax.xaxis.set_major_formatter(POWERS)
        if heights is not None:
            ax.set_ylim(heights)

    above = 0.3 + 0.16 * max((title.count("\n") for title in titles.values()), default=0)
    panels = tuple(Panel(partial(draw, label), (1.62, 1.5), left=0.8, above=above) for label in labels)
    legend = {setting.title: _setting(i, INK) for i, setting in enumerate(summary.settings)} if several else {}
    return Sheet(panels, columns=5, legend=legend)


def _setting(i: int, colour: str) -> dict[str, Any]:
    """How the i-th setting's line looks."""
    return {"color": colour, "ls": STYLES[i % len(STYLES)], "marker": MARKERS[i % len(MARKERS)], "ms": 3, "lw": 1.2}


def _reached(row: Row) -> tuple[list[float], list[float]]:
    """Rates at default knobs, and the metric there, where it is known."""
    good = [(t.choice.lr, t.validation) for t in row.trials if not t.choice.knobs and math.isfinite(t.validation)]
    return [rate for rate, _ in good], [value for _, value in good]


def _limits(summary: Summary) -> tuple[float, float] | None:
    """The heights that all panels share; None where nothing is known."""
    values = [t.validation for setting in summary.settings for row in setting.rows for t in row.trials]
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return None
    low, high = min(known), max(known)
    if spans_decades(summary):
        return low / 1.5, high * 1.5
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 0.05
    return low - margin, high + margin


def _rates(ax: Any, row: Row, i: int, colour: str, summary: Summary) -> None:
    """One method in the i-th setting."""
    rates, values = _reached(row)
    if rates:
        ax.plot(rates, values, **_setting(i, colour))
    bad = [t.choice.lr for t in row.trials if not t.choice.knobs and not math.isfinite(t.validation)]
    if bad:
        # Settings have crosses at heights of their own, so that they do not hide each other. The transform takes x in
        # data and y as a fraction of the panel.
        edge = 0.05 + min(0.08, 0.6 / len(summary.settings)) * i  # of the axes, on the side of bad values
        edges = [edge if summary.higher_is_better else 1 - edge] * len(bad)
        ax.plot(bad, edges, ls="", marker="x", ms=4, color=colour, transform=ax.get_xaxis_transform())
    if row.tuned is not None and math.isfinite(row.tuned.validation):
        ring = {"ms": 8, "mfc": "none", "mec": colour}
        ax.plot([row.tuned.choice.lr], [row.tuned.validation], marker="o", **ring)


def defaults(summary: Summary) -> Sheet:
    """Validation metric of each method at its default setting (hollow) and as tuned (full): a panel per setting."""
    # Heights count upwards: reversed, the first name is at the top.
    labels, styles = summary.labels[::-1], method_styles(summary)
    heights = np.arange(len(labels))

    def draw(setting: Setting, ax: Any) -> None:
        known = {row.label: (_validation(row.default), _validation(row.tuned)) for row in setting.rows}
        for height, label in enumerate(labels):
            before, after = known.get(label, (math.nan, math.nan))
            colour = styles[label]["color"]
            ax.plot([before, after], [height] * 2, color=colour, lw=1)
            ax.plot([before], [height], ls="", marker="o", ms=4.5, mfc="none", mec=colour)
            ax.plot([after], [height], ls="", marker="o", ms=4.5, color=colour)
        ax.set_ylim(-0.7, len(labels) - 0.3)
        ax.set_title(setting.title, **PLAIN)
        ax.set_xlabel(f"validation {summary.metric}", **PLAIN)
        ax.set_yticks(heights, [short_name(summary.marked(label)) for label in labels], **PLAIN)
        if spans_decades(summary):
            in_decades(ax)
        else:
            ax.xaxis.set_major_locator(MaxNLocator(4))

    size, left = (2.6, 0.3 + 0.19 * len(labels)), room_for(labels)
    legend = {
        "default rate and knobs": {"color": INK, "ls": "", "marker": "o", "mfc": "none"},
        "tuned": {"color": INK, "ls": "", "marker": "o"},
    }
    panels = tuple(Panel(partial(draw, setting), size, left=left, right=0.2) for setting in summary.settings)
    return Sheet(panels, columns=3, legend=legend)


def _validation(trial: Trial | None) -> float:
    return trial.validation if trial is not None and math.isfinite(trial.validation) else math.nan
