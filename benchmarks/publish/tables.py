"""What the published comparisons found, as tables and numbers for README.md. Imports pandas and ``stiefel.compare``."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from stiefel.compare.analyse.costs import STEADY
from stiefel.compare.analyse.statistics.differences import Difference, Sample, family, mean_parts, shared_variance
from stiefel.compare.analyse.statistics.scores import Interval, Metric, exp
from stiefel.compare.analyse.summarize import scale_name
from stiefel.compare.analyse.summary import dagger
from stiefel.compare.present import formatting as words
from stiefel.methods import control

LOG = {"gap"}
"""Metrics that span decades: ratios are compared."""
GIVEN = "default"
"""The network as its author made it."""
CONTROLS = (control(), GIVEN)
"""What methods are compared with first: no constraint from an orthogonal start, and the network as it is."""
DIGITS = 2e-6
"""What the files' six digits leave of a score, relative to 1."""
LARGEST = 20_000
"""Examples of the largest test set that is looked for."""


@dataclass(frozen=True)
class Result:
    """A published comparison: the files that ``published.py collect`` wrote.

    Methods are told apart by Welch's test with Holm's correction, in two families: every method against every control,
    and all pairs, both over all settings. Where a comparison is one tuning with fresh seeds, what is said holds at the
    rates that it chose; by studies it holds of the tuning too.
    """

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
    def verdict(self) -> pd.DataFrame:
        """A row per pair of methods: what the engine's verdict says of the mean over all settings."""
        return pd.read_csv(self.folder / "verdict.csv")

    def overall(self, first: str, second: str) -> pd.Series:
        """Its row of a pair, as it has it: what stands second is a control, or the worse of two."""
        found = self.verdict[(self.verdict.method == first) & (self.verdict.against == second)]
        assert len(found) == 1, f"{self.name} has no verdict on {first!r} against {second!r}"
        return found.iloc[0]

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
        ranks: dict[str, list[int]] = {method: [] for method in dict.fromkeys(self.summary.method)}
        for setting in self.settings:
            order = sorted(self.among(setting), key=lambda method: self._place(method, setting))
            for rank, method in enumerate(order, 1):
                ranks[method].append(rank)
        mean = {method: sum(places) / len(places) if places else math.inf for method, places in ranks.items()}
        return sorted(mean, key=lambda method: (method in self.faulty, mean[method], method))

    @property
    def right(self) -> list[str]:
        """Methods without known faults."""
        return [method for method in self.methods if method not in self.faulty]

    @property
    def constrained(self) -> list[str]:
        """Of these, the ones that are not a control."""
        return [method for method in self.right if method not in CONTROLS]

    def ran(self, method: str, setting: str) -> bool:
        """Whether a method is in a setting at all: a learnable scale is for some only."""
        return bool(((self.summary.method == method) & (self.summary.setting == setting)).any())

    def row(self, method: str, setting: str) -> pd.Series:
        """What is known of a method in a setting."""
        found = self.summary[(self.summary.method == method) & (self.summary.setting == setting)]
        assert len(found) == 1, f"{self.name} has {len(found)} rows of {method!r} in {setting!r}"
        return found.iloc[0]

    @cached_property
    def metric_of(self) -> Metric:
        """What is compared; its resolution is found from the scores."""
        name = self.metric.removeprefix("test_")
        return Metric(name, self._higher, name in LOG, 0.0 if name in LOG else resolution(self._final.test_at_best))

    @cached_property
    def _final(self) -> pd.DataFrame:
        """The reported runs, each with the title of its setting."""
        return self._titled(self.runs[(self.runs.kind == "quality") & (self.runs.phase == "final")])

    def _titled(self, runs: pd.DataFrame) -> pd.DataFrame:
        """Runs with the title of the setting of each."""
        titles = {setting: [part.split(" ", 1) for part in setting.split(", ")] for setting in self.settings}

        def title(run: pd.Series) -> str:
            fits = (s for s, parts in titles.items() if all(_shown(run[name]) == value for name, value in parts))
            return next(fits)

        return runs.assign(setting=runs.apply(title, axis="columns"))

    @cached_property
    def _samples(self) -> dict[tuple[str, str], Sample]:
        """What tests compare, by method and setting; on a log scale the logarithms."""
        methods = list(dict.fromkeys(self.summary.method))
        found = {(method, at): self._sample(method, at) for at in self.settings for method in methods}
        return {key: sample for key, sample in found.items() if sample.values}

    def _sample(self, method: str, setting: str) -> Sample:
        metric = self.metric_of
        runs = self._final[(self._final.label == method) & (self._final.setting == setting)]
        scores = runs.test_at_best.map(metric.log) if metric.log_scale else runs.test_at_best
        values = scores.dropna()
        lost = len(scores) - len(values)
        return Sample(tuple(values), metric.resolution, _parts(runs, metric), lost, metric.higher_is_better)

    def among(self, at: str) -> list[str]:
        """The methods with a score in a setting, by name."""
        return sorted(method for method, place in self._samples if place == at)

    @cached_property
    def against_control(self) -> dict[tuple[str, str, str], Difference]:
        """Every method against every control, by method, control and setting: one family, as a verdict has it."""
        keys = [
            (method, base, at)
            for at in self.settings
            for base in CONTROLS
            if base in self.among(at)
            for method in self.among(at)
            if method not in self.faulty and method not in CONTROLS[: CONTROLS.index(base) + 1]
        ]
        pairs = [(self._samples[method, at], self._samples[base, at]) for method, base, at in keys]
        return dict(zip(keys, family(pairs), strict=True))

    @cached_property
    def pairs(self) -> dict[tuple[str, str, str], Difference]:
        """All pairs, by both methods and setting: one family."""
        keys = [(a, b, at) for at in self.settings for a, b in itertools.combinations(self.among(at), 2)]
        return dict(zip(keys, family([(self._samples[a, at], self._samples[b, at]) for a, b, at in keys]), strict=True))

    def difference(self, first: str, second: str, at: str) -> Difference:
        """The first's score less the second's; of logarithms where the metric spans decades.

        Corrected for all comparisons with a control where either is one, and for all pairs where neither is.
        """
        if (first, second, at) in self.against_control:
            return self.against_control[first, second, at]
        if (second, first, at) in self.against_control:
            return self.against_control[second, first, at].turned
        return self.pair(first, second, at)

    def sample(self, method: str, at: str) -> Sample:
        """What tests compare of a method in a setting."""
        return self._samples[method, at]

    def interval(self, method: str, at: str) -> Interval:
        """The mean of its replicates with the t interval, the test set's luck in it; geometric on a log scale."""
        sample = self.sample(method, at)
        if self.metric_of.log_scale:
            return Interval.mean(sample.values).map(exp)
        return Interval.mean(sample.values, sample.resolution, shared_variance(sample.parts, sample.resolution))

    def score(self, method: str, at: str) -> float:
        """Its score without the interval."""
        return self.interval(method, at).value

    def best(self, setting: str, among: Sequence[str] | None = None) -> str:
        """The method with the best score in a setting, of those given; by default of those without known faults."""
        return min(among or self.right, key=lambda method: self._place(method, setting))

    def worst(self, setting: str, among: Sequence[str] | None = None) -> str:
        """The method with the worst score, of those given."""
        return max(among or self.right, key=lambda method: self._place(method, setting))

    def above(self, first: str, second: str, setting: str) -> bool:
        """Whether the first is told apart from the second and better."""
        if not {first, second} <= set(self.among(setting)):
            return False
        found = self.difference(first, second, setting)
        return bool(found.apart) and self.metric_of.better(found.value) > 0

    def same(self, at: str, among: Sequence[str] | None = None) -> list[str]:
        """The best of a setting, and what cannot be told from it."""
        known = [method for method in self.methods if method in (among or self.right) and method in self.among(at)]
        best = self.best(at, known)
        return [m for m in known if m == best or not self.above(best, m, at)]

    def gains(self, at: str) -> list[str]:
        """The methods that are told apart from the control and better."""
        return [method for method in self.constrained if self.above(method, control(), at)]

    def losses(self, at: str) -> list[str]:
        """The methods that are told apart from the control and worse."""
        return [method for method in self.constrained if self.above(control(), method, at)]

    def findable(self, at: str) -> float:
        """The smallest difference from the control that would have been found 4 times in 5, the median over methods."""
        found = [d.detectable for (_, *where), d in self.against_control.items() if where == [control(), at]]
        return float(pd.Series(found).median())

    def wins(self, first: str, second: str) -> list[str]:
        """The settings in which ``first`` is told apart from ``second`` and better."""
        return [at for at in self.settings if self.above(first, second, at)]

    def pair(self, first: str, second: str, at: str) -> Difference:
        """The difference of two methods in the family of all pairs."""
        found = self.pairs.get((first, second, at))
        return found if found is not None else self.pairs[second, first, at].turned

    def ratio(self, method: str) -> float:
        """Its step time over the control's, geometric mean over settings with credible times; NaN without any."""
        values = [ratio for label, ratio, believed in self._costs if label == method and believed]
        return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan

    @cached_property
    def _costs(self) -> list[tuple[str, float, bool]]:
        """Method, ratio, and whether the quartiles of both times are narrow enough, of each cost run."""
        runs = self.runs[(self.runs.kind == "cost") & (self.runs.status == "done")]
        if not len(runs):
            return []
        found = []
        for label, ratio, text in zip(runs.label, runs.step_ratio, runs.step_seconds, strict=True):
            times = json.loads(text).values()
            steady = all(time["q3"] - time["q1"] <= STEADY * time["median"] for time in times)
            found.append((str(label), float(ratio), steady))
        return found

    @property
    def refused(self) -> tuple[int, int]:
        """How many cost runs are not credible, and how many there are."""
        return sum(not believed for _, _, believed in self._costs), len(self._costs)

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
        """The same as numbers: a row per method, a column per rate; NaN where some study has no result."""
        runs = self.runs[(self.runs.kind == "quality") & (self.runs.phase == "tuning")]
        for name, value in where.items():
            runs = runs[runs[name].astype(str) == str(value)]
        knobs = [name for name in runs if str(name).startswith("knob_")]
        plain = runs[runs[knobs].isna().all(axis="columns")]
        grid = plain.groupby("lr").label.nunique()  # rates in between are those of a few methods
        plain = plain[plain.lr.isin(grid[grid > plain.label.nunique() / 2].index)]
        found = plain.groupby(["label", "lr"]).best_validation.agg(["mean", "count"])
        known = found["mean"].where(found["count"] == found["count"].max())
        return known.unstack("lr").dropna(axis="columns", how="all")

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
        places = ["label", "setting", *(["study"] if self.by_studies else [])]
        each = self._titled(tuning).groupby(places).size()
        trials = f"{each.min()}" if each.min() == each.max() else f"{each.min()} to {each.max()}"
        hours = self.runs.wall_seconds.sum() / 3600
        n = int(self.summary.n.max())
        replicates = f"{n} studies, each with a tuning of its own" if self.by_studies else f"{n} fresh seeds"
        costs = f" and {len(cost)} cost runs" if len(cost) else ""
        of_study = " in a study" if self.by_studies else ""
        return (
            f"{len(tuning)} tuning runs, {len(final)} reported ones on fresh seeds{costs}, "
            f"{hours:.1f} hours of runs; {_count(self.methods, 'method')} in {_count(self.settings, 'setting')}, "
            f"{trials} tuning runs each{of_study} over rates from {rates[0]:g} to {rates[-1]:g}, "
            f"{replicates}; {first.cores:.0f} cores ({first.cpu}), torch {first.torch}, "
            f"float32, code {', '.join(sorted(set(self.runs.commit)))}."
        )

    @property
    def by_studies(self) -> bool:
        """Whether each replicate was tuned by itself, so that what is said holds of the tuning too."""
        return "study" in self.runs and bool(self.runs.study.notna().any())

    def scores(self, settings: Sequence[str]) -> str:
        """A table: methods, their score in each setting with its interval and the chosen rate, worst error, cost.

        Those with known faults come last, with a dagger. Bold: the best of a setting of the others, and what cannot be
        told from it. What a step costs is shown where it was measured.
        """
        top = {at: self.same(at) for at in self.settings}
        lines = []
        for m in self.methods:
            cells = [self._cell(m, s, bold=m in top.get(s, ())) for s in settings]
            name = dagger(f"`{m}`") if m in self.faulty else f"`{m}`"
            lines.append([name, *cells, words.error(self.error(m)), *([self._step(m)] if self._costs else [])])
        return markdown(["method", *settings, "worst error", *(["step"] if self._costs else [])], lines)

    def _step(self, method: str) -> str:
        if math.isnan(self.ratio(method)):
            return words.DOUBTED if any(label == method for label, _, _ in self._costs) else words.NONE
        return "1" if method == control() else f"{self.ratio(method):.2g}×"

    def _cell(self, method: str, setting: str, bold: bool) -> str:
        if not self.ran(method, setting):
            return words.NONE
        row = self.row(method, setting)
        if method not in self.among(setting):
            return str(row.state)
        text = _brief(self.interval(method, setting))
        runs = self._final[(self._final.label == method) & (self._final.setting == setting)]
        short = int((runs.status == "target missed").sum())
        told = f", {short}/{len(runs)} short" if short else ""
        edge = "*" if row.lr_on_edge else ""
        return f"{f'**{text}**' if bold else text} at {row.lr:g}{edge}{told}"

    def _place(self, method: str, setting: str) -> float:
        score = self.score(method, setting) if method in self.among(setting) else math.nan
        return math.inf if math.isnan(score) else -score if self._higher else score

    @property
    def _higher(self) -> bool:
        return bool(self.runs.higher_is_better.dropna().iloc[0])


def _parts(runs: pd.DataFrame, metric: Metric) -> tuple[float, ...]:
    """The mean score on each part of the test set, where all runs have recorded as many parts; else empty."""
    if metric.log_scale or "test_parts" not in runs or runs.test_parts.isna().any():
        return ()
    return mean_parts([json.loads(text) for text in runs.test_parts])


def _count(what: Sequence[object], noun: str) -> str:
    return f"{len(what)} {noun}{'s' if len(what) > 1 else ''}"


def resolution(scores: pd.Series) -> float:
    """1 / examples of the smallest test set of which all scores are whole numbers of examples; 0 without any."""
    values = scores.dropna().to_numpy()
    if not len(values) or values.min() < 0 or values.max() > 1:
        return 0.0
    for examples in range(10, LARGEST):
        counts = values * examples
        if abs(counts - counts.round()).max() <= DIGITS * examples:
            return 1 / examples
    return 0.0


def _shown(value: object) -> str:
    """The value of a factor as titles have it."""
    try:
        return scale_name(float(str(value)))
    except ValueError:
        return scale_name(str(value))


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
