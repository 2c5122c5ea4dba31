"""Which methods can be told apart: Welch's test of each pair, Holm's correction for a family. Imports numpy and scipy.

Chosen by measurement. With ten equal methods, Welch's t with Holm's correction errs in 2 to 5 % of comparisons at every
n, also where spreads differ or one method is loud; procedures that pool the spreads (Dunnett, Tukey) err in up to 28 %,
choosing the best first and then testing it in 9 to 14 %. Seeds are not paired: two methods' runs of one seed correlate
by .03 to .36 in practice, which is worth less than the degrees of freedom that pairing costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.special import betaincinv, nctdtr, stdtr, stdtrit  # scipy.stats takes half a second to import

from stiefel.compare.analyse.statistics.scores import ENOUGH, exp

ALPHA = 0.05
"""The probability that anything of a family is told apart where all its methods are equal, at most."""
POWER = 0.8
"""The probability with which :func:`detectable` differences are found."""
NODES = 32
"""Quantiles over which the power of a test is averaged."""
EXACT = 1e-12
"""Spread that rounding leaves to equal numbers, relative to their size."""


@dataclass(frozen=True)
class Sample:
    """The scores of one method.

    Args:
        values: one per replicate, finite.
        resolution: the smallest difference that the metric can show: 1 / examples for a fraction of them, else 0.
        parts: the mean score on each part of the test set, where that is known: all replicates share the test set, so
            its sampling error is in no spread over replicates.
        failures: how many replicates failed, and have no value.
        higher_is_better: of the values.
    """

    values: tuple[float, ...]
    resolution: float = 0.0
    parts: tuple[float, ...] = ()
    failures: int = 0
    higher_is_better: bool = True

    @property
    def n(self) -> int:
        """How many replicates there are."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Of the replicates."""
        return float(np.mean(self.values)) if self.values else math.nan

    @property
    def spread(self) -> float:
        """Standard deviation of a replicate, at least the resolution."""
        spread = float(np.std(self.values, ddof=1)) if self.n > 1 else 0.0
        return max(spread, self.resolution, EXACT * max(map(abs, self.values), default=0.0))

    @property
    def exact(self) -> bool:
        """Whether no value varies and the metric's resolution is unknown, so that nothing is known of chance."""
        return self.resolution == 0 and self.spread <= EXACT * max(map(abs, self.values), default=0.0)

    def whole(self, other: Sample) -> Sample:
        """The same with the worst value of both samples for each replicate that failed."""
        worst = (min if self.higher_is_better else max)((*self.values, *other.values))
        return replace(self, values=(*self.values, *(worst,) * self.failures), failures=0)


@dataclass(frozen=True)
class Difference:
    """What one comparison found.

    Args:
        value: the difference of the means, first less second.
        low, high: ends of its interval at the level at which Holm's procedure tested it, so that zero is outside
            exactly where the two are told apart; NaN where n is too small.
        n: replicates of the smaller sample.
        p: of Welch's test, not corrected; NaN where it is not tested.
        apart: whether they are told apart; None where n is too small, or no value varies.
        error, degrees: the difference's standard error and degrees of freedom; NaN where it is not tested.
        level: at which the first of the family is tested.
        ratio: whether the difference was one of logarithms, and is given as a ratio.
    """

    value: float
    low: float
    high: float
    n: int
    p: float
    apart: bool | None
    error: float = math.nan
    degrees: float = math.nan
    level: float = math.nan
    ratio: bool = False

    @property
    def detectable(self) -> float:
        """The smallest difference that a first step finds with probability .8, at the spreads that were seen."""
        if not math.isfinite(self.error):
            return math.nan
        smallest = self.error * _needed_at(self.level, round(self.degrees, 2))
        return exp(smallest) if self.ratio else smallest

    @property
    def exponential(self) -> Difference:
        """A difference of logarithms as a ratio."""
        value, low, high = (exp(x) if math.isfinite(x) else math.nan for x in (self.value, self.low, self.high))
        return replace(self, value=value, low=low, high=high, ratio=True)

    @property
    def turned(self) -> Difference:
        """The second less the first, or the other ratio."""
        if self.ratio:
            value, high, low = (1 / end if end else math.inf for end in (self.value, self.low, self.high))
            return replace(self, value=value, low=low, high=high)
        return replace(self, value=-self.value, low=-self.high, high=-self.low)


