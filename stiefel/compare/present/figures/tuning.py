"""What tuning found: sensitivity to the rate, and how far defaults are from the best. Imports ``style``."""

from __future__ import annotations

import math
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from stiefel.compare.analyse.rows import Row, Trial
from stiefel.compare.analyse.summary import Summary
from stiefel.compare.present.figures.style import (
    COLOURS,
    GREY,
    PLAIN,
    POWERS,
    STYLE,
    STYLES,
    grid,
    in_decades,
    label_axis,
    legend_below,
    short_name,
    spans_decades,
    wrapped,
)


def sensitivity(summary: Summary) -> Figure:
    """Best validation metric against the learning rate at default knobs: a panel per method, a line per setting.

    A ring is the choice, knobs included; a cross at the edge is a rate at which a run failed.
    """
    labels = sorted(summary.labels, key=lambda label: label in summary.faults)
    found: dict[str, list[tuple[int, Row]]] = {label: [] for label in labels}
    titles = {label: wrapped(summary.marked(label)) for label in labels}
    for i, setting in enumerate(summary.settings):
        for row in setting.rows:
            found[row.label].append((i, row))
    columns = min(5, len(found))
    # −(−a // b) is a / b rounded up: the last row of panels may be partly empty.
    with mpl.rc_context(STYLE):
        figure, axes = grid(
            -(-len(found) // columns),
            columns,
            (2.2, 1.6),
            legend=[setting.title for setting in summary.settings],
            titles=max(title.count("\n") for title in titles.values()) + 1,
            share=True,
        )
        for ax, (label, rows) in zip(axes.flat, found.items(), strict=False):
            for i, row in rows:
                _sensitivity_of(ax, row, i, summary)
            label_axis(ax, titles[label], "", log=spans_decades(summary))
            in_decades(ax)
            ax.xaxis.set_major_formatter(POWERS)
        for ax in axes.flat[len(found) :]:
            ax.set_visible(False)
        # The lowest panel of each column, which is not in the last row where that is partly empty: with shared axes,
        # matplotlib labels the last row alone.
        for ax in axes.flat[max(0, len(found) - columns) : len(found)]:
            ax.set_xlabel("learning rate")
            ax.tick_params(labelbottom=True)
        for ax in axes[:, 0]:
            ax.set_ylabel(f"validation {summary.metric}", **PLAIN)
        handles = [
            Line2D([], [], color=COLOURS[i % len(COLOURS)], ls=STYLES[i // len(COLOURS) % len(STYLES)])
            for i in range(len(summary.settings))
        ]
        legend_below(figure, handles, [setting.title for setting in summary.settings])
    return figure


def _sensitivity_of(ax: Any, row: Row, i: int, summary: Summary) -> None:
    """One method in the i-th setting."""
    colour, style = COLOURS[i % len(COLOURS)], STYLES[i // len(COLOURS) % len(STYLES)]
    plain = [t for t in row.trials if not t.choice.knobs]
    good = [(t.choice.lr, t.validation) for t in plain if math.isfinite(t.validation)]
    bad = [t.choice.lr for t in plain if not math.isfinite(t.validation)]
    if good:
        ax.plot(*zip(*good, strict=True), color=colour, ls=style, marker="o", ms=2.5, lw=1.2)
    if bad:
        # Settings have crosses at heights of their own, so that they do not hide each other. The transform takes x in
        # data and y as a fraction of the panel.
        edge = 0.05 + min(0.08, 0.6 / len(summary.settings)) * i  # of the axes, on the side of bad values
        edges = [edge if summary.higher_is_better else 1 - edge] * len(bad)
        ax.plot(bad, edges, ls="", marker="x", ms=4, color=colour, transform=ax.get_xaxis_transform())
    if row.tuned is not None and math.isfinite(row.tuned.validation):
        ring = {"ms": 7, "mfc": "none", "mec": colour}
        ax.plot([row.tuned.choice.lr], [row.tuned.validation], marker="o", **ring)


def defaults(summary: Summary) -> Figure:
    """Validation metric of each method at its default setting (hollow) and as tuned (full): a panel per setting."""
    # Heights count upwards: reversed, the first name is at the top.
    columns, labels = min(4, len(summary.settings)), summary.labels[::-1]
    size = (2.6, 0.3 + 0.17 * len(labels))
    with mpl.rc_context(STYLE):
        marks = ["default rate and knobs", "tuned"]
        figure, axes = grid(-(-len(summary.settings) // columns), columns, size, legend=marks, margin=1.5, between=0.25)
        for ax, setting in zip(axes.flat, summary.settings, strict=False):
            known = {row.label: (_validation(row.default), _validation(row.tuned)) for row in setting.rows}
            # Both (method,), NaN where not known: matplotlib draws nothing there.
            before, after = np.array([known.get(label, (math.nan, math.nan)) for label in labels]).T
            heights = np.arange(len(labels))
            ax.hlines(heights, before, after, color=COLOURS[0], lw=1)
            ax.plot(before, heights, ls="", marker="o", ms=4.5, mfc="none", mec=COLOURS[0])
            ax.plot(after, heights, ls="", marker="o", ms=4.5, color=COLOURS[0])
            ax.set_ylim(-0.7, len(labels) - 0.3)
            ax.set_title(setting.title, **PLAIN)
            ax.set_xlabel(f"validation {summary.metric}", **PLAIN)
            # Ticks, with names, are at the left panels only, so the faint lines across are drawn by hand.
            ax.set_yticks([])
            ax.hlines(heights, 0, 1, transform=ax.get_yaxis_transform(), color=GREY, alpha=0.25, lw=0.8)
            if spans_decades(summary):
                in_decades(ax)
            else:
                ax.xaxis.set_major_locator(MaxNLocator(4))
        for ax in axes[:, 0]:
            ax.set_yticks(range(len(labels)), [short_name(summary.marked(label)) for label in labels], **PLAIN)
        for ax in axes.flat[len(summary.settings) :]:
            ax.set_visible(False)
        hollow, full = (Line2D([], [], ls="", marker="o", mfc=c, mec=COLOURS[0]) for c in ("none", COLOURS[0]))
        legend_below(figure, [hollow, full], marks)
    return figure


def _validation(trial: Trial | None) -> float:
    return trial.validation if trial is not None and math.isfinite(trial.validation) else math.nan
