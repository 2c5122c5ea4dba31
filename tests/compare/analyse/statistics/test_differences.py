"""What may be said of methods' scores: no more than one comparison in twenty says anything of equal methods.

Each test of false statements draws worlds in which all methods are equal and counts those in which anything is told
apart, in the family against the control and in that of all pairs. 5 % are allowed; what fails is 8 %.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from stiefel.compare.analyse.statistics.differences import Sample, detectable, family, shared_variance

FALSE = 0.08
"""Share of worlds with a false statement at which a test fails: 5 % and what so few worlds may add by chance."""


def false_rates(draw, worlds: int, seed: int = 0) -> tuple[float, float]:
    """Shares of worlds in which equal methods are told apart: from the control (the first), and in any pair."""
    rng = np.random.default_rng(seed)
    found = np.zeros(2)
    for _ in range(worlds):
        samples = [Sample(tuple(values)) for values in draw(rng)]
        controlled = [(sample, samples[0]) for sample in samples[1:]]
        pairs = list(itertools.combinations(samples, 2))
        found += [any(d.apart for d in family(of)) for of in (controlled, pairs)]
    return tuple(found / worlds)


def normal(k, n, spreads=1.0):
    return lambda rng: rng.normal(size=(k, n)) * np.broadcast_to(np.atleast_1d(spreads), k)[:, None]


def loud(k, n):
    """The control varies four times as much as the others, as an unstable network does."""
    return normal(k, n, [4.0] + [1.0] * (k - 1))


def rising(k, n):
    return normal(k, n, np.linspace(1, 4, k))


def heavy(k, n):
    return lambda rng: rng.standard_t(3, size=(k, n))


def accuracies(k, n, examples=360, p=0.97):
    return lambda rng: rng.binomial(examples, p, size=(k, n)) / examples


def tuned(k, n, rates=7, gap=0.6):
    """Equal response curves: each replicate tunes by one noisy value per rate, then runs at what that chose."""
    curve = -gap * np.abs(np.arange(rates) - rates // 2) ** 1.5

    def draw(rng):
        chosen = (curve + rng.normal(size=(k, n, rates))).argmax(-1)
        return curve[chosen] + rng.normal(size=(k, n))

    return draw


def tuned_once(k, n, rates=7, gap=0.6):
    """The same with one tuning for all replicates."""
    curve = -gap * np.abs(np.arange(rates) - rates // 2) ** 1.5

    def draw(rng):
        chosen = (curve + rng.normal(size=(k, rates))).argmax(-1)
        return curve[chosen][:, None] + rng.normal(size=(k, n))

    return draw


@pytest.mark.sampled(4, values=False)
@pytest.mark.parametrize("n", [5, 10])
@pytest.mark.parametrize("k", [2, 3, 5, 10, 20])
def test_equal_methods_are_not_told_apart(k, n):
    assert max(false_rates(normal(k, n), 800 if k < 10 else 300)) <= FALSE


@pytest.mark.sampled(4)
@pytest.mark.parametrize("n", [5, 10])
@pytest.mark.parametrize("draw", [loud, rising, heavy, accuracies, tuned], ids=lambda draw: draw.__name__)
def test_nor_are_they_where_spreads_differ_tails_are_heavy_or_each_replicate_is_tuned(draw, n):
    assert max(false_rates(draw(10, n), 400)) <= FALSE


def test_one_tuning_for_all_replicates_would_tell_equal_methods_apart():
    """Why a replicate is a study: the same test of methods that were tuned once is wrong in a fifth of comparisons."""
    assert false_rates(tuned_once(10, 10), 300)[0] > 0.2


@pytest.mark.parametrize("n", [5, 10])
@pytest.mark.parametrize("k", [2, 4, 10])
def test_the_stated_difference_is_found_four_times_in_five(k, n):
    rng, size, found, worlds = np.random.default_rng(1), detectable(1.0, n, k - 1), 0, 1500
    for _ in range(worlds):
        samples = [Sample(tuple(values)) for values in rng.normal(size=(k, n))]
        moved = Sample(tuple(np.array(samples[1].values) + size))
        found += family([(sample, samples[0]) for sample in (moved, *samples[2:])])[0].apart
    assert found / worlds >= 0.8 - 2.5 * math.sqrt(0.8 * 0.2 / worlds)


def test_the_difference_that_is_stated_is_that_of_its_own_spreads():
    rng = np.random.default_rng(2)
    a, b = (Sample(tuple(rng.normal(scale=3.0, size=400))) for _ in range(2))
    (d,) = family([(a, b)])
    assert d.detectable == pytest.approx(detectable(3.0, 400, 1), rel=0.05)
    assert detectable(1.0, 5, 45) > detectable(1.0, 5, 9) > detectable(1.0, 10, 9) > detectable(1.0, 1000, 9)


def test_p_values_and_intervals_are_those_of_welch():
    rng = np.random.default_rng(3)
    a, b = rng.normal(1.0, 1.0, size=8), rng.normal(0.0, 2.5, size=6)
    (d,) = family([(Sample(tuple(a)), Sample(tuple(b)))])
    expected = stats.ttest_ind(a, b, equal_var=False)
    ends = expected.confidence_interval(0.95)
    assert (d.value, d.p) == (pytest.approx(a.mean() - b.mean()), pytest.approx(expected.pvalue))
    assert (d.low, d.high) == (pytest.approx(ends.low), pytest.approx(ends.high))
    assert d.n == 6


def test_levels_are_those_of_holm_and_intervals_agree_with_the_word():
    rng = np.random.default_rng(4)
    samples = [Sample(tuple(rng.normal(shift, 1.0, size=10))) for shift in (0, 0, 0.2, 1.6, 1.8, 4)]
    pairs = list(itertools.combinations(samples, 2))
    found = family(pairs)
    p = np.array([d.p for d in found])
    order = np.argsort(p)
    levels = 0.05 / (len(p) - np.arange(len(p)))
    first = next(i for i, k in enumerate(order) if p[k] > levels[i])
    assert 0 < first < len(p)
    assert {i for i, d in enumerate(found) if d.apart} == set(order[:first])
    assert all((d.low > 0 or d.high < 0) == d.apart for d in found)
    for step, k in enumerate(order):
        a, b = pairs[k]
        level = levels[min(step, first)]
        ends = stats.ttest_ind(a.values, b.values, equal_var=False).confidence_interval(1 - level)
        assert (found[k].low, found[k].high) == (pytest.approx(ends.low), pytest.approx(ends.high))


def test_below_five_replicates_nothing_is_said_and_the_others_are_not_corrected_for_it():
    few, a, b = Sample((1.0, 2.0, 3.0, 4.0)), Sample((1.0, 2.0, 3.0, 4.0, 5.0)), Sample((1.5, 2.5, 3.5, 4.5, 6.0))
    untold, told = family([(few, a), (a, b)])
    assert (untold.apart, untold.n, untold.value) == (None, 4, -0.5)
    assert math.isnan(untold.low)
    assert math.isnan(untold.p)
    assert told == family([(a, b)])[0]


@pytest.mark.parametrize("resolution", [0.0, 1 / 360])
def test_equal_scores_are_never_told_apart(resolution):
    same = Sample((0.75,) * 5, resolution)
    (d,) = family([(same, Sample((0.75,) * 5, resolution))])
    assert d.value == 0.0
    assert d.apart is (False if resolution else None), "where nothing varies, nothing is known of chance"
    assert math.isnan(d.low) if not resolution else d.low <= 0 <= d.high


def test_a_spread_of_zero_is_that_of_the_resolution():
    m = 360
    a, b = Sample((0.75,) * 5, 1 / m), Sample((0.75 + 1 / m,) * 5, 1 / m)
    assert not family([(a, b)])[0].apart, "one example of 360, five times"
    far = Sample((0.75 + 20 / m,) * 5, 1 / m)
    assert family([(a, far)])[0].apart
    # Without one nothing is known of chance, and nothing is said.
    assert family([(Sample((0.75,) * 5), Sample((0.75 + 1e-6,) * 5))])[0].apart is None


def test_a_difference_below_the_resolution_is_a_tie():
    m = 100
    a = Sample(tuple(0.5 + np.array([0, 0, 0, 0, 1]) / m), 1 / m)
    b = Sample((0.5,) * 5, 1 / m)
    (d,) = family([(a, b)])
    assert (d.p, d.apart) == (1.0, False)


def test_the_test_sets_own_luck_is_part_of_a_difference():
    """Two fixed classifiers on a shared sample of examples: the truth is in 95 % of the intervals, not in 20 %."""
    rng, inside, without, worlds, m, parts = np.random.default_rng(5), 0, 0, 300, 400, 20
    for _ in range(worlds):
        # Each example is right for a with probability .8; b differs on a tenth of them, half each way.
        a = rng.random(m) < 0.8
        b = np.where(rng.random(m) < 0.1, ~a, a)
        truth = 0.8 - (0.8 * 0.9 + 0.2 * 0.1)
        noise = rng.normal(scale=0.002, size=(2, 5))  # the seeds add little
        halves = [tuple(x.reshape(parts, -1).mean(1)) for x in (a, b)]
        samples = [Sample(tuple(x.mean() + e), 0.0, p) for x, e, p in zip((a, b), noise, halves, strict=True)]
        (d,) = family([tuple(samples)])
        inside += d.low <= truth <= d.high
        (bare,) = family([tuple(Sample(s.values) for s in samples)])
        without += bare.low <= truth <= bare.high
    assert inside / worlds > 0.92
    assert without / worlds < 0.5


@pytest.mark.parametrize("lost", [2, 3, 4])
def test_a_method_whose_worst_replicates_failed_is_not_better_for_that(lost):
    """Equal methods, of which one diverges where it is worst: the survivors alone would win in 10 to 19 %."""
    rng, better, naive, worlds = np.random.default_rng(7), 0, 0, 600
    for _ in range(worlds):
        a, b = np.sort(rng.normal(size=10)), rng.normal(size=10)
        left = tuple(a[lost:])
        (d,) = family([(Sample(left, failures=lost), Sample(tuple(b)))])
        better += bool(d.apart and d.value > 0)
        naive += bool(family([(Sample(left), Sample(tuple(b)))])[0].apart)
    assert better / worlds <= FALSE
    assert naive > better


def test_what_is_clear_is_clear_with_failures_too():
    rng = np.random.default_rng(8)
    a, b = tuple(rng.normal(5.0, 1.0, size=8)), tuple(rng.normal(size=10))
    (d,) = family([(Sample(a, failures=2), Sample(b))])
    assert d.apart
    assert d.value == pytest.approx(np.mean(a) - np.mean(b)), "of those that did not fail"


def test_the_stated_difference_of_a_loud_control_is_about_right():
    """At the spreads that were seen, not at a common one: a loud control makes differences harder to find."""
    rng, powers = np.random.default_rng(9), []
    for _ in range(60):
        quiet, noisy = rng.normal(size=10), rng.normal(scale=4.0, size=10)
        (d,) = family([(Sample(tuple(quiet)), Sample(tuple(noisy)))])
        size, found = d.detectable, 0
        for _ in range(60):
            a, b = rng.normal(size, 1.0, size=10), rng.normal(scale=4.0, size=10)
            found += stats.ttest_ind(a, b, equal_var=False).pvalue < 0.05
        powers.append(found / 60)
    assert 0.7 < np.mean(powers) < 0.9


def test_what_parts_share_cancels():
    rng = np.random.default_rng(6)
    hard = rng.normal(scale=0.2, size=20)  # parts differ far more than methods do
    a, b = (tuple(hard + rng.normal(scale=0.001, size=20)) for _ in range(2))
    values = [tuple(rng.normal(0.8, 0.001, size=5)) for _ in range(2)]
    (d,) = family([(Sample(values[0], 0.0, a), Sample(values[1], 0.0, b))])
    assert d.high - d.low < 0.01
    assert shared_variance(a, 0.0) > 1e-3  # of one score alone it is large
    assert shared_variance((), 0.01) == pytest.approx(1e-4)


def test_an_empty_family_and_one_pair():
    assert family([]) == []
    assert family([(Sample(()), Sample(()))])[0].apart is None
