"""Training curves of one setting. Imports ``style``."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from stiefel.compare.analyse.rows import TOLERANCES, Row, number
from stiefel.compare.analyse.summary import Setting, Summary
from stiefel.compare.present.figures.style import (
    OTHER,
    STYLE,
    draw_legend,
    grid,
    label_axis,
    legend_of,
    method_styles,
    spans_decades,
    target_line,
)


def curves(summary: Summary, setting: Setting) -> Figure:
    """Loss and metric against steps and seconds, orthogonality against steps and per layer, for one setting.

    A line is the median over the fresh seeds of each method's choice, the band their range.
    """
    names = {
        "train_loss": "training loss",
        "validation": f"validation {summary.metric}",
        "error": "worst ‖XXᵀ−I‖/√p",
    }
    # Five of six panels, row by row; the sixth is for layers. `zip` below stops before it.
    panels = [("step", "train_loss"), ("seconds", "train_loss"), ("step", "error")]
    panels += [("step", "validation"), ("seconds", "validation")]
    styles, wide = method_styles(summary), spans_decades(summary)
    with mpl.rc_context(STYLE):
        figure, axes = grid(2, 3, (3.6, 2.5), legend=list(legend_of(styles)))
        for row in setting.rows:
            data, style = _series(row, summary.metric), styles[row.label]
            for ax, (along, what) in zip(axes.flat, panels, strict=False):
                _band(ax, data, along, what, style, log=what != "validation" or wide)
            _per_layer(axes[1, 2], row, style)
        # After the curves: the ticks and the lines across depend on what has been drawn.
        for ax, (along, what) in zip(axes.flat, panels, strict=False):
            log = what != "validation" or wide
            label_axis(ax, names[what], f"training {'steps' if along == 'step' else along}", log=log)
            if what == "validation" and setting.target is not None:
                target_line(ax, setting.target)
        label_axis(axes[1, 2], "‖XXᵀ−I‖/√p per layer, at the end", "constrained layer", log=True)
        for ax in axes[:, 2]:  # the two panels of orthogonality errors
            for tolerance in TOLERANCES:
                target_line(ax, tolerance)
        draw_legend(figure, styles)
    return figure


def _series(row: Row, metric: str) -> dict[str, Any]:
    """A method's curves as arrays (run, point); empty where there is none."""
    if not row.curves:
        return {}
    # Cut to the shortest run, so that every point has all runs.
    length = min(map(len, row.curves))
    runs = [rows[:length] for rows in row.curves]
    found = {name: [[number(r[name]) for r in rows] for rows in runs] for name in ("step", "seconds", "train_loss")}
    found["validation"] = [[number(r["validation"].get(metric)) for r in rows] for rows in runs]
    found["error"] = [[number(r["orthogonality"]["worst"]) for r in rows] for rows in runs]
    return {name: np.array(values) for name, values in found.items()}


def _band(ax: Any, data: dict[str, Any], along: str, what: str, style: dict[str, Any], *, log: bool) -> None:
    if not data:
        return
    # An error of exactly zero has no place on a logarithmic axis.
    y = np.maximum(data[what], 1e-16) if log else data[what]
    # Points that every run has a number at: before training there is no loss.
    known = ~np.isnan(y).any(axis=0)
    x, y = np.median(data[along], axis=0)[known], y[:, known]
    ax.plot(x, np.median(y, axis=0), **style)
    if len(y) > 1 and style["label"] != OTHER["label"]:
        ax.fill_between(x, y.min(axis=0), y.max(axis=0), color=style["color"], alpha=0.13, lw=0)


def _per_layer(ax: Any, row: Row, style: dict[str, Any]) -> None:
    layers = [[number(value) for value in end["orthogonality"]["layers"].values()] for end in row.ends]
    if not layers:
        return
    # (run, layer) → (layer,)
    heights = np.maximum(np.median(np.array(layers), axis=0), 1e-16)
    ax.plot(range(1, len(heights) + 1), heights, marker="o", ms=3, **style)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    # Half a layer of margin; limits only grow, as every method draws into the same panel.
    ax.set_xlim(min(ax.get_xlim()[0], 0.5), max(ax.get_xlim()[1], len(heights) + 0.5))
