"""The figures of a comparison. Imports ``summary``, ``profile``, numpy, matplotlib."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from stiefel.compare.profile import profile, times
from stiefel.compare.rows import TOLERANCES, Row, Trial, number
from stiefel.compare.summary import Setting, Summary, dagger

# Okabe and Ito's palette, distinguishable in all common forms of colour blindness; line styles tell the rest.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C00")
STYLES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)))  # dotted are those with known faults
HIGHLIGHTS = len(COLOURS)
"""Methods in colour, beside the control; where there are more, the others are thin and grey."""
_GREY = "#888888"
INK = "#010203"  # replaced by the page's text colour
_POWERS = FuncFormatter(lambda value, _: f"{value:g}" if 9e-3 < value < 1e4 else f"{value:.0e}".replace("e-0", "e-"))
_CONTROL: dict[str, Any] = {"color": INK, "ls": (0, (4, 2)), "lw": 1.1, "zorder": 2.5}
_FAULTY: dict[str, Any] = {"ls": (0, (1, 1.4)), "lw": 1.4, "alpha": 0.8, "zorder": 2.7}
_OTHER: dict[str, Any] = {"color": _GREY, "lw": 0.6, "alpha": 0.6, "zorder": 2, "label": "_other"}

STYLE: Any = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titley": 1.0,  # where it is not looked for: that takes a tenth of the time
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 9,
    "font.sans-serif": ["DejaVu Sans"],
    "grid.alpha": 0.25,
    "grid.color": _GREY,
    "axes.grid": True,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "stiefel",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def curves(summary: Summary, setting: Setting) -> Figure:
    """Loss and metric against steps and seconds, orthogonality against steps and per layer, for one setting.

    A line is the median over the fresh seeds of each method's choice, the band their range.
    """
    names = {
        "train_loss": "training loss",
        "validation": f"validation {summary.metric}",
        "error": "worst ‖XXᵀ−I‖/√p",
    }
    panels = [("step", "train_loss"), ("seconds", "train_loss"), ("step", "error")]
    panels += [("step", "validation"), ("seconds", "validation")]
    styles, wide = method_styles(summary), _wide(summary)
    with mpl.rc_context(STYLE):
        figure, axes = grid(2, 3, (3.6, 2.5), legend=list(legend_of(styles)))
        for row in setting.rows:
            data, style = _series(row, summary.metric), styles[row.label]
            for ax, (along, what) in zip(axes.flat, panels, strict=False):
                _band(ax, data, along, what, style, log=what != "validation" or wide)
            _per_layer(axes[1, 2], row, style)
        for ax, (along, what) in zip(axes.flat, panels, strict=False):
            log = what != "validation" or wide
            label_axis(ax, names[what], f"training {'steps' if along == 'step' else along}", log=log)
            if what == "validation" and setting.target is not None:
                _line(ax, setting.target)
        label_axis(axes[1, 2], "‖XXᵀ−I‖/√p per layer, at the end", "constrained layer", log=True)
        for ax in axes[:, 2]:
            for tolerance in TOLERANCES:
                _line(ax, tolerance)
        draw_legend(figure, styles)
    return figure


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
                colour, style = COLOURS[i % len(COLOURS)], STYLES[i // len(COLOURS) % len(STYLES)]
                plain = [t for t in row.trials if not t.choice.knobs]
                good = [(t.choice.lr, t.validation) for t in plain if math.isfinite(t.validation)]
                bad = [t.choice.lr for t in plain if not math.isfinite(t.validation)]
                ax.plot(*zip(*good, strict=True), color=colour, ls=style, marker="o", ms=2.5, lw=1.2) if good else None
                if bad:
                    edge = 0.05 + min(0.08, 0.6 / len(summary.settings)) * i  # of the axes, on the side of bad values
                    edges = [edge if summary.higher_is_better else 1 - edge] * len(bad)
                    ax.plot(bad, edges, ls="", marker="x", ms=4, color=colour, transform=ax.get_xaxis_transform())
                if row.tuned is not None and math.isfinite(row.tuned.validation):
                    ring = {"ms": 7, "mfc": "none", "mec": colour}
                    ax.plot([row.tuned.choice.lr], [row.tuned.validation], marker="o", **ring)
            label_axis(ax, titles[label], "", log=_wide(summary))
            _decades(ax)
            ax.xaxis.set_major_formatter(_POWERS)
        for ax in axes.flat[len(found) :]:
            ax.set_visible(False)
        for ax in axes.flat[max(0, len(found) - columns) : len(found)]:
            ax.set_xlabel("learning rate")
            ax.tick_params(labelbottom=True)
        for ax in axes[:, 0]:
            ax.set_ylabel(f"validation {summary.metric}")
        handles = [
            Line2D([], [], color=COLOURS[i % len(COLOURS)], ls=STYLES[i // len(COLOURS) % len(STYLES)])
            for i in range(len(summary.settings))
        ]
        _bottom(figure, handles, [setting.title for setting in summary.settings])
    return figure


def defaults(summary: Summary) -> Figure:
    """Validation metric of each method at its default setting (hollow) and as tuned (full): a panel per setting."""
    columns, labels = min(4, len(summary.settings)), summary.labels[::-1]
    size = (2.6, 0.3 + 0.17 * len(labels))
    with mpl.rc_context(STYLE):
        marks = ["default rate and knobs", "tuned"]
        figure, axes = grid(-(-len(summary.settings) // columns), columns, size, legend=marks, margin=1.5, between=0.25)
        for ax, setting in zip(axes.flat, summary.settings, strict=False):
            known = {row.label: (_validation(row.default), _validation(row.tuned)) for row in setting.rows}
            before, after = np.array([known.get(label, (math.nan, math.nan)) for label in labels]).T
            heights = np.arange(len(labels))
            ax.hlines(heights, before, after, color=COLOURS[0], lw=1)
            ax.plot(before, heights, ls="", marker="o", ms=4.5, mfc="none", mec=COLOURS[0])
            ax.plot(after, heights, ls="", marker="o", ms=4.5, color=COLOURS[0])
            ax.set(title=setting.title, xlabel=f"validation {summary.metric}", ylim=(-0.7, len(labels) - 0.3))
            ax.set_yticks([])
            ax.hlines(heights, 0, 1, transform=ax.get_yaxis_transform(), color=_GREY, alpha=0.25, lw=0.8)
            if _wide(summary):
                _decades(ax)
            else:
                ax.xaxis.set_major_locator(MaxNLocator(4))
        for ax in axes[:, 0]:
            ax.set_yticks(range(len(labels)), [_short(summary.marked(label)) for label in labels])
        for ax in axes.flat[len(summary.settings) :]:
            ax.set_visible(False)
        hollow, full = (Line2D([], [], ls="", marker="o", mfc=c, mec=COLOURS[0]) for c in ("none", COLOURS[0]))
        _bottom(figure, [hollow, full], marks)
    return figure


def _short(label: str) -> str:
    return label if len(label) < 25 else label[:23] + "…"


def _validation(trial: Trial | None) -> float:
    return trial.validation if trial is not None and math.isfinite(trial.validation) else math.nan


def profiles(summaries: Sequence[Summary]) -> Figure:
    """Performance profiles over all settings of some problems, for steps and for seconds to the target."""
    tables = [profile(times(summaries, "steps")), profile(times(summaries, "seconds"))]
    ranking = tables[0].mean().sort_values(ascending=False)
    controls = set.union(*(summary.controls for summary in summaries))
    faulty = {label for summary in summaries for label in summary.faults} & set(ranking.index)
    coloured = [label for label in ranking.index if label not in controls | faulty][:HIGHLIGHTS]
    styles = styles_of(coloured, controls & set(ranking.index), ranking.index, sorted(faulty))
    with mpl.rc_context(STYLE):
        figure, axes = grid(1, 2, (4.6, 2.7), legend=list(legend_of(styles)))
        for ax, table, unit in zip(axes.flat, tables, ("steps", "seconds"), strict=True):
            far = max(2.0, float(table.index.max()) * 1.1)
            for label in ranking.index:
                ax.step([*table.index, far], [*table[label], table[label].iloc[-1]], where="post", **styles[label])
            label_axis(ax, f"{unit} to the target", "τ, times the fastest", log=False)
            _decades(ax)
            ax.set(xlim=(1, far), ylim=(-0.03, 1.03))
            ticks = [t for t in (1, 1.5, 2, 3, 5, 10, 20, 50, 100, 1000) if t <= far]
            ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
            ax.xaxis.set_minor_locator(NullLocator())
        axes[0, 0].set_ylabel("fraction of cases solved")
        draw_legend(figure, styles)
    return figure


def highlighted(summary: Summary) -> list[str]:
    """Methods in colour: all where they are few, else the best of each setting and tolerance and the next by rank."""
    others = [label for label in summary.labels if label not in summary.controls and label not in summary.faults]
    if len(others) <= HIGHLIGHTS:
        return others
    places = dict.fromkeys(others, 0.0)
    for setting in summary.settings:
        for row in setting.rows:
            if row.label in places:
                ranks = [setting.rank(row, tolerance) for tolerance in (None, *TOLERANCES)]
                first = len(others) * (1 in ranks)
                places[row.label] += (ranks[0] or 2 * len(others)) - first
    return sorted(sorted(others, key=lambda label: places[label])[:HIGHLIGHTS])


def svg(figure: Figure) -> str:
    """A figure as inline SVG that takes its ink from the page's text colour, as small as that goes."""
    stream = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r"\s*<metadata>.*?</metadata>|\s*<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # nothing refers to groups, and ids must be unique in a page
    text = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d\.\d)\d+", r"\1", tag[0]), text)  # tenths of a point
    text = re.sub(r"\s*\n\s*", " ", text)
    return re.sub(r" ?([MLC]) ", r"\1", text).replace("> <", "><")


