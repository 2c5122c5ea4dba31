"""A step length along a curve of the set, by values and slopes of the loss. Imports ``objective``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from stiefel.optim.solve.objective import Point

FALL, SLOPE = 1e-4, 0.9
"""Weak Wolfe conditions: the part of the predicted fall that must come, and of the first slope that may be left."""
TRIALS = 60


@dataclass(frozen=True)
class Trial:
    """A point along the curve."""

    length: float
    point: Point
    slope: float


def search(
    start: Point, slope: float, first: float, rounding: float, at: Callable[[float], Trial | None]
) -> Trial | None:
    """A step that lowers the loss enough and along which it has stopped falling fast.

    Where two values differ by no more than the loss's rounding they say nothing, and the slope decides (the approximate
    Wolfe condition of Hager and Zhang, 2005): close to a minimum this is what lets the gradient go on to shrink.

    Args:
        start: where the curve begins.
        slope: of the loss along it there, negative.
        first: the first length tried.
        rounding: of the loss's values.
        at: evaluates the loss at a length; None where it is NaN, or evaluations have run out.

    Returns:
        The step; None where no length is accepted.
    """
    low, high, length = Trial(0.0, start, slope), math.inf, first
    for _ in range(TRIALS):
        trial = at(length)
        if trial is None:
            high, length = length, (low.length + length) / 2 if low.length else length / 4
        elif not _falls(start, slope, rounding, trial):
            high, length = length, _shorter(low, trial, rounding)
        elif trial.slope < SLOPE * slope:
            low, length = trial, _longer(low, trial, high)
        else:
            return trial
        if high - low.length <= 1e-14 * low.length or length < 1e-16 * first:
            break
    return low if low.length else None


def _falls(start: Point, slope: float, rounding: float, trial: Trial) -> bool:
    fall = trial.point.loss - start.loss
    return fall <= FALL * trial.length * slope or (fall <= rounding and trial.slope <= (2 * FALL - 1) * slope)


def _shorter(low: Trial, trial: Trial, rounding: float) -> float:
    """The minimizer of the parabola through the lower end's value and slope and this value."""
    gap = trial.length - low.length
    bend = trial.point.loss - low.point.loss - low.slope * gap
    guess = -low.slope * gap**2 / (2 * bend) if bend > rounding else gap / 2
    return low.length + min(max(guess, gap / 10), gap / 2)


def _longer(low: Trial, trial: Trial, high: float) -> float:
    """Where the slope would be 0 if it went on changing as it did."""
    gap = trial.length - low.length
    turn = gap * trial.slope / (low.slope - trial.slope) if trial.slope > low.slope else math.inf
    if high < math.inf:
        inside = high - trial.length
        return trial.length + min(max(turn, inside / 10), inside / 2)
    return trial.length + min(max(turn, gap), 4 * trial.length)
