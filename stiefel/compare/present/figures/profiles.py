"""Performance profiles over all settings. Imports ``style``, ``profile``."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from stiefel.compare.analyse.profile import profile, times
from stiefel.compare.analyse.summary import Summary
from stiefel.compare.present.figures.style import (
    HIGHLIGHTS,
    STYLE,
    draw_legend,
    grid,
    in_decades,
    label_axis,
    legend_of,
    styles_of,
)


def profiles(summaries: Sequence[Summary]) -> Figure:
    """Performance profiles over all settings of some problems, for steps and for seconds to the target."""
    tables = [profile(times(summaries, "steps")), profile(times(summaries, "seconds"))]
    # By the mean height of the profile for steps: the methods that solve most cases early get the colours.
    ranking = tables[0].mean().sort_values(ascending=False)
    controls = set.union(*(summary.controls for summary in summaries))
    faulty = {label for summary in summaries for label in summary.faults} & set(ranking.index)
    coloured = [label for label in ranking.index if label not in controls | faulty][:HIGHLIGHTS]
    styles = styles_of(coloured, controls & set(ranking.index), ranking.index, sorted(faulty))
    with mpl.rc_context(STYLE):
        figure, axes = grid(1, 2, (4.6, 2.7), legend=list(legend_of(styles)))
        for ax, table, unit in zip(axes.flat, tables, ("steps", "seconds"), strict=True):
            # A profile is constant from its last step on: each line continues at its last height to the right edge.
            far = max(2.0, float(table.index.max()) * 1.1)
            for label in ranking.index:
                ax.step([*table.index, far], [*table[label], table[label].iloc[-1]], where="post", **styles[label])
            label_axis(ax, f"{unit} to the target", "τ, times the fastest", log=False)
            in_decades(ax)
            ax.set(xlim=(1, far), ylim=(-0.03, 1.03))
            ticks = [t for t in (1, 1.5, 2, 3, 5, 10, 20, 50, 100, 1000) if t <= far]
            ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
            ax.xaxis.set_minor_locator(NullLocator())
        axes[0, 0].set_ylabel("fraction of cases solved")
        draw_legend(figure, styles)
    return figure
