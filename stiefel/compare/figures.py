"""The figures of a comparison. Imports ``summary``, numpy, matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from stiefel.compare.records import ENDED
from stiefel.compare.summary import TOLERANCES, Setting, Summary

# Okabe and Ito's palette, distinguishable in all common forms of colour blindness; line styles tell the rest.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C00", "#7F7F7F")
STYLES = ("-", "--", "-.", ":")
_INK = "#010203"  # replaced by the page's text colour

STYLE: Any = {
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 9,
    "grid.alpha": 0.25,
    "grid.color": "#888888",
    "axes.grid": True,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "stiefel",
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def curves(summary: Summary, setting: Setting) -> Figure:
    """Loss and metric against steps and seconds, orthogonality against steps and per layer, for one setting.

    A line is the median over the fresh seeds of each method's best rate, the band their range.
    """
    metric = summary.metric
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 5.6), layout="constrained")
        axes = figure.subplots(2, 3)
        panels = [
            (axes[0, 0], "step", "training steps", lambda r: r["train_loss"], "training loss", True),
            (axes[0, 1], "seconds", "training seconds", lambda r: r["train_loss"], "training loss", True),
            (axes[1, 0], "step", "training steps", lambda r: r["validation"][metric], f"validation {metric}", False),
            (
                axes[1, 1],
                "seconds",
                "training seconds",
                lambda r: r["validation"][metric],
                f"validation {metric}",
                False,
            ),
            (axes[0, 2], "step", "training steps", lambda r: r["orthogonality"]["worst"], "worst ‖XXᵀ−I‖/√p", True),
        ]
        for row in sorted(setting.rows, key=lambda r: r.label):
            runs = [r.metrics() for r in row.final if r.status in ENDED]
            for ax, along, _, value, _, log in panels:
                _band(ax, runs, along, value, log=log, **_style(summary, row.label))
            _layers(axes[1, 2], runs, **_style(summary, row.label))
        for ax, _, xlabel, _, title, log in panels:
            ax.set(title=title, xlabel=xlabel, yscale="log" if log else "linear")
        if setting.target is not None:
            for ax in (axes[1, 0], axes[1, 1]):
                ax.axhline(setting.target, color="#888888", lw=1, ls=(0, (1, 2)), zorder=0)
        for tolerance in TOLERANCES:
            axes[0, 2].axhline(tolerance, color="#888888", lw=1, ls=(0, (1, 2)), zorder=0)
        axes[1, 2].set(title="‖XXᵀ−I‖/√p per layer, at the end", yscale="log", xlabel="constrained layer")
        figure.legend(*_handles(axes[0, 0]), loc="outside lower center", ncols=len(summary.labels))
    return figure


def sensitivity(summary: Summary) -> Figure:
    """Best validation metric against the learning rate, from the tuning runs; crosses at the edge are failed runs."""
    columns = min(4, len(summary.settings))
    rows = -(-len(summary.settings) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(5, 2.9 * columns), 2.7 * rows + 0.4), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for ax, setting in zip(axes.flat, summary.settings, strict=False):
            for row in sorted(setting.rows, key=lambda r: r.label):
                style = _style(summary, row.label)
                good = [(r.spec.lr, r.summary["best_validation"]) for r in row.tuning if r.status in ENDED]
                bad = sorted({r.spec.lr for r in row.tuning if r.status not in ENDED})
                if good:
                    rates = sorted({lr for lr, _ in good})
                    means = [float(np.mean([v for lr, v in good if lr == rate])) for rate in rates]
                    ax.plot(rates, means, marker="o", ms=3.5, **style)
                if bad:
                    edge = 0.03 + 0.04 * summary.labels.index(row.label)  # of the axes, on the side of bad values
                    heights = [edge if summary.higher_is_better else 1 - edge] * len(bad)
                    across = ax.get_xaxis_transform()
                    ax.plot(bad, heights, ls="none", marker="x", ms=4, color=style["color"], transform=across)
            ax.set(title=setting.title, xscale="log", xlabel="learning rate")
        for ax in axes.flat[len(summary.settings) :]:
            ax.set_visible(False)
        for row_axes in axes:
            row_axes[0].set_ylabel(f"best validation {summary.metric}")
        figure.legend(*_handles(*axes.flat), loc="outside lower center", ncols=len(summary.labels))
    return figure


def svg(figure: Figure) -> str:
    """A figure as inline SVG that takes its ink from the page's text colour."""
    stream = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    return re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.S)


def _style(summary: Summary, label: str) -> dict[str, Any]:
    i = summary.labels.index(label)
    colour = COLOURS[i % len(COLOURS)]
    return {"label": label, "color": colour, "ls": STYLES[(i + i // len(COLOURS)) % len(STYLES)]}


def _handles(*axes: Any) -> tuple[list[Any], list[str]]:
    seen: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            seen.setdefault(label, handle)
    return list(seen.values()), list(seen)


def _band(ax: Any, runs: Sequence[list[dict[str, Any]]], along: str, value: Any, *, log: bool, **style: Any) -> None:
    if not runs:
        return
    length = min(len(run) for run in runs)
    y = np.array([[np.nan if value(r) is None else value(r) for r in run[:length]] for run in runs], dtype=float)
    x = np.median([[r[along] for r in run[:length]] for run in runs], axis=0)
    if log:
        y = np.maximum(y, 1e-16)  # an error of exactly zero has no place on a logarithmic axis
    known = ~np.isnan(y).any(axis=0)
    ax.plot(x[known], np.median(y, axis=0)[known], **style)
    ax.fill_between(x[known], y.min(axis=0)[known], y.max(axis=0)[known], color=style["color"], alpha=0.15, lw=0)


def _layers(ax: Any, runs: Sequence[list[dict[str, Any]]], **style: Any) -> None:
    if not runs:
        return
    layers = list(runs[0][-1]["orthogonality"]["layers"])
    errors = [[run[-1]["orthogonality"]["layers"][name] for name in layers] for run in runs]
    ax.plot(range(1, len(layers) + 1), np.maximum(np.median(errors, axis=0), 1e-16), marker="o", ms=3.5, **style)
    ax.set_xticks(range(1, len(layers) + 1))
