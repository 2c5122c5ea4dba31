"""Training curves of one setting, and how far its weights leave the manifold. Imports ``style`` and ``sheet``."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from stiefel.compare.analyse.rows import TOLERANCES, Row, number
from stiefel.compare.analyse.summary import Setting, Summary
from stiefel.compare.present.figures.sheet import Panel, Sheet, label_ends, room_for
from stiefel.compare.present.figures.style import (
    OTHER,
    label_axis,
    legend_of,
    method_styles,
    spans_decades,
    target_line,
    widen,
)

LEAST = 1e-16
"""What stands for an error of zero, which has no place on a logarithmic axis."""


def curves(summary: Summary, setting: Setting) -> Sheet:
    """Loss and metric against steps and seconds, for one setting.

    A line is the median over the fresh seeds of each method's choice, the band their range.
    """
    styles, wide = method_styles(summary), spans_decades(summary)
    series = {row.label: _series(row, summary.metric) for row in setting.rows}
    names = {"train_loss": "training loss", "validation": f"validation {summary.metric}"}

    def draw(what: str, along: str, ax: Any) -> None:
        log = what != "validation" or wide
        for label, data in series.items():
            _band(ax, data, along, what, styles[label], log=log)
        label_axis(ax, names[what], f"training {'steps' if along == 'step' else along}", log=log)
        if what == "validation" and setting.target is not None:
            target_line(ax, setting.target)
        if ax.has_data():
            ax.set_xlim(left=0)  # loss and metric from the same step on: of the loss the first is not known

    panels = tuple(Panel(partial(draw, what, along), (2.2, 1.9)) for what in names for along in ("step", "seconds"))
    return Sheet(panels, columns=2, legend=legend_of(styles))


def orthogonality(summary: Summary, setting: Setting) -> Sheet:
    """Orthogonality errors of one setting: the worst layer's against steps, and each layer's at the end.

    A line is the median over the fresh seeds, the band their range; dotted, the tolerances.
    """
    styles = method_styles(summary)
    series = {row.label: _series(row, summary.metric) for row in setting.rows}

    def finish(ax: Any, title: str, xlabel: str) -> None:
        label_axis(ax, title, xlabel, log=True)
        if ax.has_data():
            widen(ax, 1e3)
        for tolerance in TOLERANCES:
            target_line(ax, tolerance)

    def along(ax: Any) -> None:
        ends = {}
        for label, data in series.items():
            _band(ax, data, "step", "error", styles[label], log=True)
            if data and styles[label]["label"] != OTHER["label"]:
                ends[styles[label]["label"]] = (max(float(np.median(data["error"][:, -1])), LEAST), styles[label])
        finish(ax, "error of the worst layer, ‖XXᵀ−I‖/√p", "training steps")
        if ax.has_data():
            ax.set_xlim(left=0)
        label_ends(ax, ends)

    def layers(ax: Any) -> None:
        ends = {}
        for row in setting.rows:
            heights = _per_layer(ax, row, styles[row.label])
            if heights is not None and styles[row.label]["label"] != OTHER["label"]:
                ends[styles[row.label]["label"]] = (float(heights[-1]), styles[row.label])
        finish(ax, "error of each layer at the end", "constrained layer")
        label_ends(ax, ends)

    right = room_for([style["label"] for style in styles.values() if style["label"] != OTHER["label"]])
    return Sheet((Panel(along, (3.6, 2.3), right=right), Panel(layers, (3.6, 2.3), right=right)), columns=2)


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
    y = np.maximum(data[what], LEAST) if log else data[what]
    # Points that every run has a number at: before training there is no loss.
    known = ~np.isnan(y).any(axis=0)
    x, y = np.median(data[along], axis=0)[known], y[:, known]
    ax.plot(x, np.median(y, axis=0), **style)
    if len(y) > 1 and style["label"] != OTHER["label"]:
        ax.fill_between(x, y.min(axis=0), y.max(axis=0), color=style["color"], alpha=0.13, lw=0)


def _per_layer(ax: Any, row: Row, style: dict[str, Any]) -> np.ndarray | None:
    """Draw the layers' errors of one method; returns them, or None where they are not known."""
    layers = [[number(value) for value in end["orthogonality"]["layers"].values()] for end in row.ends]
    if not layers:
        return None
    # (run, layer) → (layer,)
    heights = np.maximum(np.median(np.array(layers), axis=0), LEAST)
    ax.plot(range(1, len(heights) + 1), heights, marker="o", ms=3, **style)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    # Half a layer of margin; limits only grow, as every method draws into the same panel.
    ax.set_xlim(min(ax.get_xlim()[0], 0.5), max(ax.get_xlim()[1], len(heights) + 0.5))
    return heights
