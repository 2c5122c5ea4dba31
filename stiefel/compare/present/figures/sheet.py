"""Figures as sheets of panels: one figure for a file, or panels for a page that lets them flow. Imports ``style``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from stiefel.compare.present.figures.style import PLAIN, STYLE, columns_of, short_name, svg

LETTER = 0.085
"""Inches of a letter of a label."""
LINE = 0.15
"""Inches between labels at the ends of lines."""


@dataclass(frozen=True)
class Panel:
    """One chart.

    Args:
        draw: into axes.
        size: of the axes, in inches.
        left, right, above, below: inches around them, for labels.
    """

    draw: Callable[[Any], None]
    size: tuple[float, float] = (3.2, 2.2)
    left: float = 0.65
    right: float = 0.12
    above: float = 0.3
    below: float = 0.5

    @property
    def extent(self) -> tuple[float, float]:
        """Width and height with what is around."""
        return self.left + self.size[0] + self.right, self.above + self.size[1] + self.below

    def into(self, figure: Figure, x: float, y: float) -> Any:
        """Draw into a figure, with the lower left corner at a place in inches; returns the axes."""
        wide, high = figure.get_size_inches()
        ends = ((x + self.left) / wide, (y + self.below) / high, self.size[0] / wide, self.size[1] / high)
        ax = figure.add_axes(ends)
        self.draw(ax)
        return ax


@dataclass(frozen=True)
class Sheet:
    """A figure that answers one question.

    Args:
        panels: its charts.
        columns: how many of them are side by side in a file.
        legend: entries that hold for all panels, with the style of each line.
    """

    panels: tuple[Panel, ...]
    columns: int = 3
    legend: dict[str, dict[str, Any]] = field(default_factory=dict)

    def figure(self) -> Figure:
        """All panels, row by row, with the legend at the foot."""
        rows = [self.panels[i : i + self.columns] for i in range(0, len(self.panels), self.columns)]
        widths = [max(row[i].extent[0] for row in rows if i < len(row)) for i in range(len(rows[0]))]
        heights = [max(panel.extent[1] for panel in row) for row in rows]
        columns = min(columns_of(sum(widths), list(self.legend)), len(self.legend) or 1)
        foot = 0.2 * -(-len(self.legend) // columns) + (0.1 if self.legend else 0.0)
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(sum(widths), sum(heights) + foot))
            top = sum(heights) + foot
            for row, height in zip(rows, heights, strict=True):
                for i, panel in enumerate(row):
                    panel.into(figure, sum(widths[:i]), top - panel.extent[1])
                top -= height
            if self.legend:
                lines = [Line2D([], [], **style) for style in self.legend.values()]
                made = figure.legend(lines, list(self.legend), loc="lower center", ncols=columns, borderaxespad=0.1)
                for text in made.get_texts():
                    text.set(**PLAIN)
        return figure

    def drawings(self) -> list[tuple[str, int]]:
        """Each panel as SVG, with its width in pixels of a page, at which its letters have the page's size."""
        found = []
        for panel in self.panels:
            with mpl.rc_context(STYLE):
                figure = Figure(figsize=panel.extent)
                panel.into(figure, 0.0, 0.0)
            found.append((svg(figure), round(96 * panel.extent[0])))
        return found


def room_for(labels: list[str]) -> float:
    """Inches that labels beside a panel need."""
    return 0.15 + LETTER * max((len(short_name(label)) for label in labels), default=0)


def label_ends(ax: Any, ends: dict[str, tuple[float, dict[str, Any]]]) -> None:
    """Write names beside a panel, each as near to the height of its line's end as the others allow.

    Args:
        ax: whose limits are set.
        ends: height in data and style of the line, by name.
    """
    high = ax.get_position().height * ax.figure.get_size_inches()[1]
    to_axes = ax.transData + ax.transAxes.inverted()
    known = {name: (end, style) for name, (end, style) in ends.items() if np.isfinite(end)}
    wanted = {name: high * float(to_axes.transform((1.0, end))[1]) for name, (end, _) in known.items()}
    for name, height in spread(wanted, LINE, high).items():
        style = known[name][1]
        ax.text(
            1.02, height / high, short_name(name), transform=ax.transAxes, color=style["color"], va="center", **PLAIN
        )


def spread(wanted: dict[str, float], gap: float, top: float) -> dict[str, float]:
    """Heights at least a gap apart and, where there is room, between 0 and the top; each near the wanted one."""
    names = sorted(wanted, key=lambda name: wanted[name])
    # Neighbours that are too close become a block around their mean; blocks that then touch are joined.
    blocks: list[list[str]] = []
    for name in names:
        blocks.append([name])
        while len(blocks) > 1 and _ends(blocks[-1], wanted, gap, top)[0] < _ends(blocks[-2], wanted, gap, top)[1] + gap:
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    return {name: _ends(block, wanted, gap, top)[0] + gap * i for block in blocks for i, name in enumerate(block)}


def _ends(block: list[str], wanted: dict[str, float], gap: float, top: float) -> tuple[float, float]:
    half = gap * (len(block) - 1) / 2
    middle = float(np.mean([min(max(wanted[name], 0.0), top) for name in block]))
    middle = max(min(middle, top - half), half)
    return middle - half, middle + half
