"""The records as one picture. Imports matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from costs.maps import PRODUCT, REFERENCE
from costs.sections import Record

Panel = Callable[[Axes], None]

# Okabe and Ito's palette; ours are filled, peers open, what maps are measured by black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C00", "#555555")
OURS, PEERS = "ov^Dph", "sXP*8d"
"""Filled and open marks, of which each round through the colours takes the next."""
STYLE: Any = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",
    "svg.hashsalt": "stiefel",
}
SHOWN = {
    "maps": ("own", "oni", "bjorck", "cayley", "matrix_exp", "householder", REFERENCE, "torch matrix_exp",
             "torch cayley", "torch householder", "geotorch expm", "orthogonium Björck"),
    "steps": ("riemannian", "riemannian canonical Cayley", "retraction", "projection", "landing", "pogo", "spel",
              "manifold_muon", "geoopt Stiefel", "geoopt CanonicalStiefel", "pogo-torch", "pogo-torch, stacked"),
}  # fmt: skip
_PLAIN = FuncFormatter(lambda value, _: f"{value:g}" if 1e-3 <= value < 1e5 else f"{value:.0e}".replace("e-0", "e-"))


def draw(records: Sequence[Record], folder: Path) -> None:
    """Write ``cost.png`` and ``cost.svg``: a panel per section measured, three for scaling, in logarithmic units."""
    timed = [r for r in records if r["status"] == "timed"]
    with mpl.rc_context(STYLE):
        panels = [*_dotted(timed), *_scaled(timed)]
        rows, columns = -(-len(panels) // 2), min(2, len(panels))
        if not panels:
            return
        figure = Figure(figsize=(7.5 * columns, 4.6 * rows), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for ax, panel in zip(axes, panels, strict=False):
            panel(ax)
        for ax in axes[len(panels) :]:
            ax.remove()
        r = records[0]
        where = r["gpu"] or f"{r['cpu']}, {r['threads']} threads"
        figure.suptitle(
            f"What orthogonality costs. {where}; {r['dtype']}; torch {r['torch']}. Medians, with quartiles where\n"
            "visible. Filled: this library; open: other packages.",
            x=0.01, ha="left", fontsize=10,
        )  # fmt: skip
        figure.savefig(folder / "cost.png", dpi=110)
        figure.savefig(folder / "cost.svg", metadata={"Date": None})


def _dotted(timed: Sequence[Record]) -> Iterator[Panel]:
    """Panels of sections by cases."""
    for section, title, label in (
        ("maps", "Maps: forward and backward", "batched p×n · n×p products"),
        ("steps", "Steps, gradients given", "batched p×n · n×p products"),
        ("training", "Whole training steps", "times the unconstrained step"),
    ):
        found = [r for r in timed if r["section"] == section and r["units_median"]]
        found = [r for r in found if r.get("condition") in (2.0, None)]
        if section in SHOWN:
            found = [r for r in found if r["candidate"] in SHOWN[section]]
        else:
            found = [r for r in found if r["candidate"] != r["unit"]]
        if found:
            yield partial(_dots, found=found, shown=SHOWN.get(section, ()), title=title, label=label)


def _scaled(timed: Sequence[Record]) -> Iterator[Panel]:
    """Panels of the scaling in a number."""
    for along, key, title, label in (
        ("count", "count", "Scaling in the number of 16×64 matrices", "matrices"),
        ("p, n = p", "p", "Scaling in p, four square matrices", "p = n"),
        ("p, n = 4p", "p", "Scaling in p, four matrices p×4p", "p"),
    ):
        found = [r for r in timed if r["section"] == "scaling" and r["along"] == along]
        if found:
            yield partial(_scaling, found=found, key=key, title=title, label=label)


def _dots(ax: Axes, found: Sequence[Record], shown: Sequence[str], title: str, label: str) -> None:
    """Cases down, time across, a mark per candidate."""
    cases = list(dict.fromkeys(r["case"] for r in found))
    names = [c for c in shown if any(r["candidate"] == c for r in found)]
    names = names or list(dict.fromkeys(r["candidate"] for r in found))
    for i, name in enumerate(names):
        mine = [r for r in found if r["candidate"] == name]
        shift = 0.7 * (i / max(1, len(names) - 1) - 0.5)
        rows = [cases.index(r["case"]) + shift for r in mine]
        medians = [r["units_median"] for r in mine]
        spread = [[r["units_median"] - r["units_q1"] for r in mine], [r["units_q3"] - r["units_median"] for r in mine]]
        ax.errorbar(medians, rows, xerr=spread, **_mark(name, mine[0]["who"], i), ls="none", elinewidth=0.8, label=name)
    ax.set_yticks(range(len(cases)), [case.replace(", ", "\n") for case in cases])
    ax.set_ylim(len(cases) - 0.5, -0.5)
    for edge in range(1, len(cases)):
        ax.axhline(edge - 0.5, color="#bbbbbb", lw=0.6)
    ax.grid(axis="y", visible=False)
    ax.set_xscale("log")
    _log(ax.xaxis)
    ax.set(title=title, xlabel=label)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _scaling(ax: Axes, found: Sequence[Record], key: str, title: str, label: str) -> None:
    for i, name in enumerate(dict.fromkeys(r["candidate"] for r in found)):
        mine = [r for r in found if r["candidate"] == name]
        xs, ys = [r[key] for r in mine], [r["seconds_median"] * 1e3 for r in mine]
        if name == PRODUCT:
            ax.plot(xs, ys, color="black", ls=":", label="one batched product")
            continue
        style = "-" if mine[0]["who"] == "ours" else "--"
        ax.plot(xs, ys, ls=style, lw=1.2, **_mark(name, mine[0]["who"], i - 1), label=name)
        low, high = ([r[f"seconds_{q}"] * 1e3 for r in mine] for q in ("q1", "q3"))
        ax.fill_between(xs, low, high, color=COLOURS[(i - 1) % len(COLOURS)], alpha=0.12, lw=0)
    ax.set(xscale="log", yscale="log", title=title, xlabel=label, ylabel="milliseconds")
    _log(ax.yaxis)
    values = sorted({r[key] for r in found})
    ax.set_xticks(values, [str(v) for v in values])
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _mark(name: str, who: str, i: int) -> dict[str, Any]:
    colour = "black" if name == REFERENCE else COLOURS[i % len(COLOURS)]
    shape = (OURS if who == "ours" else PEERS)[i // len(COLOURS) % len(OURS)]
    return {"color": colour, "marker": shape, "ms": 5, "mfc": colour if who == "ours" else "white"}


def _log(axis: mpl.axis.Axis) -> None:
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0) if high < 20 * low else (1.0,), numticks=12))
    axis.set_major_formatter(_PLAIN)
    axis.set_minor_formatter(NullFormatter())
