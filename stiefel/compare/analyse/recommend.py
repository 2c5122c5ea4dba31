"""Which method to take under which requirement, with the evidence. Imports ``summary`` and ``scores``."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from stiefel.compare.analyse.rows import TOLERANCES, Row, powers
from stiefel.compare.analyse.scores import Interval, distinguishable, iqm, median
from stiefel.compare.analyse.summary import Setting, Summary


@dataclass(frozen=True)
class Candidate:
    """A method at a scale, over one or more points of the grid: results are means over the points, seed by seed.

    Args:
        rows: its row at each point.
        scale: the scale; empty where all candidates share it.
    """

    rows: tuple[Row, ...]
    scale: str = ""

    @property
    def name(self) -> str:
        """The method with its options, and its scale where that is a choice too."""
        return self.rows[0].label + (f" at scale {self.scale}" if self.scale else "")

    @property
    def control(self) -> bool:
        """Whether it is the unconstrained control: a reference, not an answer."""
        return self.rows[0].control

    @property
    def faulty(self) -> bool:
        """Whether it is a baseline with known faults."""
        return any(row.faults for row in self.rows)

    @cached_property
    def scores(self) -> dict[int, float]:
        """Test metric by seed."""
        return self._mean([row.scores for row in self.rows])

    @cached_property
    def seconds(self) -> dict[int, float]:
        """Training seconds to the target by seed."""
        return self._mean([row.seconds for row in self.rows])

    @property
    def score(self) -> Interval | None:
        """Interquartile mean over seeds."""
        return Interval.of(self.scores.values(), iqm) if self.scores else None

    @property
    def seconds_to_target(self) -> Interval | None:
        """Median over seeds."""
        return Interval.of(self.seconds.values(), median) if self.seconds else None

    @property
    def trained(self) -> bool:
        """Whether it has a finite score."""
        return self.score is not None and self.score.finite

    @property
    def reached(self) -> bool:
        """Whether its median run reaches the target at every point."""
        return all(row.reached for row in self.rows)

    @property
    def error(self) -> float:
        """Largest orthogonality error of any run at any time."""
        return max(row.error_worst for row in self.rows)

    @property
    def step(self) -> Interval | None:
        """Step time as a multiple of the control's, and its quartiles over n steps; geometric means over points."""
        # Each time is relative to the control's in the same process: points timed on different machines compare.
        # Ratios are averaged by their logarithms: 2× and 0.5× give 1×.
        costs = [row.cost for row in self.rows]
        if not all(costs):
            return None
        known = [cost for cost in costs if cost is not None]  # all of them; says so to the type checker
        ratio, low, high = (
            float(np.exp(np.mean([math.log(cost.step[end] / cost.control["median"]) for cost in known])))
            for end in ("median", "q1", "q3")
        )
        return Interval(ratio, low, high, int(min(cost.step["n"] for cost in known)))

    @property
    def failures(self) -> int:
        """Reported runs that did not end in ``done``."""
        return sum(sum(row.failures.values()) for row in self.rows)

    @property
    def runs(self) -> int:
        """How many runs are reported."""
        return sum(row.runs for row in self.rows)

    @property
    def choice(self) -> str:
        """What tuning chose, at each point where that differs."""
        return " | ".join(dict.fromkeys(str(row.choice) for row in self.rows))

    @staticmethod
    def _mean(results: Sequence[dict[int, float]]) -> dict[int, float]:
        # Only seeds that ran at every point: otherwise the means of different seeds would not be comparable.
        seeds = sorted(set.intersection(*map(set, results)))
        return {seed: float(np.mean([result[seed] for result in results])) for seed in seeds}


@dataclass(frozen=True)
class Recommendation:
    """The best candidate under one requirement.

    Args:
        requirement: in words.
        best: the candidate, or None.
        rivals: others that meet the requirement and are not distinguishable from the best, nearest first.
        evidence: the best's value of what was compared, where that is not the score.
        reason: why there is no candidate.
    """

    requirement: str
    best: Candidate | None
    rivals: tuple[Candidate, ...]
    evidence: str
    reason: str


