"""Performance profiles over all settings. Imports ``style``, ``sheet``, ``profile``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pandas as pd
from matplotlib.ticker import NullLocator

from stiefel.compare.analyse.profile import profile, times
from stiefel.compare.analyse.summary import Summary
from stiefel.compare.present.figures.sheet import Panel, Sheet
from stiefel.compare.present.figures.style import HIGHLIGHTS, in_decades, label_axis, legend_of, styles_of

TICKS = (1, 1.5, 2, 3, 5, 10, 20, 50, 100, 1000)


def profiles(summaries: Sequence[Summary]) -> Sheet:
    """Performance profiles over all settings of some problems, for steps and for seconds to the target."""
    tables = {unit: profile(times(summaries, unit)) for unit in ("steps", "seconds")}
    # By the mean height of the profile for steps: the methods that solve most cases early get the colours.
    ranking = tables["steps"].mean().sort_values(ascending=False)
    controls = set.union(*(summary.controls for summary in summaries))
    faulty = {label for summary in summaries for label in summary.faults} & set(ranking.index)
    coloured = [label for label in ranking.index if label not in controls | faulty][:HIGHLIGHTS]
    styles = styles_of(sorted(coloured), controls & set(ranking.index), ranking.index, sorted(faulty))

    def draw(table: pd.DataFrame, unit: str, ax: Any) -> None:
        # A profile is constant from its last step on: each line continues at its last height to the right edge.
        far = max(2.0, float(table.index.max()) * 1.1)
        for label in ranking.index:
            ax.step([*table.index, far], [*table[label], table[label].iloc[-1]], where="post", **styles[label])
        label_axis(ax, f"{unit} to the target", "τ, times the fastest", log=False)
        in_decades(ax)
        ax.set(xlim=(1, far), ylim=(-0.03, 1.03), ylabel="fraction of cases solved")
        ticks = [t for t in TICKS if t <= far]
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.xaxis.set_minor_locator(NullLocator())

    panels = tuple(Panel(partial(draw, table, unit), (4.3, 2.7)) for unit, table in tables.items())
    return Sheet(panels, columns=2, legend=legend_of(styles))
