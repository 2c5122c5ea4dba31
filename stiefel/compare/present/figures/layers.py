"""The figures of why methods differ. Imports ``analyse``, ``style``, ``sheet``, numpy, pandas, matplotlib."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from stiefel.compare.analyse.layers import SIGNALS, Signal, Why
from stiefel.compare.analyse.summary import Summary
from stiefel.compare.present.figures.sheet import Panel, Sheet
from stiefel.compare.present.figures.style import (
    INK,
    PLAIN,
    highlighted,
    label_axis,
    legend_of,
    method_styles,
    widen,
    wrapped,
)

START: dict[str, Any] = {"color": INK, "ls": ":", "lw": 1.4, "zorder": 2.8, "label": "start, all methods"}
MAPS = 10
"""Heat maps of a figure at most."""
NARROW = 1.25
"""Least factor that an axis spans: an effect of 0.2 % is not to look like a collapse."""
FAR = 10.0
"""Effective rates above this are printed as text instead of drawn, where others are lower."""


def depth(summary: Summary, why: Why) -> Sheet | None:
    """Per layer at the end: energy kept, variance, redundancy, conditions, norms, effective rate; that against steps.

    A line is the median over the fresh seeds; the start, which methods share, is dotted. None where nothing is known.
    """
    if why.layers.empty:
        return None
    titled = [signal for signal in SIGNALS if signal.title]
    shown = [signal for signal in titled if not signal.optional or why.layers[signal.name].notna().any()]
    styles = method_styles(summary)
    ends, starts = (why.layers[why.layers.moment == moment] for moment in ("end", "start"))
    shared = starts.groupby("depth")[[signal.name for signal in shown]].median()

    def through(signal: Signal, ax: Any) -> None:
        for label, rows in ends.groupby("method", sort=False):
            _points(ax, rows.depth, rows[signal.name], styles[str(label)], signal.least)
        _points(ax, shared.index, shared[signal.name], START, signal.least)
        label_axis(ax, signal.title, "constrained layer", log=True)
        ax.set_xlim(0.8, why.layers.depth.max() + 0.2)  # also where few layers have it
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        _finish(ax, rates=signal is shown[-1])  # the effective rate comes last among the signals

    def along(ax: Any) -> None:
        for label, rows in why.rates.groupby("method", sort=False):
            middle = rows.groupby("step").effective_rate.median().dropna()
            _points(ax, middle.index, middle, styles[str(label)])
        label_axis(ax, "effective rate, median layer", "training steps", log=True)
        _finish(ax, rates=True)

    panels = [Panel(partial(through, signal)) for signal in shown] + [Panel(along)]
    return Sheet(tuple(panels), legend=legend_of(styles | {START["label"]: START}))


def heat(summary: Summary, why: Why) -> Sheet | None:
    """How far a step of each layer turns the gradient of each, at the start and per method at the end.

    None where it was not recorded.
    """
    known = why.dependence
    shown = [*highlighted(summary), *summary.controls]
    maps = {"start, all methods": known[known.moment == "start"]}
    for label in sorted(shown, key=lambda label: (label not in summary.controls, label)):
        maps[label] = known[(known.moment == "end") & (known.method == label)]
    squares = {title: _square(rows) for title, rows in maps.items() if rows.degrees.notna().any()}
    squares = dict(list(squares.items())[:MAPS])
    positive = np.concatenate([np.empty(0), *(s[s > 0] for s in squares.values())])
    if not positive.size:
        return None
    # One colour scale for all maps, so that they compare; never empty, where all values are equal.
    norm = LogNorm(positive.min(), max(positive.max(), positive.min() * 1.01))

    def draw(title: str, square: np.ndarray, ax: Any) -> None:
        size = len(square)
        ax.imshow(square, norm=norm, cmap="viridis", extent=(0.5, size + 0.5, size + 0.5, 0.5))
        ax.set_title(title, fontsize=9, **PLAIN)
        ax.set(xlabel="step of layer", ylabel="gradient of layer")
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10]))
        ax.tick_params(length=0)

    titles = [wrapped(title) for title in squares]
    above = 0.3 + 0.16 * max(title.count("\n") for title in titles)
    panels = [
        Panel(partial(draw, title, square), (1.8, 1.8), above=above)
        for title, square in zip(titles, squares.values(), strict=True)
    ]
    bar = Panel(partial(_colours, norm), (2.2, 0.12), left=0.3, right=0.3, above=0.4, below=0.35)
    return Sheet((*panels, bar), columns=5)


def _colours(norm: LogNorm, ax: Any) -> None:
    """A bar of the maps' colours."""
    bar = ax.figure.colorbar(ScalarMappable(norm, "viridis"), cax=ax, orientation="horizontal")
    bar.outline.set_visible(False)
    low, high = norm.vmin or 0.0, norm.vmax or 0.0
    ticks = [t for e in range(-9, 4) for t in (10.0**e, 2 * 10.0**e, 5 * 10.0**e) if low <= t <= high]
    ticks = ticks[:: -(-len(ticks) // 5)] if ticks else [low]
    bar.set_ticks(ticks, labels=[f"{t:g}°" for t in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_title("turned by a step of 1 %", fontsize=9)


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


def _finish(ax: Any, *, rates: bool) -> None:
    """The limits of a panel; of one without data, a word."""
    if ax.has_data():
        if rates:
            _leave_out(ax)
        widen(ax, NARROW)
    else:
        ax.text(0.5, 0.5, "not recorded", transform=ax.transAxes, ha="center", fontsize=9)
        ax.set_yticks([])
