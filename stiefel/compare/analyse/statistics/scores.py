"""A score of several runs: their mean with a t interval, or their range where they are few. Imports numpy and scipy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.special import stdtrit

ENOUGH = 5
"""Runs from which on there is an interval, and a verdict. Of ten equal methods n = 3 tells some apart in a third of all
comparisons, by any test, where three equal accuracies are likely."""
LEVEL = 0.95
LEAST = 2.0**-52
"""The smallest score on a log scale: the rounding of 1 in double precision."""
DIGITS = 2
"""Significant digits of an interval's half-width: more are noise."""

Kind = Literal["interval", "range", "quartiles", "none"]


@dataclass(frozen=True)
class Metric:
    """What is compared.

    Args:
        name: as the problem calls it.
        higher_is_better: of its values.
        log_scale: whether they span decades, so that ratios are compared and means are geometric.
        resolution: the smallest difference that it can show: 1 / examples of the test set where it is a fraction of
            them, else 0.
    """

    name: str = "metric"
    higher_is_better: bool = True
    log_scale: bool = False
    resolution: float = 0.0

    @property
    def worst(self) -> float:
        """The value of a failed run."""
        return -math.inf if self.higher_is_better else math.inf

    def log(self, value: float) -> float:
        """The logarithm of a score; a gap that rounding made zero or negative counts as the rounding of 1."""
        return math.log(max(value, LEAST))

    def better(self, value: float) -> float:
        """A value turned so that more is better."""
        return value if self.higher_is_better else -value


@dataclass(frozen=True)
class Interval:
    """A score of n runs and two ends.

    Args:
        value: the score.
        low, high: the ends of the 95 % t interval of a mean, of the runs' range, or quartiles; None where n is 1.
        n: the number of runs.
        kind: what the ends are.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    kind: Kind = "range"

    @classmethod
    def mean(cls, values: Iterable[float], resolution: float = 0.0, shared: float = 0.0) -> Interval:
        """The mean, and ``mean ± t √(s²/n + v)`` from n = 5 on, the range of the runs below.

        Args:
            values: at least one, all finite.
            resolution: the smallest difference that the metric can show; s is at least as large.
            shared: v, the variance that all runs share, as that of the examples of the test set.
        """
        sample = [float(value) for value in values]
        n, middle = len(sample), float(np.mean(sample))
        if n < ENOUGH:
            return cls.range(middle, sample)
        spread = max(float(np.std(sample, ddof=1)), resolution)
        half = float(_quantile(LEVEL, n - 1)) * math.sqrt(spread**2 / n + shared)
        return cls(middle, middle - half, middle + half, n, "interval")

    @classmethod
    def median(cls, values: Iterable[float]) -> Interval:
        """The median and the range; values may be infinite."""
        sample = [float(value) for value in values]
        return cls.range(float(np.median(sample)), sample)

    @classmethod
    def range(cls, value: float, sample: Sequence[float]) -> Interval:
        """A score, and the range of its runs."""
        if len(sample) < 2:
            return cls(value, None, None, len(sample), "none")
        return cls(value, min(sample), max(sample), len(sample), "range")

    def map(self, function: Callable[[float], float]) -> Interval:
        """The same with an increasing function applied to the score and its ends."""
        low, high = (None if end is None else function(end) for end in (self.low, self.high))
        return replace(self, value=function(self.value), low=low, high=high)

    @property
    def finite(self) -> bool:
        """Whether the score is a number."""
        return math.isfinite(self.value)

    def format(self, form: str | None = None, infinite: str = "∞") -> str:
        """The score and its ends: ``0.812 [0.800, 0.824]``, or ``0.81 (0.80–0.83)`` for a range.

        Args:
            form: of each number; default: as many decimals as the half-width has significant digits.
            infinite: what stands for infinity.
        """
        form = form or self._decimals()
        if self.low is None or self.high is None:
            return number(self.value, form, infinite)
        value, low, high = (number(part, form, infinite) for part in (self.value, self.low, self.high))
        if low == high == value:
            return value
        return f"{value} [{low}, {high}]" if self.kind == "interval" else f"{value} ({low}–{high})"

    __str__ = format

    def _decimals(self) -> str:
        ends = (self.low, self.high)
        known = [end for end in ends if end is not None and math.isfinite(end)]
        half = (known[1] - known[0]) / 2 if len(known) == 2 else 0.0
        return decimals(self.value, half)


def exp(value: float) -> float:
    """``e`` to a power; infinite where that is too large for a number, as the end of an interval may be."""
    return math.exp(value) if value < 700 or math.isnan(value) else math.inf


def decimals(value: float, half: float) -> str:
    """The form of a number that is known to within ``half``: decimals until the second digit of that."""
    if not math.isfinite(value) or value == 0 == half:
        return ".3g"
    if half <= 0:
        return ".3f" if 0.01 <= abs(value) < 100 else ".3g"
    places = DIGITS - 1 - math.floor(math.log10(half))
    if not -4 < math.log10(abs(value) or 1) < 5 or places > 6:
        digits = max(1, places + 1 + math.floor(math.log10(abs(value) or 1)))
        return f".{digits}g"
    return f".{max(0, places)}f"


def number(value: float, form: str, infinite: str = "∞") -> str:
    """A number in a form, or the word for infinity."""
    if math.isinf(value):
        return infinite if value > 0 else f"−{infinite}"
    return f"{value:{form}}".replace("-", "−") if not form.endswith("g") else f"{value:{form}}"


def _quantile(level: float, degrees: float) -> float:
    return float(stdtrit(degrees, 0.5 + level / 2))
