"""The looks that all figures share: colours, lines, legends, grids of axes. Imports ``summary``, matplotlib."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from stiefel.compare.analyse.rows import TOLERANCES
from stiefel.compare.analyse.summary import Summary, dagger

# Okabe and Ito's palette, distinguishable in all common forms of colour blindness; line styles distinguish further.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C00")


STYLES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)))  # dotted are those with known faults


WIDTHS = (3.0, 2.5, 2.1, 1.8, 1.5, 1.3, 1.1)


HIGHLIGHTS = len(COLOURS)
"""Methods in colour, beside the control; where there are more, the others are thin and grey."""


GREY = "#888888"


INK = "#010203"  # replaced by the page's text colour


POWERS = FuncFormatter(lambda value, _: f"{value:g}" if 9e-3 < value < 1e4 else f"{value:.0e}".replace("e-0", "e-"))


_CONTROLS: tuple[dict[str, Any], ...] = (
    {"color": INK, "ls": (0, (4, 2)), "lw": 1.1, "zorder": 2.5},
    {"color": "#777777", "ls": (0, (1, 1, 5, 1)), "lw": 1.1, "zorder": 2.4},
)
"""From the last by name: what has a start like the methods', then the network as it is."""


_FAULTY: dict[str, Any] = {"ls": (0, (1, 1.4)), "lw": 1.4, "alpha": 0.8, "zorder": 2.7}


OTHER: dict[str, Any] = {"color": GREY, "lw": 0.6, "alpha": 0.6, "zorder": 2, "label": "_other"}


PLAIN: Any = {"parse_math": False}
"""Names are a user's, and no TeX: a dollar sign in one would end the whole report."""


STYLE: Any = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titley": 1.0,  # fixed: finding a place for it takes a tenth of the time
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 9,
    "font.sans-serif": ["DejaVu Sans"],
    "grid.alpha": 0.25,
    "grid.color": GREY,
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


def short_name(label: str) -> str:
    """A method's name, cut where a legend would become wide."""
    return label if len(label) < 27 else label[:25] + "…"


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
                # A first place, at any tolerance, is worth as many ranks as there are methods.
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
    ax.set_title(title, **PLAIN)
    if xlabel:
        ax.set_xlabel(xlabel, **PLAIN)
    if log:
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        if ax.has_data():
            ax.yaxis.set_major_locator(LogLocator(numticks=6) if high > 30 * low else MaxNLocator(4))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(POWERS)


def widen(ax: Any, factor: float, axis: str = "y") -> None:
    """Let a logarithmic axis span at least a factor: small differences are not to fill it."""
    low, high = getattr(ax, f"get_{axis}lim")()
    if low > 0 and high / low < factor:
        more = math.sqrt(factor * low / high)
        getattr(ax, f"set_{axis}lim")(low / more, high * more)


def in_decades(ax: Any) -> None:
    """A logarithmic axis below, without minor ticks."""
    ax.set_xscale("log")
    ax.xaxis.set_minor_locator(NullLocator())


def target_line(ax: Any, height: float) -> None:
    """A dotted line across a panel, where it shows something."""
    if ax.has_data():  # alone, two lines make no axis
        ax.axhline(height, color=GREY, lw=1, ls=(0, (1, 2)), zorder=1)


def method_styles(summary: Summary) -> dict[str, dict[str, Any]]:
    """How each method of a comparison is drawn."""
    return styles_of(highlighted(summary), summary.controls, summary.labels, sorted(summary.faults))


def styles_of(
    coloured: Sequence[str], controls: Iterable[str], labels: Iterable[str], faulty: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """How each method's line is drawn: those in colour over the control over the others; dotted, with known faults."""
    styles = {label: dict(OTHER) for label in labels}
    for i, label in enumerate(sorted(controls, reverse=True)):
        styles[label] = {"label": label, **_CONTROLS[min(i, 1)]}
    for i, label in enumerate(faulty):
        styles[label] = {"label": dagger(label), "color": COLOURS[i % len(COLOURS)], **_FAULTY}
    for i, label in enumerate(coloured):
        # Thick lines below thin ones: methods whose curves are equal are seen both.
        look = {"color": COLOURS[i], "ls": STYLES[i % len(STYLES)], "lw": WIDTHS[i], "zorder": 3 + i / 10}
        styles[label] = {"label": label, **look}
    return styles


def legend_of(styles: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A legend's entries with how they are drawn, those without a colour as one."""
    shown = {style["label"]: style for style in styles.values() if style["label"] != OTHER["label"]}
    others = len(styles) - len(shown)
    return shown | ({f"{others} others": OTHER} if others else {})


def spans_decades(summary: Summary) -> bool:
    """Whether the metric spans over two decades, as a loss may, and needs a logarithmic axis."""
    values = [t.validation for s in summary.settings for row in s.rows for t in row.trials]
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) / min(finite) > 100
