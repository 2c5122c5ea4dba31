"""What tuning tries next for one method: beyond an edge, between rates, then the method's own knobs.

Imports ``record`` and ``methods``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from stiefel.compare.record.choice import Choice
from stiefel.compare.record.spec import RunSpec
from stiefel.errors import OptionError
from stiefel.methods import get

REACH = 1e3
"""How far beyond its ends a grid may be continued."""
BRACKET = 2.0
"""Ratio of neighbouring rates at which the best one counts as found: knobs wait for it, as the rate matters more."""
FINEST = 8
"""How often the step of a grid is halved at most, to find a rate that has not been tried."""


def following(cell: RunSpec, best: Choice, tried: AbstractSet[Choice], grid: Sequence[float]) -> Iterator[Choice]:
    """Trials that may follow, those of one kind at a time, because the best may move with them.

    A rate beyond those tried where the best lies on their edge; else rates half-way to its neighbours where these are
    more than a factor of 2 away; else other values of the method's knobs in turn, nearest first, then rates in between.

    Args:
        cell: the method in its setting.
        best: of what was tried.
        tried: all choices so far, ``best`` among them.
        grid: the rates that every method starts with.
    """
    rates = sorted(choice.lr for choice in tried if not choice.knobs)
    if not best.knobs:
        first = beyond(best.lr, rates, grid) or _unbracketed(best.lr, rates)
        if first:
            yield from map(Choice, first)
            return
    for knob, value in _other_values(cell):
        choice = Choice(best.lr, ((knob, value),))
        if choice not in tried:
            yield choice
    for exponent in _between():
        lr = _rounded(best.lr * step_of(grid) ** exponent, grid)
        if lr not in rates:
            rates.append(lr)
            yield Choice(lr)


def _between() -> Iterator[float]:
    """Steps of the grid away from the best rate: halves, then quarters, then eighths, nearest to the middle first."""
    for level in range(1, FINEST + 1):
        parts = 2**level
        for odd in sorted(range(1, parts, 2), key=lambda odd: abs(odd - parts / 2)):
            yield from (odd / parts, -odd / parts)


def beyond(lr: float, rates: Sequence[float], grid: Sequence[float]) -> list[float]:
    """The next rate beyond each end of those tried at which the best lies; none three decades beyond the grid."""
    found = []
    if lr == rates[-1] and lr < max(grid) * REACH:
        found.append(_rounded(lr * _stride(grid), grid))
    if lr == rates[0] and lr > min(grid) / REACH:
        found.append(_rounded(lr / _stride(grid), grid))
    return [rate for rate in found if rate not in rates]


def continued(grid: Sequence[float]) -> frozenset[float]:
    """The rates by which :func:`beyond` continues a grid whose best rate lies on its edge again and again."""
    stride, low, high = _stride(grid), min(grid), max(grid)
    above, below = [high], [low]
    while above[-1] < high * REACH:
        above.append(_rounded(above[-1] * stride, grid))
    while below[-1] > low / REACH:
        below.append(_rounded(below[-1] / stride, grid))
    return frozenset((*above[1:], *below[1:]))


def _stride(grid: Sequence[float]) -> float:
    """The factor by which a grid is continued: its step, or 2 where that is less, so that it gets somewhere."""
    return max(step_of(grid), BRACKET)


def step_of(grid: Sequence[float]) -> float:
    """The ratio of neighbouring rates of a grid."""
    span = max(grid) / min(grid)
    return float(span ** (1 / (len(grid) - 1))) if span > 1 else 10**0.5


def _unbracketed(lr: float, rates: list[float]) -> list[float]:
    """Rates half-way to the neighbours of the best that are further away than a factor of 2."""
    at = rates.index(lr)
    neighbours = [*rates[max(0, at - 1) : at], *rates[at + 1 : at + 2]]
    # Rounded rates may be a little further apart than a factor of exactly 2.
    far = [other for other in neighbours if max(lr / other, other / lr) > 1.05 * BRACKET]
    return [float(f"{math.sqrt(lr * other):.2g}") for other in far]


def _other_values(cell: RunSpec) -> Iterator[tuple[str, Any]]:
    """Other values of a method's knobs, each valid alone: one of each knob in turn, nearest numbers first."""
    method = get(cell.method, **cell.options)
    columns = []
    for knob, values in method.tuning.items():
        now = getattr(method, knob)
        others = [v for v in values if knob not in cell.options and v != now and _valid(cell, knob, v)]
        if all(isinstance(v, (int, float)) and v > 0 for v in (now, *others)):
            others = [v for _, v in sorted((abs(math.log(v / now)), v) for v in others)]
        columns.append([(knob, value) for value in others])
    for row in itertools.zip_longest(*columns):
        yield from filter(None, row)


def _valid(cell: RunSpec, knob: str, value: Any) -> bool:
    try:
        get(cell.method, **{**cell.options, knob: value})
    except OptionError:
        return False
    return True


def _rounded(rate: float, grid: Sequence[float]) -> float:
    """Two significant digits, more where the grid's steps are small: rates that people can write, equal everywhere."""
    # A step of a factor 1.5 needs two digits to tell its halves apart, one of 1.05 three.
    digits = 2 + max(0, math.ceil(-math.log10(2 * math.log(step_of(grid)))))
    return float(f"{rate:.{digits}g}")
