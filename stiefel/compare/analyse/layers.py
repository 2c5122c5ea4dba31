"""Why methods differ: what happens to signals, filters, gradients and steps in each layer. Imports ``summary``, pandas.

Frames of medians over the reported runs of each method, which figures draw and notebooks read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from stiefel.compare.analyse.rows import Row, number
from stiefel.compare.analyse.summary import Setting, Summary

PERCENT = 0.01 * 180 / math.pi
"""Converts radians per relative length of a step to degrees for a step of 1 %."""


@dataclass(frozen=True)
class Signal:
    """A measurement of single layers.

    Args:
        name: its column in :attr:`Why.layers`.
        title: of its panel in the figure by depth; empty where it has none.
        among: the measurement whose layers hold it by ``name``; without one it is a measurement itself.
        least: values below are rounding, and drawn as this one.
        optional: whether its panel is left out where no record has it.
    """

    name: str
    title: str = ""
    among: str = ""
    least: float = 0.0
    optional: bool = False

    def of(self, measured: dict[str, Any], layer: str) -> float:
        """Its value in a row of measurements; NaN where that has none."""
        if self.among:
            return number((measured.get(self.among) or {}).get(layer, {}).get(self.name))
        return number((measured.get(self.name) or {}).get(layer))


SIGNALS = (
    Signal("forward", "energy kept forward, ‖Wx‖/‖x‖", among="energy"),
    Signal("backward", "energy kept backward", among="energy"),
    Signal("forward_total", among="energy"),
    Signal("backward_total", among="energy"),
    Signal("variance", "variance of activations"),
    Signal("redundancy", "redundancy, mean |cos| of filters", least=1e-7),
    Signal("input_condition", "condition of inputs, κ(E hhᵀ)", among="conditioning", optional=True),
    Signal("input_rank", among="conditioning"),
    Signal("input_size", among="conditioning"),
    Signal("gradient_condition", among="conditioning"),
    Signal("gradient_rank", among="conditioning"),
    Signal("block_condition", "condition of Fisher blocks", among="conditioning", optional=True),
    Signal("operator_largest", "norm of the convolution, ‖T‖₂", among="operator", optional=True),
    Signal("operator_smallest", among="operator"),
    Signal("effective_rate", "effective rate, at the end"),
)


@dataclass(frozen=True)
class Why:
    """The measurements of layers in the records of one setting; a frame is empty where nothing was recorded."""

    setting: Setting

    @cached_property
    def layers(self) -> pd.DataFrame:
        """A row per method, moment (start, end) and layer, in the network's order (``depth``), with its signals."""
        rows = [
            {"method": row.label, "moment": moment, "depth": depth, "layer": layer}
            | {signal.name: signal.of(measured, layer) for signal in SIGNALS}
            for row, moment, measured in self._moments
            for depth, layer in enumerate(_layers(measured), 1)
        ]
        return _medians(rows, ["method", "moment", "depth", "layer"], tuple(signal.name for signal in SIGNALS))

    @cached_property
    def dependence(self) -> pd.DataFrame:
        """A row per method, moment and pair of layers: how far a step of ``stepped`` turns the gradient of ``layer``.

        ``degrees`` for a step of 1 % of the weight's length, ``degrees_per_step`` for a plain SGD step at the method's
        rate; ``distance`` is the depth of ``layer`` less that of ``stepped``, in measured layers.
        """
        rows = []
        for row, moment, measured in self._moments:
            found = measured.get("dependence")
            if not found:
                continue
            names, lr = found["layers"], row.choice.lr if row.choice else math.nan
            for n, layer in enumerate(names):
                for m, stepped in enumerate(names):
                    turn, gradient = number(found["turn"][n][m]), number(found["gradient"][m])
                    # A plain SGD step has relative length lr ‖ξ_m‖/‖W_m‖, which is lr · gradient[m].
                    values = {"degrees": PERCENT * turn, "degrees_per_step": math.degrees(turn * lr * gradient)}
                    at = {"method": row.label, "moment": moment, "depth": n + 1, "distance": n - m}
                    rows.append(at | {"layer": layer, "stepped": stepped, **values})
        key = ["method", "moment", "depth", "distance", "layer", "stepped"]
        return _medians(rows, key, ("degrees", "degrees_per_step"))

    @cached_property
    def rates(self) -> pd.DataFrame:
        """A row per method, step and layer with its effective rate."""
        rows = [
            {"method": row.label, "step": measured["step"], "layer": layer, "effective_rate": number(rate)}
            for row in self.setting.rows
            for run in row.diagnoses
            for measured in run
            for layer, rate in (measured.get("effective_rate") or {}).items()
        ]
        return _medians(rows, ["method", "step", "layer"], ("effective_rate",))

    @cached_property
    def methods(self) -> pd.DataFrame:
        """A row per method: each quantity of its layers at the end of training as one number; may be empty.

        ``turned_by_others`` and ``turned_by_itself`` are medians over pairs of layers and over layers, in degrees for a
        step of 1 %, ``per_step`` the former for an SGD step at the method's rate; ``variance_kept`` the variance of the
        last layer's output over that of the first; ``forward`` and ``backward``, ``input_condition`` and
        ``block_condition`` geometric means over layers, ``redundancy`` the mean; ``operator_largest`` and
        ``operator_smallest`` the extremes of all convolutions; ``rate`` the median effective rate, between ``rate_low``
        and ``rate_high``.
        """
        rows = []
        for label in [row.label for row in self.setting.rows]:
            ends = self.layers[(self.layers.method == label) & (self.layers.moment == "end")].sort_values("depth")
            if ends.empty:
                continue
            pairs = self.dependence[(self.dependence.method == label) & (self.dependence.moment == "end")]
            own, others = pairs[pairs.distance == 0], pairs[pairs.distance != 0]
            first, last = ends.variance.iloc[0], ends.variance.iloc[-1]
            rows.append(
                {
                    "method": label,
                    "forward": _geometric(ends.forward),
                    "backward": _geometric(ends.backward),
                    "variance_kept": last / first if first > 0 else math.nan,
                    "redundancy": ends.redundancy.mean(),
                    "input_condition": _geometric(ends.input_condition),
                    "block_condition": _geometric(ends.block_condition),
                    "operator_largest": ends.operator_largest.max(),
                    "operator_smallest": ends.operator_smallest.min(),
                    "turned_by_others": others.degrees.median(),
                    "turned_by_itself": own.degrees.median(),
                    "per_step": others.degrees_per_step.median(),
                    "rate": ends.effective_rate.median(),
                    "rate_low": ends.effective_rate.min(),
                    "rate_high": ends.effective_rate.max(),
                }
            )
        return pd.DataFrame(rows)

    @property
    def reasons(self) -> list[str]:
        """Why gradients could not be measured, each reason once."""
        found = (m["gradients_reason"] for r in self.setting.rows for run in r.diagnoses for m in run if _failed(m))
        return list(dict.fromkeys(found))

    @cached_property
    def _moments(self) -> list[tuple[Row, str, dict[str, Any]]]:
        found = []
        for row in self.setting.rows:
            for run in row.diagnoses:
                # Rows with effective rates alone lie between start and end.
                kept = [measured for measured in run if "energy" in measured]
                if kept and kept[0]["step"] == 0:
                    found.append((row, "start", kept[0]))
                if kept and kept[-1]["step"] > 0:
                    found.append((row, "end", kept[-1]))
        return found


