"""The line search alone, on functions of one number: what it returns satisfies the conditions that it promises."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.optim.solve.objective import Point
from stiefel.optim.solve.search import FALL, SLOPE, TRIALS, Trial, search

SHAPES = {
    "bowl": lambda t: (t - 1) ** 2,
    "quartic": lambda t: (t - 1) ** 4 + 0.01 * (t - 1) ** 2,
    "concave, then up": lambda t: -(t**2) + 0.1 * t**4 - 0.1 * t,
    "nearly flat": lambda t: torch.log(torch.cosh(t - 1)) * 1e-6,
    "wavy": lambda t: (t - 1) ** 2 + 0.05 * torch.sin(20 * t) - 0.5 * t,
    "kink": lambda t: (t - 1).abs(),
    "pole": lambda t: -t - 0.1 * torch.log(2 - t),
}


def run(shape, width, first):
    """The search along f(t/width) from 0."""
    trials = []

    def at(length: float) -> Trial | None:
        t = torch.tensor(length / width, dtype=torch.float64, requires_grad=True)
        value = SHAPES[shape](t)
        (slope,) = torch.autograd.grad(value, t)
        trials.append(length)
        if not math.isfinite(float(value.detach())):
            return None
        return Trial(length, Point([], float(value.detach()), [], [], 0.0, 0.0, 0.0), float(slope) / width)

    start = at(0.0)
    found = search(start.point, start.slope, first, 1e-15 * abs(start.point.loss), at)
    return start, found, len(trials) - 1


@pytest.mark.parametrize("shape", SHAPES)
@given(width=st.floats(1e-6, 1e6), first=st.floats(1e-3, 1e3))
@settings(max_examples=60, deadline=None)
def test_the_step_falls_enough_and_the_slope_is_spent(shape, width, first):
    start, found, trials = run(shape, width, first)
    assert found is not None
    assert found.point.loss <= start.point.loss + FALL * found.length * start.slope
    assert found.slope >= SLOPE * start.slope
    assert trials < TRIALS


@given(far=st.floats(10, 1e6))
@settings(max_examples=60, deadline=None)
def test_a_step_far_too_short_grows(far):
    """As where the loss bends downwards, so that no pair of the past says how long a step should be."""
    _, found, trials = run("concave, then up", far, 1.0)
    assert found.length > far / 2
    assert trials < 4 + math.log2(far)


def test_where_values_say_nothing_the_slope_decides():
    def at(length: float) -> Trial:
        return Trial(length, Point([], 1.0, [], [], 0.0, 0.0, 0.0), length - 1)  # the loss is its rounding everywhere

    found = search(at(0.0).point, -1.0, 1.0, 1e-15, at)
    assert found.length == 1.0
    assert search(at(0.0).point, -1.0, 1.0, -1.0, at) is None  # with none to spare, no step falls enough
