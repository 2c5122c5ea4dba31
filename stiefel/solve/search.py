"""A step length along a curve of the set, by values and slopes of the loss. Imports ``objective`` and ``blocks``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from stiefel.solve.blocks import Vector
from stiefel.solve.objective import Point

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
    start: Point,
    direction: Vector,
    slope: float,
    first: float,
    rounding: float,
    at: Callable[[float], Trial | None],
) -> Trial | None:
    """A step that lowers the loss enough and along which it has stopped falling fast.

    Where two values differ by no more than the loss's rounding they say nothing, and the slope decides (the approximate
    Wolfe condition of Hager and Zhang, 2005): close to a minimum this is what lets the gradient go on to shrink.

    Args:
        start: where the curve begins.
        direction: a tangent vector there.
        slope: of the loss along it, negative.
        first: the first length tried.
        rounding: of the loss's values.
        at: evaluates the loss at a length; None where it is NaN, or evaluations have run out.

    Returns:
        The step; None where no length is accepted.
    """
    low, high, length = 0.0, math.inf, first
    low_slope, low_loss = slope, start.loss
    best: Trial | None = None
    for _ in range(TRIALS):
        trial = at(length)
        if trial is None:
            high = length
            length = (low + high) / 2 if low > 0 else length / 4
            if length < 1e-16 * first:
                return best
            continue
        fall = trial.point.loss - start.loss
        falls = fall <= FALL * length * slope or (fall <= rounding and trial.slope <= (2 * FALL - 1) * slope)
        if not falls:
            # The minimizer of the parabola through the lower end's value and slope and this value.
            high, gap = length, length - low
            bend = trial.point.loss - low_loss - low_slope * gap
            guess = -low_slope * gap**2 / (2 * bend) if bend > rounding else gap / 2
            length = low + min(max(guess, gap / 10), gap / 2)
        elif trial.slope < SLOPE * slope:
            best = trial
            gap = length - low
            # Where the slope would be 0 if it went on changing as it did.
            turn = gap * trial.slope / (low_slope - trial.slope) if trial.slope > low_slope else math.inf
            low, low_slope, low_loss = length, trial.slope, trial.point.loss
            if high < math.inf:
                inside = high - low
                length = low + min(max(turn, inside / 10), inside / 2)
            else:
                length = low + min(max(turn, gap), 4 * low)
        else:
            return trial
        if high - low <= 1e-14 * max(high if high < math.inf else low, 1e-300):
            return best
    return best
