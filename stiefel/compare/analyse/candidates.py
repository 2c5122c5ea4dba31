"""What a verdict chooses from: methods at a scale, over all points of a problem's grid. Imports ``summary``, numpy."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from stiefel.compare.analyse.costs import CostRow
from stiefel.compare.analyse.rows import Row
from stiefel.compare.analyse.statistics.differences import Sample, mean_parts, shared_variance
from stiefel.compare.analyse.statistics.scores import Interval, Metric, exp
from stiefel.compare.analyse.summary import Setting, Summary

SLACK = 2.0
"""How many standard deviations of a run below the best a rate may be to count as one at which a method works."""


@dataclass(frozen=True)
class Candidate:
    """A method at a scale, over one or more points of the grid: results are means over the points, seed by seed.

    Args:
        rows: its row at each point.
        scale: the scale; empty where all candidates share it, and for the network as it is, which has none.
    """

    rows: tuple[Row, ...]
    scale: str = ""

    @property
    def label(self) -> str:
        """The method with its options."""
        return self.rows[0].label

    @property
    def name(self) -> str:
        """The method with its options, and its scale where that is a choice too."""
        return self.label + (f" at scale {self.scale}" if self.scale else "")

    @property
    def metric(self) -> Metric:
        """What is compared."""
        return self.rows[0].metric

    @property
    def control(self) -> bool:
        """Whether it has no constraint: a candidate that others are compared with first."""
        return self.rows[0].control

    @property
    def faulty(self) -> bool:
        """Whether it is a baseline with known faults."""
        return any(row.faults for row in self.rows)

    @cached_property
    def scores(self) -> dict[int, float]:
        """Test metric by seed, of the seeds whose runs trained to their end at every point."""
        return self._mean([row.scores for row in self.rows])

    @cached_property
    def seconds(self) -> dict[int, float]:
        """Training seconds to the target by seed; infinite where it is not reached."""
        return self._mean([row.seconds for row in self.rows])

    @cached_property
    def sample(self) -> Sample:
        """What tests compare: the scores, on a log scale their logarithms."""
        lost = self.replicates - len(self.scores)
        if self.log_scale:
            logs = tuple(self._mean([_logs(row) for row in self.rows]).values())
            return Sample(logs, failures=lost, higher_is_better=self.metric.higher_is_better)
        resolution = math.sqrt(sum(row.metric.resolution**2 for row in self.rows)) / len(self.rows)
        return Sample(tuple(self.scores.values()), resolution, self._parts, lost, self.metric.higher_is_better)

    @property
    def replicates(self) -> int:
        """How many there are at the point that has most; a failure at any point leaves one without a score."""
        return max(row.runs for row in self.rows)

    @property
    def log_scale(self) -> bool:
        """Whether ratios are compared."""
        return self.metric.log_scale

    @cached_property
    def score(self) -> Interval | None:
        """The mean score, geometric on a log scale; None where at most half of the runs have one."""
        if any(row.test is None for row in self.rows) or not self.scores:
            return None
        if 2 * len(self.scores) <= self.replicates:
            return None
        if self.log_scale:
            return Interval.mean(self.sample.values).map(exp)
        shared = shared_variance(self._parts, self.sample.resolution)
        return Interval.mean(self.scores.values(), self.sample.resolution, shared)

    @property
    def trained(self) -> bool:
        """Whether it has a score."""
        return self.score is not None

    @property
    def bound(self) -> bool:
        """Whether a better rate may lie outside the grid, so that the score is a bound of what is possible."""
        return any(row.edge for row in self.rows)

    @property
    def seconds_to_target(self) -> Interval | None:
        """Median over seeds."""
        return Interval.median(self.seconds.values()) if self.seconds else None

    @property
    def reached(self) -> bool:
        """Whether its median run reaches the target at every point, and not before its first step."""
        return all(row.reached and not row.at_start for row in self.rows)

    @property
    def error(self) -> float:
        """Largest orthogonality error of any run at any moment that was measured."""
        return max(row.error_worst for row in self.rows)

    @property
    def step(self) -> Interval | None:
        """Step time as a multiple of the control's, and its quartiles over n steps; geometric means over points.

        None where a cost is missing or not credible.
        """
        costs = [row.cost for row in self.rows if row.cost is not None and row.cost.credible]
        if len(costs) < len(self.rows):
            return None
        ratio, low, high = (self._ratio(costs, end) for end in ("median", "q1", "q3"))
        return Interval(ratio, low, high, int(min(cost.step["n"] for cost in costs)), "quartiles")

    @property
    def failures(self) -> int:
        """Reported runs that did not train to their end."""
        return sum(sum(row.failures.values()) for row in self.rows)

    @property
    def runs(self) -> int:
        """How many runs are reported."""
        return sum(row.runs for row in self.rows)

    @property
    def choice(self) -> str:
        """What tuning chose, at each point where that differs."""
        return " | ".join(dict.fromkeys(str(row.choice) for row in self.rows))

    @property
    def _parts(self) -> tuple[float, ...]:
        return mean_parts([row.parts for row in self.rows])

    @staticmethod
    def _ratio(costs: Sequence[CostRow], end: str) -> float:
        return float(np.exp(np.mean([math.log(cost.step[end] / cost.control["median"]) for cost in costs])))

    @staticmethod
    def _mean(results: Sequence[dict[int, float]]) -> dict[int, float]:
        # Only seeds that ran at every point: otherwise the means of different seeds would not be comparable.
        seeds = sorted(set.intersection(*map(set, results)))
        return {seed: float(np.mean([result[seed] for result in results])) for seed in seeds}


def _logs(row: Row) -> dict[int, float]:
    return {seed: row.metric.log(score) for seed, score in row.scores.items()}


def candidates(summary: Summary) -> list[Candidate]:
    """Each method at each scale that has a row at every point of the grid."""
    rows: dict[tuple[str, str], dict[str, Row]] = defaultdict(dict)
    for setting in summary.settings:
        for row in setting.rows:
            rows[row.label, setting.scale if row.scaled else ""].setdefault(setting.point, row)
    points = {setting.point for setting in summary.settings}
    scales = {setting.scale for setting in summary.settings}
    return [
        Candidate(tuple(found.values()), scale if len(scales) > 1 else "")
        for (_, scale), found in rows.items()
        if len(found) == len(points)
    ]


def tolerated(candidate: Candidate, summary: Summary) -> float:
    """Decades of rates at which a candidate works, the fewest over the points of the grid; −1 where it does at none."""
    at = [(row, next(s for s in summary.settings if any(other is row for other in s.rows))) for row in candidate.rows]
    return min(_tolerated(row, setting) for row, setting in at)


def _tolerated(row: Row, setting: Setting) -> float:
    """Decades around a method's best rate at which it is within :data:`SLACK` of the best method at its best rate."""
    turn = row.metric.better
    plain = sorted((t.choice.lr, turn(t.validation)) for t in row.trials if not t.choice.knobs)
    best = max(turn(t.validation) for r in setting.rows if not r.faults for t in r.trials)
    spreads = [float(np.std(list(r.scores.values()), ddof=1)) for r in setting.rows if len(r.scores) > 1]
    least = best - SLACK * float(np.median(spreads)) if spreads else best
    low = high = max(range(len(plain)), key=lambda i: plain[i][1])
    if plain[low][1] < least:
        return -1.0
    while low > 0 and plain[low - 1][1] >= least:
        low -= 1
    while high < len(plain) - 1 and plain[high + 1][1] >= least:
        high += 1
    return round(math.log10(plain[high][0] / plain[low][0]), 3)