def family(pairs: Sequence[tuple[Sample, Sample]], alpha: float = ALPHA) -> list[Difference]:
    """The differences of all pairs that a statement could have been about, corrected for their number.

    Welch: ``t = (x̄ − ȳ) / √(s²/n + u²/m + v)`` with v the variance that the test set's choice gives the difference,
    and Satterthwaite's degrees of freedom. Holm: the smallest of m p-values is tested at α/m, the next at α/(m − 1), …,
    until one fails. Pairs of which one sample has fewer than five replicates, or in which no value varies, are no part
    of the family.

    A method whose worst replicates failed has its better ones to show: tested by these alone, equal methods of which
    the worst three of ten fail are told apart in 18 % of worlds. So where replicates failed, p is the larger of two: of
    those that did not, and of all with the worst value of both samples in place of the failures (below 1 %).

    Args:
        pairs: of samples.
        alpha: the probability of any false statement of the family.

    Source: Welch (1947); Satterthwaite (1946); Holm (1979).
    """
    tested = [i for i, (a, b) in enumerate(pairs) if min(a.n, b.n) >= ENOUGH and not (a.exact and b.exact)]
    difference, error, degrees, p = _welch([pairs[i] for i in tested])
    lame = [k for k, i in enumerate(tested) if pairs[i][0].failures or pairs[i][1].failures]
    whole, _, _, again = _welch([(a.whole(b), b.whole(a)) for a, b in (pairs[tested[k]] for k in lame)])
    for k, other, value in zip(lame, again, whole, strict=True):
        p[k] = max(p[k], other) if value * difference[k] > 0 else 1.0
    found: list[Difference] = [_untested(a, b) for a, b in pairs]
    m, order = len(tested), np.argsort(p, kind="stable")
    steps = alpha / (m - np.arange(m))  # Holm's levels, for the p-values in order
    failed = np.flatnonzero(p[order] > steps)
    rejected = int(failed[0]) if len(failed) else m
    # What follows the first that fails is not tested: its interval has the level of that one.
    levels = np.where(np.arange(m) < rejected, steps, steps[min(rejected, m - 1)] if m else alpha)
    halves = stdtrit(degrees[order], 1 - levels / 2) * error[order]
    for step, k in enumerate(order):
        # A tie within the metric's resolution: the interval holds zero, as the word says.
        half = halves[step] if step < rejected else max(halves[step], abs(difference[k]))
        a, b = pairs[tested[k]]
        n = min(a.n, b.n)
        found[tested[k]] = Difference(
            value=float(difference[k]),
            low=float(difference[k] - half),
            high=float(difference[k] + half),
            n=n,
            p=float(p[k]),
            apart=step < rejected,
            error=float(error[k]),
            degrees=float(degrees[k]),
            level=alpha / m,
        )
    return found


def detectable(spread: float, n: int, pairs: int, alpha: float = ALPHA) -> float:
    """The smallest difference that n replicates of each method find with probability .8, in a family of so many pairs.

    Args:
        spread: standard deviation of a replicate, the same for both.
        n: replicates of each.
        pairs: of the family.
        alpha: of the family.
    """
    return spread * math.sqrt(2 / n) * _needed(alpha / pairs, n - 1)


def mean_parts(runs: Sequence[Sequence[float | None]]) -> tuple[float, ...]:
    """The mean score on each part of the test set; empty where not all have recorded as many parts."""
    if len(set(map(len, runs))) != 1 or any(None in parts for parts in runs):
        return ()
    return tuple(np.mean(np.array(runs, dtype=float), axis=0).tolist())


def shared_variance(parts: Sequence[float], resolution: float) -> float:
    """Variance of a mean over the test set, from its means on equal parts; without them resolution²."""
    if len(parts) < 2:
        return resolution**2
    return max(float(np.var(parts, ddof=1)) / len(parts), resolution**2)


def _welch(pairs: Sequence[tuple[Sample, Sample]]) -> tuple[Any, Any, Any, Any]:
    """Differences, their standard errors and degrees of freedom, and p-values, one of each pair."""
    difference, error, degrees, tie = np.array([_parts(a, b) for a, b in pairs]).reshape(-1, 4).T
    p = np.where(np.abs(difference) < tie, 1.0, 2 * stdtr(degrees, -np.abs(difference) / error))
    return difference, error, degrees, p


def _parts(a: Sample, b: Sample) -> tuple[float, float, float, float]:
    """Difference, its standard error, degrees of freedom, and below what it is a tie."""
    resolution = max(a.resolution, b.resolution)
    both = len(a.parts) == len(b.parts) and len(a.parts) > 1
    # Both were scored on the same examples, so what they share of the examples' luck cancels part by part.
    apart = tuple(np.subtract(a.parts, b.parts)) if both else ()
    terms: list[tuple[float, float]] = [(a.spread**2 / a.n, a.n - 1), (b.spread**2 / b.n, b.n - 1)]
    terms.append((shared_variance(apart, resolution), len(apart) - 1 if both else math.inf))
    variance = sum(v for v, _ in terms)
    degrees = variance**2 / sum(v**2 / nu for v, nu in terms)
    return a.mean - b.mean, math.sqrt(variance), degrees, resolution


def _untested(a: Sample, b: Sample) -> Difference:
    return Difference(a.mean - b.mean, math.nan, math.nan, min(a.n, b.n), math.nan, None)


@lru_cache(maxsize=4096)
def _needed(alpha: float, nu: int) -> float:
    """How many standard errors a difference must have for Welch's test at this level to find it with probability .8.

    For two samples of ν + 1 normal values of one spread. There r = s²/(s² + u²) has the distribution Beta(ν/2, ν/2) and
    is independent of s² + u². Given r, Satterthwaite's degrees of freedom are ν/(r² + (1 − r)²), and the statistic has
    the noncentral t distribution of 2ν degrees, whatever r is.
    """
    from scipy.optimize import brentq

    r = betaincinv(nu / 2, nu / 2, (np.arange(NODES) + 0.5) / NODES)
    critical: Any = stdtrit(nu / (r**2 + (1 - r) ** 2), 1 - alpha / 2)
    most = 10 * float(np.max(critical)) + 10
    return float(brentq(lambda shift: _power(shift, 2 * nu, critical) - POWER, 0.0, most))


@lru_cache(maxsize=65536)
def _needed_at(alpha: float, degrees: float) -> float:
    """The same for known degrees of freedom."""
    from scipy.optimize import brentq

    critical = float(stdtrit(degrees, 1 - alpha / 2))
    return float(brentq(lambda shift: _power(shift, degrees, critical) - POWER, 0.0, 10 * critical + 10))


def _power(shift: float, degrees: float, critical: Any) -> float:
    """The mean probability that a noncentral t lies above critical values."""
    # Where so little is left below that it underflows, the function gives NaN instead of zero.
    return float(np.mean(1 - np.nan_to_num(nctdtr(degrees, shift, critical), nan=0.0)))
