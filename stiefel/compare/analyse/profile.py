"""Performance profiles (E. Dolan and J. Moré, 2002, "Benchmarking optimization software with performance profiles").

A case is one setting of one problem. ρ(τ) of a method is the fraction of all cases that it solves within τ times what
the fastest method of that case needs. Imports ``summary``, numpy and pandas.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import pandas as pd

from stiefel.compare.analyse.rows import Row
from stiefel.compare.analyse.summary import Summary

Unit = Literal["steps", "seconds"]


def times(summaries: Sequence[Summary], unit: Unit) -> pd.DataFrame:
    """Median steps or seconds to the target: a row per case, a column per method.

    Infinite where the median run failed, missed the target or was skipped; NaN where the method was not run. Cases
    without a target are left out.
    """
    rows = {}
    # One problem in two precisions is two cases.
    dtypes = Counter(summary.problem for summary in summaries)
    for summary in summaries:
        for setting in summary.settings:
            if setting.target is not None:
                name = f"{summary.problem}, {setting.title}" if len(summaries) > 1 else setting.title
                if dtypes[summary.problem] > 1:
                    name += f", {summary.dtype}"
                rows[name] = {row.label: _time(row, unit) for row in setting.rows}
    frame = pd.DataFrame.from_dict(rows, orient="index", dtype=float)
    return frame[sorted(frame.columns)]


def profile(table: pd.DataFrame, factors: Iterable[float] | None = None) -> pd.DataFrame:
    """ρ(τ): a row per τ, a column per method that was run in every case.

    Args:
        table: as :func:`times` gives it.
        factors: values of τ; by default every one at which a profile rises.
    """
    known = table.dropna(axis="columns")  # (case, method)
    best = known.min(axis="columns")
    # Cases that no method solves are left out here, where ∞/∞ would be NaN; the number of cases below counts them.
    solved = known[np.isfinite(best)].div(best[np.isfinite(best)], axis="index")  # ∞ stays ∞
    if factors is None:
        values = solved.to_numpy().ravel()
        # ρ is a step function that rises only at these ratios; 1.0 is where it starts.
        factors = sorted({1.0, *values[np.isfinite(values)]})
    return pd.DataFrame({tau: (solved <= tau).sum() / max(1, len(known)) for tau in factors}).T.rename_axis("tau")


def _time(row: Row, unit: Unit) -> float:
    interval = row.steps_to_target if unit == "steps" else row.seconds_to_target
    return math.inf if interval is None else interval.value
