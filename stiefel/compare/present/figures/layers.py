"""The figures of why methods differ. Imports ``analyse``, ``style``, numpy, pandas, matplotlib."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from stiefel.compare.analyse.layers import SIGNALS, Why
from stiefel.compare.analyse.summary import Summary
from stiefel.compare.present.figures.style import (
    INK,
    PLAIN,
    STYLE,
    draw_legend,
    grid,
    highlighted,
    label_axis,
    legend_of,
    method_styles,
    wrapped,
)

START: dict[str, Any] = {"color": INK, "ls": ":", "lw": 1.4, "zorder": 2.8, "label": "start, all methods"}
MAPS = 10
"""Heat maps of a figure at most."""
FAR = 10.0
"""Effective rates above this are printed as text instead of drawn, where others are lower."""


def depth(summary: Summary, why: Why) -> Figure | None:
    """Per layer at the end: energy kept both ways, variance, redundancy, effective rate; that rate against steps.

    A line is the median over the fresh seeds; the start, which methods share, is dotted. None where nothing is known.
    """
    if why.layers.empty:
        return None
    shown = [signal for signal in SIGNALS if signal.title]
    styles = method_styles(summary)
    starts = why.layers[why.layers.moment == "start"].groupby("depth")[[signal.name for signal in shown]].median()
    with mpl.rc_context(STYLE):
        made, axes = grid(len(shown) // 3 + 1, 3, (3.6, 2.3), legend=[*legend_of(styles), START["label"]])
        *panels, last = axes.flat[: len(shown) + 1]
        for ax, signal in zip(panels, shown, strict=True):
            for label, rows in why.layers[why.layers.moment == "end"].groupby("method", sort=False):
                _points(ax, rows.depth, rows[signal.name], styles[str(label)], signal.least)
            _points(ax, starts.index, starts[signal.name], START, signal.least)
            label_axis(ax, signal.title, "constrained layer", log=True)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        for label, rows in why.rates.groupby("method", sort=False):
            middle = rows.groupby("step").effective_rate.median().dropna()
            _points(last, middle.index, middle, styles[str(label)])
        label_axis(last, "effective rate, median layer", "training steps", log=True)
        for panel in (panels[-1], last):  # the effective rate comes last among the signals
            _leave_out(panel)
        for panel in (*panels, last):
            _say_nothing(panel)
        for ax in axes.flat[len(shown) + 1 :]:
            ax.set_visible(False)
        draw_legend(made, styles | {START["label"]: START})
    return made


def heat(summary: Summary, why: Why) -> Figure | None:
    """How far a step of each layer turns the gradient of each, at the start and per method at the end.

    None where it was not recorded.
    """
    known = why.dependence
    shown = [*highlighted(summary), *summary.controls]
    maps = {"start, all methods": known[known.moment == "start"]}
    for label in sorted(shown, key=lambda label: (label not in summary.controls, label)):
        maps[label] = known[(known.moment == "end") & (known.method == label)]
    squares = {title: _square(rows) for title, rows in maps.items() if rows.degrees.notna().any()}
    squares = {wrapped(title): square for title, square in list(squares.items())[:MAPS]}
    positive = np.concatenate([np.empty(0), *(s[s > 0] for s in squares.values())])
    if not positive.size:
        return None
    # One colour scale for all maps, so that they compare; never empty, where all values are equal.
    norm = LogNorm(positive.min(), max(positive.max(), positive.min() * 1.01))
    columns = min(5, len(squares))
    with mpl.rc_context(STYLE):
        made, axes = grid(
            -(-len(squares) // columns),
            columns,
            (1.9, 1.9),
            legend=(),
            room=3,
            margin=0.55,
            between=0.3,
            titles=max(title.count("\n") for title in squares) + 1,
        )
        image = None
        for ax, (title, square) in zip(axes.flat, squares.items(), strict=False):
            size = len(square)
            image = ax.imshow(square, norm=norm, cmap="viridis", extent=(0.5, size + 0.5, size + 0.5, 0.5))
            ax.set_title(title, fontsize=9, **PLAIN)
            ax.grid(visible=False)
            ax.spines[:].set_visible(False)
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10]))
            ax.tick_params(length=0)
        for ax in axes.flat[len(squares) :]:
            ax.set_visible(False)
        for ax in axes[:, 0]:
            ax.set_ylabel("gradient of layer")
        for ax in axes.flat[max(0, len(squares) - columns) : len(squares)]:
            ax.set_xlabel("step of layer")
        _colours(made, image)
    return made


def _colours(figure: Figure, image: Any) -> None:
    """A bar of colours along the foot of the figure."""
    width, height = figure.get_size_inches()
    long, left, foot = min(3.4, width - 2.0), 0.55 / width, 0.28 / height
    cax = figure.add_axes((left, foot, long / width, 0.12 / height))
    bar = figure.colorbar(image, cax=cax, orientation="horizontal")
    bar.outline.set_visible(False)
    low, high = image.norm.vmin, image.norm.vmax
    ticks = [t for e in range(-9, 4) for t in (10.0**e, 2 * 10.0**e, 5 * 10.0**e) if low <= t <= high]
    ticks = ticks[:: -(-len(ticks) // 6)] if ticks else [low]
    bar.set_ticks(ticks, labels=[f"{t:g}°" for t in ticks])
    bar.ax.xaxis.set_minor_locator(NullLocator())
    figure.text(left + (long + 0.12) / width, foot, "for a step of 1 %", fontsize=9)


def _square(rows: pd.DataFrame) -> np.ndarray:
    """Layer by stepped layer, in the network's order; medians where several methods share a start."""
    layers = range(1, int(rows.depth.max()) + 1)
    pairs = rows.assign(at=rows.depth - rows.distance)
    wide = pairs.pivot_table(index="depth", columns="at", values="degrees", aggfunc="median")
    return wide.reindex(index=layers, columns=layers).to_numpy(dtype=float)  # the pivot drops unknown layers


def _points(ax: Any, x: Any, y: Any, style: dict[str, Any], floor: float = 0.0) -> None:
    y = np.maximum(np.asarray(y, dtype=float), floor)
    known = y > 0  # what is zero has no place on a logarithmic axis
    if known.any():
        ax.plot(np.asarray(x)[known], y[known], marker="o", ms=3, **style)


def _leave_out(ax: Any) -> None:
    """Rates so far above all others that the rest would become one line are printed as text instead of drawn."""
    drawn = {line: np.asarray(line.get_ydata(), dtype=float) for line in ax.lines}
    far = [line for line, values in drawn.items() if values.min() > FAR]
    if not far or len(far) == len(drawn):
        return
    lengths = [f"{line.get_label()} {drawn[line].min():.0f}–{drawn[line].max():.0f}" for line in far]
    for line in far:
        line.remove()
    kept = np.concatenate([values for line, values in drawn.items() if line not in far])
    told = [text for text in lengths if not text.startswith("_")]
    span = max(1.2, kept.max() / kept.min())
    ax.set_ylim(kept.min() / 1.1, kept.max() * 1.1 * span ** (0.14 * len(told)))  # room for the text
    ax.yaxis.set_major_locator(LogLocator(numticks=6) if kept.max() > 30 * kept.min() else MaxNLocator(4))
    if told:
        text = "\n".join(["above:", *told])
        ax.text(0.98, 0.98, text, transform=ax.transAxes, ha="right", va="top", fontsize=7, **PLAIN)


def _say_nothing(ax: Any) -> None:
    if not ax.has_data():
        ax.text(0.5, 0.5, "not recorded", transform=ax.transAxes, ha="center", fontsize=9)
        ax.set_yticks([])
