"""What the published comparisons found, as tables and numbers for README.md. Imports pandas and ``stiefel.compare``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from stiefel.compare.analyse.statistics.scores import Interval
from stiefel.compare.analyse.summary import dagger
from stiefel.compare.present import formatting as words
from stiefel.methods import control


@dataclass(frozen=True)
class Result:
    """A published comparison: the files that ``published.py collect`` wrote."""

    folder: Path

    @cached_property
    def summary(self) -> pd.DataFrame:
        """A row per setting and method."""
        return pd.read_csv(self.folder / "summary.csv")

    @cached_property
    def runs(self) -> pd.DataFrame:
        """A row per run."""
        return pd.read_csv(self.folder / "runs.csv.gz", low_memory=False)

    @cached_property
    def dependence(self) -> pd.DataFrame:
        """A row per pair of layers."""
        return pd.read_csv(self.folder / "dependence.csv.gz")

    @cached_property
    def _near(self) -> pd.DataFrame:
        return pd.read_csv(self.folder / "stability.csv")

    @property
    def name(self) -> str:
        """Name of the comparison."""
        return self.folder.name

    @cached_property
    def metric(self) -> str:
        """The column of the score."""
        return score_column(self.summary)

    @cached_property
    def settings(self) -> list[str]:
        """The settings, in the order of the report."""
        return list(dict.fromkeys(self.summary.setting))

    @cached_property
    def faulty(self) -> set[str]:
        """Methods that are kept with their known faults."""
        return set(self.summary.method[self.summary.faults.notna()]) if "faults" in self.summary else set()

    @cached_property
    def methods(self) -> list[str]:
        """The best in the mean first, by rank in each setting; those with known faults last."""
        ranks = self.summary.assign(rank=self.summary["rank"].fillna(99)).groupby("method")["rank"].mean()
        return sorted(ranks.index, key=lambda method: (method in self.faulty, ranks[method], method))

    @property
    def right(self) -> list[str]:
        """Methods without known faults."""
        return [method for method in self.methods if method not in self.faulty]

    @property
    def constrained(self) -> list[str]:
        """Of these, the ones that are not the control."""
        return [method for method in self.right if method != control()]

    def ran(self, method: str, setting: str) -> bool:
        """Whether a method is in a setting at all: a learnable scale is for some only."""
        return bool(((self.summary.method == method) & (self.summary.setting == setting)).any())

    def row(self, method: str, setting: str) -> pd.Series:
        """What is known of a method in a setting."""
        found = self.summary[(self.summary.method == method) & (self.summary.setting == setting)]
        assert len(found) == 1, f"{self.name} has {len(found)} rows of {method!r} in {setting!r}"
        return found.iloc[0]

    def interval(self, method: str, setting: str) -> Interval:
        """Its score over fresh seeds."""
        row = self.row(method, setting)
        return Interval(row[self.metric], row["low"], row["high"], int(row["n"]), "interval")

    def score(self, method: str, setting: str) -> float:
        """Its score without the interval."""
        return float(self.row(method, setting)[self.metric])

    def best(self, setting: str, among: Sequence[str] | None = None) -> str:
        """The method with the best score in a setting, of those given; by default of those without known faults."""
        return min(among or self.right, key=lambda method: self._place(method, setting))

    def worst(self, setting: str, among: Sequence[str] | None = None) -> str:
        """The method with the worst score, of those given."""
        return max(among or self.right, key=lambda method: self._place(method, setting))

    def lowest(self, settings: Sequence[str], among: Sequence[str] | None = None) -> float:
        """The smallest score of the methods in some settings."""
        return float(self._scores(settings, among).min())

    def highest(self, settings: Sequence[str], among: Sequence[str] | None = None) -> float:
        """The largest score of the methods in some settings."""
        return float(self._scores(settings, among).max())

    def _scores(self, settings: Sequence[str], among: Sequence[str] | None) -> pd.Series:
        rows = self.summary[self.summary.setting.isin(settings) & self.summary.method.isin(among or self.right)]
        return rows[self.metric]

    def above(self, first: str, second: str, setting: str) -> bool:
        """Whether one score's interval lies on the better side of the other's."""
        if not (self.ran(first, setting) and self.ran(second, setting)):
            return False
        a, b = (self.row(method, setting) for method in (first, second))
        return bool(a["low"] > b["high"] if self._higher else a["high"] < b["low"])

    def wins(self, first: str, second: str) -> list[str]:
        """The settings in which ``first`` is above ``second``."""
        return [setting for setting in self.settings if self.above(first, second, setting)]

    def leads(self, method: str, among: Sequence[str] | None = None) -> list[str]:
        """The settings in which it is the best, of those given."""
        return [setting for setting in self.settings if self.best(setting, among) == method]

    def turned(self, method: str, setting: str, moment: str) -> float:
        """Degrees by which a step of 1 % of one layer turns the gradient of another: median over pairs of layers."""
        rows = self.dependence
        where = (rows.method == method) & (rows.setting == setting) & (rows.moment == moment) & (rows.distance != 0)
        return float(rows[where].degrees.median())

    def ratio(self, method: str) -> float:
        """Its step time over the control's, geometric mean over the points of the grid."""
        if "step_ratio" not in self.summary:  # there was no cost pass
            return math.nan
        values = self.summary[self.summary.method == method].step_ratio.dropna()
        return math.exp(values.map(math.log).mean()) if len(values) else math.nan

    def error(self, method: str) -> float:
        """The worst orthogonality error of any reported run."""
        return float(self.summary[self.summary.method == method].error_worst.max())

    def where(self, part: str) -> list[str]:
        """The settings with this in their title."""
        return [setting for setting in self.settings if part in setting]

    def rates(self, **where: object) -> str:
        """A table: best validation metric of the tuning runs at default knobs, by learning rate, in one setting."""
        values = self.by_rate(**where)
        lines = [
            [dagger(f"`{m}`") if m in self.faulty else f"`{m}`", *map(_score, values.loc[m])] for m in self.methods
        ]
        return markdown(["method", *(f"{rate:g}" for rate in values.columns)], lines)

    def by_rate(self, **where: object) -> pd.DataFrame:
        """The same as numbers: a row per method, a column per rate; NaN where the run failed."""
        runs = self.runs[(self.runs.kind == "quality") & (self.runs.phase == "tuning")]
        for name, value in where.items():
            runs = runs[runs[name].astype(str) == str(value)]
        knobs = [name for name in runs if str(name).startswith("knob_")]
        plain = runs[runs[knobs].isna().all(axis="columns")]
        grid = plain.groupby("lr").label.nunique()  # rates in between are those of a few methods
        plain = plain[plain.lr.isin(grid[grid > plain.label.nunique() / 2].index)]
        return plain.pivot_table(index="label", columns="lr", values="best_validation", aggfunc="mean", dropna=False)

    def near_best(self) -> list[int]:
        """How many of each method's rates ended near the best of all."""
        return self._near["all"].tolist()

    def stability(self) -> str:
        """A table: how many of the rates tried ended near the best, of metrics that are better when smaller."""
        found = self._near.sort_values(["setting", "all", "own"], ascending=False)
        lines = [
            [f"`{row['method']}`", *(f"{row[part]} of {row['rates']}" for part in ("own", "all"))]
            for row in found.to_dict("records")
        ]
        heads = ["method", "rates within twice its own best", "within twice the best of all"]
        return markdown(heads, lines)

    def protocol(self) -> str:
        """What ran, on what."""
        quality, cost = (self.runs[self.runs.kind == kind] for kind in ("quality", "cost"))
        tuning, final = (quality[quality.phase == phase] for phase in ("tuning", "final"))
        rates, first = sorted(tuning.lr.unique()), self.runs.iloc[0]
        each = self.summary.tuning_runs
        trials = f"{each.min()}" if each.min() == each.max() else f"{each.min()} to {each.max()}"
        hours = self.runs.wall_seconds.sum() / 3600
        return (
            f"{len(tuning)} tuning runs, {len(final)} reported ones on fresh seeds and {len(cost)} cost runs, "
            f"{hours:.1f} processor hours; {len(self.methods)} methods in {len(self.settings)} settings, "
            f"{trials} tuning runs each over rates from {rates[0]:g} to {rates[-1]:g}, "
            f"{int(self.summary.n.max())} fresh seeds; {first.cores:.0f} cores ({first.cpu}), torch {first.torch}, "
            f"float32, code {', '.join(sorted(set(self.runs.commit)))}."
        )

    def scores(self, settings: Sequence[str], *, faulty: bool = False) -> str:
        """A table: methods, their score in each setting with its interval and the chosen rate, worst error, cost."""
        methods = [m for m in self.methods if (m in self.faulty) == faulty]
        top = {setting: self.best(setting) for setting in settings}
        lines = [
            [
                f"`{m}`",
                *(self._cell(m, s, bold=top[s] == m) for s in settings),
                words.error(self.error(m)),
                self._step(m),
            ]
            for m in methods
        ]
        return markdown(["method", *settings, "worst error", "step"], lines)

    def _step(self, method: str) -> str:
        return words.NONE if math.isnan(self.ratio(method)) else f"{self.ratio(method):.2f}×"

    def _cell(self, method: str, setting: str, bold: bool) -> str:
        if not self.ran(method, setting):
            return words.NONE
        row = self.row(method, setting)
        if row.state != "scored":
            return str(row.state)
        text = _brief(self.interval(method, setting))
        failed = "" if row.failed == 0 else f", {row.failed:.0f}/{row.runs:.0f} short"
        edge = "*" if row.lr_on_edge else ""
        return f"{f'**{text}**' if bold else text} at {row.lr:g}{edge}{failed}"

    def _place(self, method: str, setting: str) -> float:
        score = self.score(method, setting) if self.ran(method, setting) else math.nan
        return math.inf if math.isnan(score) else -score if self._higher else score

    @property
    def _higher(self) -> bool:
        return bool(self.runs.higher_is_better.dropna().iloc[0])


def score_column(summary: pd.DataFrame) -> str:
    """Where a table of results has the score."""
    return next(str(column) for column in summary if str(column).startswith("test_"))


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _brief(interval: Interval) -> str:
    return interval.format(".1e").replace("e-0", "e-") if abs(interval.value) < 0.01 else str(interval)


def _score(value: float) -> str:
    return words.NONE if math.isnan(value) else words.score(value)
