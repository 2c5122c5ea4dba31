"""The protocol's tuning: equal budgets, the methods' own knobs, grids that are continued, what wins."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

import stiefel
from stiefel.compare.plan.plan import Plan
from stiefel.compare.plan.variants import label_of, parse_variants
from stiefel.compare.record.choice import Choice, cell_key, winners
from stiefel.compare.record.records import Record
from stiefel.errors import OptionError

RATES = (0.01, 0.1, 1.0, 10.0)


def plan(methods=("all",), **changes):
    base = {"settings": ({"depth": 4}, {"depth": 8}), "scales": (1.0, "relu"), "rates": RATES, "seeds": 2, "trials": 8}
    return Plan("toy", "d", variants=parse_variants(methods), **{**base, **changes})


def ran(specs, score):
    """Records in which each run reached what ``score`` says of it; None is a run that diverged."""
    records = []
    for spec in specs:
        value = score(spec)
        status = "diverged" if value is None else "done"
        records.append(Record(Path("."), spec, status, None, {} if value is None else {"best_validation": value}, {}))
    return records


def peak(best):
    """A score that falls with the distance of the rate from ``best``, in decades."""
    import math

    return lambda spec: 1 - abs(math.log10(spec.lr / best))


def test_every_method_gets_the_same_number_of_different_trials():
    compared = plan()
    tuned = ran(compared.tuning(), peak(0.1))
    specs = compared.tuning() + compared.refinement(compared.tuned(tuned))
    counts = Counter(cell_key(spec) for spec in specs)
    assert set(counts.values()) == {8}
    assert len(counts) == 4 * len(stiefel.available())
    assert len({spec.hash for spec in specs}) == len(specs)


def test_knobs_are_turned_one_at_a_time_and_the_rest_refines_the_rate():
    compared = plan(("all",), settings=({},), scales=(1.0,))
    tuned = ran(compared.tuning(), peak(0.1))
    for spec in compared.refinement(compared.tuned(tuned)):
        method = stiefel.get(spec.method, **spec.method_options)
        if spec.knobs:
            ((knob, value),) = spec.knobs.items()
            assert spec.lr == 0.1
            assert value in method.tuning[knob]
            assert value != getattr(stiefel.get(spec.method, **spec.options), knob)
        else:
            assert 0.01 < spec.lr < 1.0
            assert spec.lr not in RATES
    by_method = Counter((s.method, bool(s.knobs)) for s in compared.refinement(compared.tuned(tuned)))
    for name in stiefel.available():
        assert by_method[name, True] + by_method[name, False] == 4
        assert (by_method[name, True] > 0) == bool(stiefel.get(name).tuning)


def test_a_knob_that_the_user_has_set_is_left_alone():
    name = next(n for n in stiefel.available() if len(stiefel.get(n).tuning) == 1)
    ((knob, values),) = stiefel.get(name).tuning.items()
    compared = plan((f"{name}:{knob}={values[0]}",), settings=({},), scales=(1.0,))
    specs = compared.refinement(compared.tuned(ran(compared.tuning(), peak(0.1))))
    assert len(specs) == 4
    assert not any(spec.knobs for spec in specs)


def test_numbers_are_tried_nearest_first():
    name, knob, values = next(
        (n, k, v)
        for n in stiefel.available()
        for k, v in stiefel.get(n).tuning.items()
        if len(v) > 2 and all(isinstance(x, float) for x in v)
    )
    compared = plan((name,), settings=({},), scales=(1.0,), trials=30)
    tried = [
        s.knobs[knob] for s in compared.refinement(compared.tuned(ran(compared.tuning(), peak(0.1)))) if knob in s.knobs
    ]
    assert set(tried) == set(values) - {getattr(stiefel.get(name), knob)}
    now = getattr(stiefel.get(name), knob)
    distances = [max(v / now, now / v) for v in tried]
    assert distances == sorted(distances)


def test_without_a_budget_the_grid_is_all():
    compared = plan(trials=None)
    assert compared.refinement(compared.tuned(ran(compared.tuning(), peak(0.1)))) == []


def test_a_budget_below_the_grid_is_an_error():
    with pytest.raises(OptionError, match=r"--trials 3 is less than the 4 learning rates"):
        plan(trials=3)


def test_a_method_whose_every_run_failed_is_refined_and_run_no_further():
    compared = plan(("own", "soft"))
    tuned = ran(compared.tuning(), lambda spec: None if spec.method == "own" else 0.5)
    assert {s.method for s in compared.refinement(compared.tuned(tuned))} == {"soft"}
    assert {s.method for s in compared.final(compared.tuned(tuned))} == {"soft"}
    assert {s.method for s in compared.cost(compared.tuned(tuned))} == {"own", "soft"}, (
        "what a step costs is known anyway"
    )


@pytest.mark.parametrize(("best", "beyond"), [(1000.0, [100.0, 1000.0, 10000.0]), (1e-4, [0.001, 1e-4, 1e-5])])
def test_a_grid_is_continued_for_all_methods_of_a_setting_until_the_best_lies_inside(best, beyond):
    compared = plan(("own", "soft"), settings=({"depth": 4}, {"depth": 8}), scales=(1.0,))

    def score(spec):  # own alone wants more, and only in the deeper network
        wants = best if spec.method == "own" and spec.fields["depth"] == 8 else 0.1
        return peak(wants)(spec)

    tuned, added = ran(compared.tuning(), score), []
    while more := compared.extension(compared.tuned(tuned)):
        added += more
        tuned += ran(more, score)
    assert {s.fields["depth"] for s in added} == {8}
    assert [s.lr for s in added if s.method == "own"] == beyond
    assert [s.lr for s in added if s.method == "soft"] == beyond, "budgets stay equal"
    assert winners(tuned, True)[cell_key(next(s for s in added if s.method == "own"))].lr == best


def test_a_grid_is_not_continued_for_ever():
    compared = plan(("own",), settings=({},), scales=(1.0,))
    tuned = ran(compared.tuning(), lambda spec: spec.lr)
    for _ in range(20):
        more = compared.extension(compared.tuned(tuned))
        if not more:
            break
        tuned += ran(more, lambda spec: spec.lr)
    assert max(r.spec.lr for r in tuned) == 1e4  # three decades beyond 10
    assert min(r.spec.lr for r in tuned) == 0.01


def test_winners_take_the_best_choice_and_of_equals_the_default():
    compared = plan(("own", "soft"), settings=({},), scales=(1.0,))
    cell = next(c for c in compared.cells() if c.method == "soft")
    trials = [Choice(0.1), Choice(0.1, (("strength", 0.01),)), Choice(1.0, (("strength", 0.01),))]
    specs = [choice.apply(cell, seed=seed) for choice, seed in itertools.product(trials, range(2))]
    best = winners(ran(specs, lambda s: 0.9 if s.knobs and s.lr == 0.1 else 0.8), True)
    assert best == {cell_key(cell): trials[1]}
    assert str(trials[1]) == "lr=0.1, strength=0.01"
    assert winners(ran(specs, lambda s: 0.8), True) == {cell_key(cell): trials[0]}
    final = compared.final(compared.tuned(ran(specs, lambda s: 0.9 if s.knobs and s.lr == 0.1 else 0.8)))
    assert [s.knobs for s in final] == [{"strength": 0.01}] * 2
    assert final[0].method_options == {"scale": 1.0, "strength": 0.01}
    assert label_of(final[0]) == "soft", "a knob that tuning turned is no other method"


def test_cost_is_of_the_method_as_it_was_chosen():
    compared = plan(("soft",), settings=({},), scales=(1.0,))
    cell = next(compared.cells())
    tuned = ran(
        [Choice(0.1).apply(cell), Choice(0.1, (("kind", "srip"),)).apply(cell)], lambda s: 0.5 + 0.1 * len(s.knobs)
    )
    (spec,) = compared.cost(compared.tuned(tuned))
    assert (spec.kind, spec.lr, spec.knobs) == ("cost", 0.01, {"kind": "srip"})


def test_a_run_without_knobs_has_the_hash_that_it_had_before_there_were_knobs():
    spec = plan(("own",)).tuning()[0]
    assert "knobs" not in spec.to_dict()
    assert replace(spec, knobs={"center": True}).hash != spec.hash
    assert type(spec).from_dict(spec.to_dict()) == spec