def grid(
    rows: int,
    columns: int,
    size: tuple[float, float],
    *,
    legend: Sequence[str],
    room: int = 0,
    titles: int = 1,
    share: bool = False,
    margin: float = 0.6,
    between: float | None = None,
) -> tuple[Figure, Any]:
    """Panels of a size in inches, room for their labels, and below for a legend with these entries.

    The layout is fixed: one that adapts draws everything twice. ``room`` is the least number of the legend's lines,
    ``titles`` the number of lines of the panels' titles.
    """
    between = between or (0.2 if share else margin)
    lines = max(room, -(-len(legend) // columns_of(columns * size[0], legend)))
    more = 0.16 * (titles - 1)
    below, above, gap = 0.5 + 0.2 * lines, 0.3 + more, (0.35 if share else 0.75) + more
    width = margin + columns * size[0] + (columns - 1) * between + 0.1
    height = above + rows * size[1] + (rows - 1) * gap + below
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share)
    ends = {"left": margin / width, "right": 1 - 0.1 / width, "bottom": below / height, "top": 1 - above / height}
    figure.subplots_adjust(**ends, wspace=between / size[0], hspace=gap / size[1])
    return figure, axes


def columns_of(width: float, labels: Sequence[str]) -> int:
    """Entries of a legend beside each other, in so many inches."""
    return max(1, int(width / (0.6 + 0.068 * max(map(len, labels), default=0))))


def wrapped(label: str, width: int = 26) -> str:
    """A name in lines, broken after colons and commas where it is long."""
    lines = [""]
    for part in re.findall(r"[^:,]+[:,]?", label):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def label_axis(ax: Any, title: str, xlabel: str, *, log: bool) -> None:
    """A panel's title, what runs along it, and a logarithmic height where that is asked for."""
    ax.set_title(title)
    if xlabel:
        ax.set_xlabel(xlabel)
    if log:
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        if ax.has_data():
            ax.yaxis.set_major_locator(LogLocator(numticks=6) if high > 30 * low else MaxNLocator(4))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(_POWERS)


def _decades(ax: Any) -> None:
    """A logarithmic axis below, without minor ticks."""
    ax.set_xscale("log")
    ax.xaxis.set_minor_locator(NullLocator())


def _line(ax: Any, height: float) -> None:
    if ax.has_data():  # alone, two lines make no axis
        ax.axhline(height, color=_GREY, lw=1, ls=(0, (1, 2)), zorder=1)


def method_styles(summary: Summary) -> dict[str, dict[str, Any]]:
    """How each method of a comparison is drawn."""
    return styles_of(highlighted(summary), summary.controls, summary.labels, sorted(summary.faults))


def styles_of(
    coloured: Sequence[str], controls: Iterable[str], labels: Iterable[str], faulty: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """How each method's line is drawn: those in colour over the control over the others; dotted, with known faults."""
    styles = {label: dict(_OTHER) for label in labels}
    styles |= {label: {"label": label, **_CONTROL} for label in controls}
    for i, label in enumerate(faulty):
        styles[label] = {"label": dagger(label), "color": COLOURS[i % len(COLOURS)], **_FAULTY}
    for i, label in enumerate(coloured):
        styles[label] = {"label": label, "color": COLOURS[i], "ls": STYLES[i % len(STYLES)], "zorder": 3}
    return styles


def draw_legend(figure: Figure, styles: dict[str, dict[str, Any]]) -> None:
    """The methods' names along the foot of a figure, those without a colour as one."""
    shown = legend_of(styles)
    _bottom(figure, [Line2D([], [], **style) for style in shown.values()], list(shown))


def legend_of(styles: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A legend's entries with how they are drawn."""
    shown = {style["label"]: style for style in styles.values() if style["label"] != _OTHER["label"]}
    others = len(styles) - len(shown)
    return shown | ({f"{others} others": _OTHER} if others else {})


def _bottom(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    columns = min(columns_of(figure.get_size_inches()[0], labels), len(labels))
    figure.legend(handles, labels, loc="lower center", ncols=columns, borderaxespad=0.1)


def _wide(summary: Summary) -> bool:
    """Whether the metric spans so much that it wants a logarithmic axis, as a loss may."""
    values = [t.validation for s in summary.settings for row in s.rows for t in row.trials]
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) / min(finite) > 100


def _series(row: Row, metric: str) -> dict[str, Any]:
    """A method's curves as arrays (run, point); empty where there is none."""
    if not row.curves:
        return {}
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
    known = ~np.isnan(y).any(axis=0)
    x, y = np.median(data[along], axis=0)[known], y[:, known]
    ax.plot(x, np.median(y, axis=0), **style)
    if len(y) > 1 and style["label"] != _OTHER["label"]:
        ax.fill_between(x, y.min(axis=0), y.max(axis=0), color=style["color"], alpha=0.13, lw=0)


def _per_layer(ax: Any, row: Row, style: dict[str, Any]) -> None:
    layers = [[number(value) for value in end["orthogonality"]["layers"].values()] for end in row.ends]
    if not layers:
        return
    heights = np.maximum(np.median(np.array(layers), axis=0), 1e-16)
    ax.plot(range(1, len(heights) + 1), heights, marker="o", ms=3, **style)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    ax.set_xlim(min(ax.get_xlim()[0], 0.5), max(ax.get_xlim()[1], len(heights) + 0.5))
