"""A score and what stands behind it: means with t intervals, ranges of few runs, digits that mean something."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from stiefel.compare.analyse.statistics.scores import Interval, decimals


def test_the_interval_of_a_mean_is_that_of_student():
    values = np.random.default_rng(0).normal(0.8, 0.02, size=7)
    found = Interval.mean(values)
    ends = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (found.value, found.n, found.kind) == (pytest.approx(values.mean()), 7, "interval")
    assert (found.low, found.high) == (pytest.approx(ends.low), pytest.approx(ends.high))


@pytest.mark.parametrize("n", [5, 10])
def test_it_holds_the_truth_in_95_of_100(n):
    rng = np.random.default_rng(1)
    found = [Interval.mean(values) for values in rng.normal(size=(2000, n))]
    inside = np.mean([interval.low <= 0 <= interval.high for interval in found])
    assert abs(inside - 0.95) < 4 * math.sqrt(0.05 * 0.95 / 2000)


def test_few_runs_have_a_range():
    found = Interval.mean([0.7, 0.9, 0.8])
    assert (found.value, found.low, found.high, found.kind) == (pytest.approx(0.8), 0.7, 0.9, "range")
    assert str(found) == "0.80 (0.70–0.90)"
    assert str(Interval.mean([0.5])) == "0.500"


def test_the_resolution_and_the_test_set_widen_it():
    same = Interval.mean([0.75] * 5, resolution=1 / 360)
    assert same.high - same.low == pytest.approx(2 * stats.t.ppf(0.975, 4) / 360 / math.sqrt(5))
    wide = Interval.mean([0.75] * 5, resolution=1 / 360, shared=0.02**2)
    assert wide.high - wide.low > 0.1
    assert Interval.mean([0.75] * 5).high == 0.75


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        (Interval(0.81234, 0.80011, 0.82457, 10, "interval"), "0.812 [0.800, 0.825]"),
        (Interval(0.71, 0.54, 0.88, 5, "interval"), "0.71 [0.54, 0.88]"),
        (Interval(0.00472, 0.00451, 0.00493, 5, "interval"), "0.00472 [0.00451, 0.00493]"),
        (Interval(47.3, 36.1, 58.6, 5, "interval"), "47 [36, 59]"),
        (Interval(-0.8, -7.1, 5.5, 5, "interval"), "−0.8 [−7.1, 5.5]"),
        (Interval(120.0, 90.0, math.inf, 5), "120 (90–∞)"),
        (Interval(math.inf, math.inf, math.inf, 5), "∞"),
        (Interval(0.5, 0.5, 0.5, 5, "interval"), "0.500"),
    ],
)
def test_an_interval_in_words_has_the_digits_that_it_knows(interval, words):
    assert str(interval) == words


def test_what_is_not_reached_is_said_in_words():
    found = Interval.median([20.0, 40.0, math.inf])
    assert found.format(".0f", "not reached") == "40 (20–not reached)"
    assert Interval.median([math.inf] * 3).format(".0f", "not reached") == "not reached"


def test_means_of_logarithms_map_back():
    found = Interval.mean(np.log([1e-4, 1e-3, 1e-2, 1e-3, 1e-3])).map(math.exp)
    assert found.value == pytest.approx(1e-3)
    assert 0 < found.low < found.value < found.high


@pytest.mark.parametrize(("value", "half", "form"), [(0.0, 0.0, ".3g"), (0.5, 0.0, ".3f"), (1234.0, 0.0, ".3g")])
def test_without_a_width_three_digits_are_shown(value, half, form):
    assert decimals(value, half) == form
