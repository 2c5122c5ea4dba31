"""The values that reports give of a method in a setting, by name. Imports ``rows``, ``summary``, ``scores``.

:data:`VALUES` are the columns of ``summary.csv``; what a report shows takes its values from there too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from stiefel.compare.analyse.costs import CostRow
from stiefel.compare.analyse.rows import TOLERANCES, Row, powers
from stiefel.compare.analyse.statistics.scores import Interval
from stiefel.compare.analyse.summary import Setting, Summary

WHERE = ("commit", "cpu", "cores", "threads", "gpu", "torch")
"""Entries of a run's environment that frames have as columns."""


@dataclass(frozen=True)
class Line:
    """A row with its setting, which ranks it, and its summary, which names it."""

    summary: Summary
    setting: Setting
    row: Row

    @property
    def name(self) -> str:
        """The method as reports write it."""
        return self.summary.marked(self.row.label)

    @property
    def control(self) -> bool:
        """Whether it is the one that others are compared with."""
        return self.row.label in self.summary.controls


Value = Callable[[Line], Any]


def _cost(of: Callable[[CostRow], Any], missing: Any = None) -> Value:
    return lambda at: missing if at.row.cost is None else of(at.row.cost)


def _believed(of: Callable[[CostRow], Any]) -> Value:
    """A time, which is empty where it is not credible."""
    return _cost(lambda cost: of(cost) if cost.credible else None)


def _interval(name: str, of: Callable[[Row], Interval | None], prefix: str = "") -> dict[str, Value]:
    """An interval's value and ends, each under its name."""

    def end(key: str) -> Value:
        return lambda at: getattr(of(at.row), key, None)  # None has no ends

    return {name: end("value"), f"{prefix}low": end("low"), f"{prefix}high": end("high")}


def _rank(tolerance: float | None = None) -> Value:
    return lambda at: at.setting.rank(at.row, tolerance)


def _knobs(at: Line) -> str | None:
    return None if at.row.choice is None else ", ".join(f"{key}={value}" for key, value in at.row.choice.knobs)


def _gradient_norm(at: Line) -> float | None:
    """How stationary the median run ended, by its training loss; None where no record says."""
    known = [r.summary["gradient_norm"] for r in at.row.final if r.summary.get("gradient_norm") is not None]
    return median(known) if known else None


def _where(at: Line) -> dict[str, Any]:
    # One environment stands for the row: of the first run that recorded one, reported runs before tuning runs.
    environment = next((r.environment for r in (*at.row.final, *at.row.tuning) if r.environment), {})
    return {name: environment.get(name) for name in WHERE}


VALUES: dict[str, Value] = {
    "setting": lambda at: at.setting.title,
    "method": lambda at: at.row.label,
    "faults": lambda at: at.row.faults or None,
    "lr": lambda at: at.row.choice.lr if at.row.choice else None,
    "knobs": _knobs,
    "lr_on_edge": lambda at: at.row.edge,
    "state": lambda at: at.row.state or "scored",
    **_interval("test_{metric}", lambda row: row.test),
    "n": lambda at: len(at.row.scores),
    "failed": lambda at: sum(at.row.failures.values()),
    "runs": lambda at: at.row.runs,
    "rank": _rank(),
    **{f"rank_at_{powers(tolerance)}": _rank(tolerance) for tolerance in TOLERANCES},  # rank_at_1e-6, rank_at_1e-3
    "error_worst": lambda at: at.row.error_worst,
    "error_final": lambda at: at.row.error_final,
    "feasible_at": lambda at: at.row.feasible,
    # Their ends are steps_low and steps_high, seconds_low and seconds_high; those of the score have no prefix.
    **_interval("steps_to_target", lambda row: row.steps_to_target, "steps_"),
    **_interval("seconds_to_target", lambda row: row.seconds_to_target, "seconds_"),
    "redundancy": lambda at: at.row.redundancy,
    "step_ratio": _believed(lambda cost: cost.ratio),
    "step_seconds": _believed(lambda cost: cost.step["median"]),
    "constraint_share": _believed(lambda cost: cost.share),
    "memory_bytes": _cost(lambda cost: cost.memory),
    "counts": _cost(lambda cost: cost.counts, {}),
    # gpu_reason is a sentence that says why the numbers are null, so it gets no column.
    "gpu_cost": _cost(lambda cost: {key: value for key, value in cost.gpu.items() if key != "gpu_reason"}, {}),
    "cost_hardware": _cost(lambda cost: cost.hardware),
    "default_validation": lambda at: at.row.default.validation if at.row.default else None,
    "default_lr": lambda at: at.row.default.choice.lr if at.row.default else None,
    "tuned_validation": lambda at: at.row.tuned.validation if at.row.tuned else None,
    "tuning_runs": lambda at: len(at.row.tuning),
    "tuning_failures": lambda at: at.row.tuning_failures,
    "where": _where,
    "short_of_target": lambda at: at.row.short,
    "studies_on_edge": lambda at: len(at.row.edges),
    "cost_doubt": _cost(lambda cost: cost.doubt or None),
    "gradient_norm": _gradient_norm,
}
"""A function of a line by name. In files ``{metric}`` becomes the metric's name, a dictionary a column per entry."""


def values(at: Line) -> dict[str, Any]:
    """All values of a row, under the names that they have in a file."""
    found: dict[str, Any] = {}
    for name, of in VALUES.items():
        value = of(at)
        found |= value if isinstance(value, dict) else {name.replace("{metric}", at.summary.metric): value}
    return found