def recommend(candidates: Iterable[Candidate], higher_is_better: bool, target: bool) -> list[Recommendation]:
    """The best candidate under each requirement; the control is no candidate.

    Args:
        candidates: what there is to choose from; those with known faults are left out.
        higher_is_better: of the score.
        target: whether the problem has a target to reach.
    """
    known = [c for c in candidates if c.trained and not c.control and not c.faulty]
    sign = -1.0 if higher_is_better else 1.0  # `_choose` takes the smallest value

    def by_score(c: Candidate) -> float:
        return sign * c.score.value if c.score is not None else math.inf

    def same_score(best: Candidate, other: Candidate) -> bool:
        return not distinguishable(best.scores, other.scores)

    found = []
    for words, tolerance in zip(("exactly feasible", "feasible"), TOLERANCES, strict=True):
        within = [c for c in known if c.error <= tolerance]
        requirement, missing = f"{words} (error ≤ {powers(tolerance)})", "no method keeps the error there in every run"
        found.append(_choose(requirement, within, by_score, same_score, missing, lambda c: ""))
    found.append(_choose("best metric", known, by_score, same_score, "no method has a score", lambda c: ""))
    # A method that never reaches the target must not win by its cheap step.
    reaching = [c for c in known if c.reached] if target else known
    missed = "" if reaching else "no method reaches the target in its median run" if known else "no method has a score"
    found.append(
        _choose(
            "cheapest step that reaches the target" if target else "cheapest step",
            [c for c in reaching if c.step is not None],
            lambda c: c.step.value if c.step is not None else math.inf,
            _overlap,
            missed or "there is no cost pass for these methods",
            lambda c: f"{c.step.value:.2f}× the control's step" if c.step else "",
        )
    )
    if target:
        found.append(
            _choose(
                "fewest seconds to the target",
                reaching,
                lambda c: c.seconds_to_target.value if c.seconds_to_target is not None else math.inf,
                lambda best, other: not distinguishable(best.seconds, other.seconds, median),
                missed,
                lambda c: f"{c.seconds_to_target} s" if c.seconds_to_target else "",
            )
        )
    return found


def in_setting(summary: Summary, setting: Setting) -> list[Recommendation]:
    """Recommendations in one setting."""
    candidates = [Candidate((row,)) for row in setting.rows]
    return recommend(candidates, summary.higher_is_better, setting.target is not None)


def overall(summary: Summary) -> list[Recommendation]:
    """Recommendations over all points of a problem's grid, the scale being part of the choice."""
    return recommend(candidates(summary), summary.higher_is_better, any(s.target is not None for s in summary.settings))


def candidates(summary: Summary) -> list[Candidate]:
    """Each method at each scale that has a row at every point of the grid."""
    rows: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for setting in summary.settings:
        for row in setting.rows:
            rows[row.label, setting.scale].append(row)
    # Points and scales that occur at all: a candidate must have a row at each of the points.
    points = {setting.point for setting in summary.settings}
    scales = {setting.scale for setting in summary.settings}
    return [
        Candidate(tuple(found), scale if len(scales) > 1 else "")
        for (_, scale), found in rows.items()
        if len(found) == len(points)  # a mean over fewer, maybe easier, points would not compare
    ]


def reference(found: Iterable[Candidate], higher_is_better: bool) -> Candidate | None:
    """The unconstrained control's best candidate."""
    sign = -1.0 if higher_is_better else 1.0
    known = [c for c in found if c.control and c.score is not None]
    return min(known, key=lambda c: sign * c.score.value if c.score else math.inf, default=None)


def _choose(
    requirement: str,
    found: list[Candidate],
    value: Callable[[Candidate], float],
    same: Callable[[Candidate, Candidate], bool],
    reason: str,
    evidence: Callable[[Candidate], str],
) -> Recommendation:
    # Ranked by what is compared, smallest first; the first is the best, and `same` tells who is level with it.
    # Ties: fewer failures, then the cheaper step, then the name, so that the order is reproducible.
    ranked = sorted(found, key=lambda c: (value(c), c.failures, c.step.value if c.step else math.inf, c.name))
    if not ranked:
        return Recommendation(requirement, None, (), "", reason)
    best, *others = ranked
    rivals = tuple(other for other in others if same(best, other))
    return Recommendation(requirement, best, rivals, evidence(best), "")


def _overlap(best: Candidate, other: Candidate) -> bool:
    """Whether the quartiles of two step times overlap."""
    # The best has the smaller median, so its upper quartile and the other's lower one decide. Where one is not known,
    # the two count as equal.
    a, b = best.step, other.step
    return a is None or b is None or a.high is None or b.low is None or b.low <= a.high
