"""Scores over runs with bootstrap intervals, and whether two scores differ significantly. Imports numpy and scipy."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

Statistic = Callable[..., Any]

_FAR = 1e30  # stands for infinity while resampling: infinities cannot be subtracted or interpolated
_BOOTSTRAP: dict[str, Any] = {"n_resamples": 1000, "method": "percentile", "vectorized": True, "rng": 0}
# Every interval found so far: reports ask for the same ones many times.
_KNOWN: dict[tuple[Statistic, tuple[float, ...]], Interval] = {}


def iqm(values: Any, axis: int = -1) -> Any:
    """Interquartile mean: without the quarter of the runs at each end; of fewer than four runs the mean."""
    from scipy.stats import trim_mean  # scipy.stats is slow to import, and most imports of this module need no score

    return trim_mean(values, 0.25, axis=axis)


def median(values: Any, axis: int = -1) -> Any:
    """Median; of an even number of runs the mean of the middle two."""
    return np.median(values, axis=axis)


@dataclass(frozen=True)
class Interval:
    """A score of n runs with its 95 % percentile bootstrap interval; the ends are None for n < 2.

    A run that failed counts as infinite, on the side that is worst, so that the score and its ends may be infinite.
    """

    value: float
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, values: Iterable[float], statistic: Statistic = iqm) -> Interval:
        """The score of at least one run, resampled with a fixed seed."""
        sample = tuple(values)
        resample([sample], statistic)
        return _KNOWN[statistic, sample]

    @property
    def finite(self) -> bool:
        """Whether the score is a number: not too many runs have failed."""
        return math.isfinite(self.value)

    def format(self, form: str | None = None) -> str:
        """The score and its ends, with as many decimals as tell the ends apart where no form is given."""
        decimals = form or (".3f" if 0.01 <= abs(self.value) < 100 or not self.finite else ".4g")
        if self.low is None or self.high is None:
            return _number(self.value, decimals)
        width = self.high - self.low if math.isfinite(self.low) and math.isfinite(self.high) else 0.0
        if form is None and width > 0 and decimals == ".3f":
            # The place of the first digit of the width: 0.00002 takes five decimals.
            decimals = f".{max(3, math.ceil(-math.log10(width)))}f"
        low, high = (_number(end, decimals) for end in (self.low, self.high))
        return f"{_number(self.value, decimals)} [{low}, {high}]"

    __str__ = format


def distinguishable(first: Mapping[int, float], second: Mapping[int, float], statistic: Statistic = iqm) -> bool:
    """Whether the 95 % bootstrap interval of the difference of two scores excludes zero.

    The runs are paired by seed: those of one seed share start and batches. At least two pairs are needed.

    Args:
        first, second: results by seed; infinite where the run failed.
        statistic: of the score.
    """
    seeds = sorted(first.keys() & second.keys())
    return _distinguishable(tuple(first[s] for s in seeds), tuple(second[s] for s in seeds), statistic)


def resample(samples: Iterable[Iterable[float]], statistic: Statistic = iqm) -> None:
    """Find the intervals of many samples together, which is faster: :meth:`Interval.of` then has them at hand."""
    sizes = defaultdict(set)
    for sample in map(tuple, samples):
        if (statistic, sample) not in _KNOWN:
            sizes[len(sample)].add(sample)
    # Samples of one size form an array (sample, run). The set does not change, so both iterations have one order.
    for n, group in sizes.items():
        for sample, interval in zip(group, _intervals(np.clip(list(group), -_FAR, _FAR), n, statistic), strict=True):
            _KNOWN[statistic, sample] = interval


def _intervals(values: Any, n: int, statistic: Statistic) -> Iterator[Interval]:
    """The intervals of the rows of an array (sample, run)."""
    found = [_back(value) for value in statistic(values)]
    if n < 2:
        yield from (Interval(value, None, None, n) for value in found)
        return
    from scipy.stats import bootstrap

    # scipy draws one set of indices for all rows, with a fixed seed: a sample has the same interval in any company.
    ends = bootstrap((values,), statistic, axis=-1, **_BOOTSTRAP).confidence_interval
    for value, sample, low, high in zip(found, values, ends.low, ends.high, strict=True):
        same = bool((sample == sample[0]).all())  # their mean may round differently
        yield Interval(value, value, value, n) if same else Interval(value, _back(low), _back(high), n)


@lru_cache(maxsize=4096)
def _distinguishable(first: tuple[float, ...], second: tuple[float, ...], statistic: Statistic) -> bool:
    # (run,) each, paired: a resample takes both results of a seed, so that what the seed does to both cancels.
    if len(first) < 2 or first == second:
        return False
    from scipy.stats import bootstrap

    def difference(a: Any, b: Any, axis: int = -1) -> Any:
        return statistic(a, axis) - statistic(b, axis)

    # ∞ − ∞ would be NaN; clipped, two runs that both failed have no difference.
    samples = tuple(np.clip(sample, -_FAR, _FAR) for sample in (first, second))
    ends = bootstrap(samples, difference, paired=True, **_BOOTSTRAP).confidence_interval
    return not ends.low <= 0 <= ends.high


def _back(value: float) -> float:
    """Undo the clipping of infinities: a number beyond 1e15 comes from runs that were infinite."""
    return float(value) if abs(value) < math.sqrt(_FAR) else math.copysign(math.inf, value)


def _number(value: float, form: str) -> str:
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:{form}}"
