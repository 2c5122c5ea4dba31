"""How a monitor's records look: a table, a figure, a live line. Imports ``sinks``, and matplotlib when it plots."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from stiefel.measure.monitor.sinks import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESERVED = frozenset({
    "step", "seconds", "time", "worst", "orthogonality", "shortened", "signal", "gradient_norm", "peak_resident_bytes",
    "gpu_peak_bytes", "gpu_reserved_bytes", "gpu_energy_joules", "gpu_reason", "nonfinite",
})  # fmt: skip
"""Names of a row that are the monitor's own; all others are the user's."""


def seconds_text(seconds: float) -> str:
    """A duration in the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def bytes_text(size: int | None) -> str:
    """A size in MiB."""
    return "—" if size is None else f"{size / 2**20:.0f} MiB"


def table(summary: dict[str, Any], *, opening: bool = False) -> str:
    """What a monitor saw, for a terminal.

    Args:
        summary: of the monitor.
        opening: whether training is in its first second, of which monitoring takes a larger share.
    """
    spread = summary["seconds_per_step"]
    step = "—"
    if spread:
        step = f"{seconds_text(spread['median'])} [{seconds_text(spread['q1'])}, {seconds_text(spread['q3'])}]"
    joules = summary["gpu_energy_joules"]
    gpu = f"GPU {bytes_text(summary['gpu_peak_bytes'])} allocated, {bytes_text(summary['gpu_reserved_bytes'])} reserved"
    share, later = f"{100 * summary['overhead']:.2g} % of the time in steps", summary["later_overhead"]
    if later is not None:
        share = f"{100 * later:.2g} % of the time in steps after the first second, {share} in all"
    elif opening:
        share += ", less after the first second"
    lines = [
        f"steps        {summary['steps']}, {seconds_text(summary['seconds'])} in them",
        f"step time    {step}, median and quartiles",
        f"peak memory  {bytes_text(summary['peak_resident_bytes'])} resident"
        + (f"; {gpu}" if summary["gpu_peak_bytes"] is not None else ""),
        "energy       " + (f"{joules:.4g} J" if joules is not None else f"— ({summary['gpu_reason']})"),
        f"monitoring   {share}",
    ]
    if summary["gradient_norm"] is not None:
        lines.append(f"gradient     ‖P(∂L/∂W)‖ {summary['gradient_norm']:.2g}")
    weights = summary["weights"]
    if not weights:
        none = "none is constrained" if summary["steps"] else "not measured yet"
        return "\n".join([*lines, f"weights      {none}"])
    columns = {
        "weight": list(weights),
        "method": [w["method"] for w in weights.values()],
        "‖XXᵀ−I‖_F/√p now": [f"{w['last']:.1e} at step {w['last_step']}" for w in weights.values()],
        f"worst of {max(w['measured'] for w in weights.values())} measurements": [
            f"{w['worst']:.1e} at step {w['worst_step']}" for w in weights.values()
        ],
    }
    if any(w["shortened"] is not None for w in weights.values()):
        columns["shortened steps"] = [
            "—" if w["shortened"] is None else f"{w['shortened']} of {w['steps']}" for w in weights.values()
        ]
    head, body = tuple(columns), list(zip(*columns.values(), strict=True))
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    text = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in (head, *body)]
    return "\n".join([*lines, "", text[0], "─" * max(map(len, text)), *text[1:]])


class LiveLine:
    """One line of a terminal that is written over and over, never longer than the terminal is wide."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self._shown = 0

    def show(self, text: str) -> None:
        """Replace the line."""
        room = max(1, shutil.get_terminal_size().columns - 1)  # the last column would wrap on some terminals
        text = text if len(text) <= room else text[: room - 1] + "…"
        self.stream.write("\r" + text.ljust(min(self._shown, room)))
        self.stream.flush()
        self._shown = len(text)

    def close(self) -> None:
        """Leave the line as it is and go to the next."""
        if self._shown:
            self.stream.write("\n")
            self.stream.flush()
            self._shown = 0


def live_text(row: Row, worst: float | None, step: int, seconds: float | None) -> str:
    """The live line: step, time per step, the user's numbers, the worst orthogonality."""
    parts = [f"step {step}"]
    if seconds is not None:
        parts.append(f"{seconds_text(seconds)}/step")
    parts += [f"{name} {value:.4g}" for name, value in row.items() if name not in RESERVED]
    if worst is not None:
        parts.append(f"‖XXᵀ−I‖/√p {worst:.1e}")
    return " · ".join(parts)


# Okabe and Ito's palette, distinguishable in all common forms of colour blindness.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C00", "#7F7F7F")
_STYLE: Any = {
    "axes.grid": True,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "font.size": 9,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
}
_MOST_LINES = len(_COLOURS)


History = Mapping[str, Sequence[tuple[int, float]]]