def frames(problems: Iterable[Summary], what: str) -> pd.DataFrame:
    """One of the frames of :class:`Why` over all settings of some problems."""
    found = [
        getattr(Why(setting), what).assign(setting=setting.title, problem=summary.problem)
        for summary in problems
        for setting in summary.settings
    ]
    if not found:  # cost runs alone have no setting to report
        return pd.DataFrame(columns=["setting", "problem"])
    whole = pd.concat(found, ignore_index=True)
    return whole[["setting", *(name for name in whole if name not in ("setting", "problem")), "problem"]]


def line(summary: Summary) -> Iterator[str]:
    """One sentence for a terminal: how much the layers depend on each other; none where it was not recorded."""
    pairs = frames([summary], "dependence")
    others = pairs[pairs.distance != 0] if len(pairs) else pairs
    if others.empty:
        return
    by_moment = others.groupby("moment").degrees.median()
    ends = others[others.moment == "end"].groupby("method").degrees.median().dropna().sort_values()
    if "start" not in by_moment or ends.empty:
        return
    low, high = (f"{ends.iloc[i]:.2g}° ({ends.index[i]})" for i in (0, -1))
    span = low if len(ends) == 1 else f"{low} to {high}"
    yield (
        f"dependence: a step of 1 % of one layer turns another's gradient by {by_moment['start']:.2g}° at the start, "
        f"{span} at the end (medians)"
    )


def _layers(measured: dict[str, Any]) -> list[str]:
    """Names in the order of the forward pass, those with gradients alone last."""
    return list(dict.fromkeys([*measured["energy"], *(measured.get("effective_rate") or {})]))


def _failed(measured: dict[str, Any]) -> bool:
    return "gradients_reason" in measured


def _geometric(values: pd.Series) -> float:
    known = values[values > 0]
    return float(np.exp(np.log(known).mean())) if len(known) else math.nan


def _medians(rows: list[dict[str, Any]], key: list[str], values: tuple[str, ...]) -> pd.DataFrame:
    """Medians over runs; the order of rows is kept."""
    if not rows:
        return pd.DataFrame({name: pd.Series(dtype=object if name in key else float) for name in (*key, *values)})
    return pd.DataFrame(rows).groupby(key, sort=False)[list(values)].median().reset_index()