def figure(history: History, rows: list[Row], durations: list[tuple[int, float]]) -> Figure:
    """Three panels against steps: the user's numbers, orthogonality per weight, step time.

    Args:
        history: steps and values of what was logged, by name.
        rows: of the monitor.
        durations: steps and their seconds.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        made = Figure(figsize=(12, 3.6), layout="constrained")
        logged, orthogonality, time = made.subplots(1, 3)
        _logged(logged, history)
        _orthogonality(orthogonality, rows)
        _durations(time, durations)
        for ax in (logged, orthogonality, time):
            ax.set_xlabel("steps")
    return made


def _plot(ax: Axes, points: Iterable[tuple[int, Any]], **style: Any) -> None:
    kept = [(x, y) for x, y in points if y is not None]
    marker = "o" if len(kept) < 30 else None
    ax.plot([x for x, _ in kept], [y for _, y in kept], marker=marker, markersize=3, **style)


def _each_and_mean(ax: Axes, points: Sequence[tuple[int, float]], *, label: str, color: str) -> None:
    """Plot every number; many are pale, under the means of blocks, which the noise of batches would hide."""
    size = max(5, len(points) // 50)
    if len(points) < 60:
        _plot(ax, points, label=label, color=color)
        return
    _plot(ax, points, color=color, alpha=0.35, linewidth=0.8)
    blocks = [points[i : i + size] for i in range(0, len(points) - size + 1, size)]
    means = [(round(_mean(x for x, _ in block)), _mean(y for _, y in block)) for block in blocks]
    _plot(ax, means, label=f"{label}, each and mean of {size}", color=color)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _logged(ax: Axes, history: History) -> None:
    names = list(history)
    ax.set_title(", ".join(names[:_MOST_LINES]) if names else "nothing was logged")
    other = ax.twinx() if len(names) > 1 else None  # an accuracy and a loss differ in scale
    for name, colour in zip(names, _COLOURS, strict=False):
        _each_and_mean(ax if other is None or name == names[0] else other, history[name], label=name, color=colour)
    if other is None and len(ax.lines) > 1:
        ax.legend()
    if other is not None:
        other.grid(visible=False)
        other.spines["right"].set_visible(True)
        ax.set_ylabel(names[0])
        other.set_ylabel(", ".join(names[1:_MOST_LINES]))
        lines = [line for line in (*ax.lines, *other.lines) if not str(line.get_label()).startswith("_")]
        other.legend(handles=lines, loc="center right")


def _orthogonality(ax: Axes, rows: list[Row]) -> None:
    measured = [r for r in rows if r.get("orthogonality")]
    ax.set_title("orthogonality ‖XXᵀ−I‖/√p" if measured else "no weight is constrained")
    if not measured:
        return
    names = list(dict.fromkeys(name for row in measured for name in row["orthogonality"]))
    if len(names) <= _MOST_LINES:
        for name, colour in zip(names, _COLOURS, strict=False):
            points = ((r["step"], r["orthogonality"].get(name)) for r in measured)
            _plot(ax, points, label=name, color=colour)
    else:  # so many lines would hide each other
        steps = [r["step"] for r in measured]
        values = [[v for v in r["orthogonality"].values() if math.isfinite(v)] or [math.nan] for r in measured]
        low, high = [min(v) for v in values], [max(v) for v in values]
        ax.fill_between(steps, low, high, color=_COLOURS[0], alpha=0.25, lw=0, label=f"range of {len(names)} weights")
        _plot(ax, zip(steps, high, strict=True), color=_COLOURS[0], label="worst")
    positive = [v for r in measured for v in r["orthogonality"].values() if v > 0]
    if positive:
        ax.set_yscale("log")  # over whole decades, so that rounding does not look like a trend
        ax.set_ylim(*(10.0 ** side(math.log10(v)) for side, v in ((_floor, min(positive)), (_ceil, max(positive)))))
    ax.legend()


# A fifth of a decade between the curves and the edges of the panel.
def _floor(x: float) -> int:
    return math.floor(x - 0.2)


def _ceil(x: float) -> int:
    return math.ceil(x + 0.2)


def _durations(ax: Axes, durations: list[tuple[int, float]]) -> None:
    ax.set_title("step time")
    ax.set_ylabel("ms")
    if not durations:
        return
    values = sorted(1e3 * s for _, s in durations)
    median = values[len(values) // 2]
    ax.plot([n for n, _ in durations], [1e3 * s for _, s in durations], ".", ms=2, color=_COLOURS[0], alpha=0.5)
    ax.axhline(median, color=_COLOURS[1], lw=1.2)
    # The first step and a stray one would squeeze all others onto the axis.
    top = 1.5 * values[int(0.98 * (len(values) - 1))]
    above = sum(v > top for v in values)
    rest = f"\nnot shown: {above} of {len(values)}, above {seconds_text(top / 1e3)}" if above else ""
    ax.set_ylim(0, top)
    ax.set_title(f"step time, median {seconds_text(median / 1e3)}{rest}")
