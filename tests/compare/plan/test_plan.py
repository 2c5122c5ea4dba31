"""The protocol's tuning: equal budgets, the methods' own knobs, grids that are continued, what wins."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

import stiefel
from stiefel.compare.plan.plan import FRESH, Plan
from stiefel.compare.plan.variants import aliases, label_of, parse_variants
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


def tuned_by(compared, score, extend=False):
    """Tuning as a comparison does it: the grid, then what follows, until nothing does."""
    tuned, stages = compared.tuned(ran(compared.tuning(), score)), []
    while more := compared.following(tuned, extend=extend):
        stages.append(more)
        assert len(stages) < 100
        tuned += ran(more[1], score)
    return tuned, stages


def trials_of(tuned):
    """The choices tried in each cell."""
    found = defaultdict(set)
    for record in tuned.records:
        found[cell_key(record.spec)].add(Choice.of(record.spec))
    return found


@pytest.mark.parametrize("best", [0.1, 0.013, 10.0, 1e-4, 300.0])
@pytest.mark.parametrize("studies", [0, 2])
def test_every_method_gets_the_same_number_of_different_trials(best, studies):
    compared = plan(studies=studies)
    tuned, _ = tuned_by(compared, peak(best))
    trials = trials_of(tuned)
    assert {len(choices) for choices in trials.values()} == {8}
    cells = 2 * (2 * len(stiefel.available()) + len(aliases()))  # what has no scale is run once a setting
    assert len(trials) == cells * max(1, studies)
    specs = [record.spec for record in tuned.records]
    assert len({spec.hash for spec in specs}) == len(specs)


@pytest.mark.parametrize("best", [0.1, 0.013, 1.0, 7.0])
@pytest.mark.parametrize("step", [2.0, 10**0.5, 10.0])
def test_the_best_rate_is_known_to_a_factor_of_2_before_a_knob_is_turned(best, step):
    rates = tuple(10.0 / step**i for i in range(4))
    compared = plan(("soft",), settings=({},), scales=(1.0,), rates=rates, trials=40)
    seen = []
    for record in tuned_by(compared, peak(best))[0].records:
        if record.spec.knobs:
            around = sorted(seen)
            at = min(range(len(around)), key=lambda i: abs(around[i] / record.spec.lr - 1))
            assert around[at] == pytest.approx(record.spec.lr)
            assert 0 < at < len(around) - 1, "not on the edge"
            assert around[at + 1] / around[at] <= 2.1
            assert around[at] / around[at - 1] <= 2.1
            break
        seen.append(record.spec.lr)
    else:
        pytest.fail("no knob was turned")


def test_knobs_are_turned_one_at_a_time_at_the_best_rate():
    compared = plan(("all",), settings=({},), scales=(1.0,), trials=12)
    _, stages = tuned_by(compared, peak(0.1))
    turned = set()
    for spec in (spec for name, specs in stages if name == "refine" for spec in specs):
        method = stiefel.get(spec.method, **spec.method_options)
        if spec.knobs:
            ((knob, value),) = spec.knobs.items()
            assert spec.lr == 0.1
            assert value in method.tuning[knob]
            assert value != getattr(stiefel.get(spec.method, **spec.options), knob)
            turned.add(spec.method)
        else:
            assert spec.lr not in RATES
    assert turned == {name for name in stiefel.available() if stiefel.get(name).tuning}


def test_a_knob_that_the_user_has_set_is_left_alone():
    name = next(n for n in stiefel.available() if len(stiefel.get(n).tuning) == 1)
    ((knob, values),) = stiefel.get(name).tuning.items()
    compared = plan((f"{name}:{knob}={values[0]}",), settings=({},), scales=(1.0,), trials=12)
    tuned, _ = tuned_by(compared, peak(0.1))
    assert not any(record.spec.knobs for record in tuned.records)


def test_numbers_are_tried_nearest_first():
    name, knob, values = next(
        (n, k, v)
        for n in stiefel.available()
        for k, v in stiefel.get(n).tuning.items()
        if len(v) > 2 and all(isinstance(x, float) for x in v)
    )
    compared = plan((name,), settings=({},), scales=(1.0,), trials=30)
    specs = [record.spec for record in tuned_by(compared, peak(0.1))[0].records]
    tried = [spec.knobs[knob] for spec in specs if knob in spec.knobs and spec.seed == 0]
    assert set(tried) == set(values) - {getattr(stiefel.get(name), knob)}
    now = getattr(stiefel.get(name), knob)
    distances = [max(v / now, now / v) for v in tried]
    assert distances == sorted(distances)


def test_a_best_rate_on_the_edge_is_followed_within_the_budget():
    compared = plan(("own",), settings=({},), scales=(1.0,), trials=7)
    tuned, stages = tuned_by(compared, peak(300.0))
    assert [spec.lr for _, specs in stages[:3] for spec in specs] == [100.0, 1000.0, 32.0]
    (best,) = tuned.winners.values()
    assert best.lr == 100.0
    assert {name for name, _ in stages[:3]} == {"refine"}


def test_a_grid_that_is_extended_beyond_the_budget_leaves_the_budget_to_the_rest():
    compared = plan(("own",), settings=({},), scales=(1.0,), trials=6)
    tuned, stages = tuned_by(compared, peak(300.0), extend=True)
    assert [name for name, _ in stages[:2]] == ["extend", "extend"]
    (choices,) = trials_of(tuned).values()
    assert {100.0, 1000.0} < {choice.lr for choice in choices}
    assert len(choices) == 6 + 2


def test_each_study_tunes_by_itself_on_seeds_of_its_own():
    compared = plan(("own", "soft"), settings=({},), scales=(1.0,), studies=3, tuning_seeds=2, trials=None)
    seeds = {(spec.study, spec.seed) for spec in compared.tuning()}
    assert seeds == {(study, 2 * study + seed) for study in range(3) for seed in range(2)}

    def score(spec):  # each study has another best rate
        return peak(RATES[spec.study])(spec)

    tuned, stages = tuned_by(compared, score)
    assert stages == []
    final = compared.final(tuned)
    assert len(final) == 2 * 3
    assert {(spec.study, spec.lr, spec.seed) for spec in final} == {(s, RATES[s], FRESH + s) for s in range(3)}
    assert all(spec.study is None for spec in compared.cost(tuned))
    assert len(compared.cost(tuned)) == 2


def test_one_tuning_is_raced_before_it_decides():
    """The best of a noisy first seed is not the best on five."""
    compared = plan(("own",), settings=({},), scales=(1.0,), trials=None, seeds=2)

    first = compared.tuned(ran(compared.tuning(), lambda spec: peak(1.0)(spec) + 1.2 * (spec.lr == 10.0)))
    assert next(iter(first.winners.values())).lr == 10.0
    tuned, stages = tuned_by(compared, lambda spec: peak(1.0)(spec) + 1.2 * (spec.lr == 10.0) * (spec.seed == 0))
    ((name, specs),) = stages
    assert name == "race"
    assert Counter(spec.lr for spec in specs) == {10.0: 4, 1.0: 4, 0.1: 4}
    assert {spec.seed for spec in specs} == {1, 2, 3, 4}
    assert {spec.lr for spec in compared.final(tuned)} == {1.0}
    assert len(compared.final(tuned)) == 2


def test_a_raced_choice_wins_over_one_that_was_lucky_once():
    cell = next(plan(("own",), settings=({},), scales=(1.0,)).cells())
    raced = [Choice(1.0).apply(cell, seed=seed) for seed in range(5)]
    records = ran([*raced, Choice(0.1).apply(cell)], lambda spec: 0.8 if spec.lr == 1.0 else 0.9)
    assert winners(records, True) == {cell_key(cell): Choice(1.0)}
    failed = ran([*raced, Choice(0.1).apply(cell)], lambda spec: None if spec.lr == 1.0 else 0.9)
    assert winners(failed, True) == {cell_key(cell): Choice(0.1)}


def test_a_scale_of_1_finds_the_records_of_scale_one_point_zero():
    tuned = ran(plan(("own",), settings=({},), scales=(1.0,)).tuning(), peak(0.1))
    compared = plan(("own",), settings=({},), scales=(1,))
    assert len(compared.final(compared.tuned(tuned))) == 2


def test_a_raced_choice_that_mostly_fails_loses_to_one_that_was_not_raced():
    cell = next(plan(("own",), settings=({},), scales=(1.0,)).cells())
    raced = [Choice(1.0).apply(cell, seed=seed) for seed in range(5)]
    records = ran([*raced, Choice(0.1).apply(cell)], lambda spec: 0.5 if spec.lr == 0.1 or spec.seed == 0 else None)
    assert winners(records, True) == {cell_key(cell): Choice(0.1)}


def test_nothing_is_tried_after_the_race():
    """A winner that the race moves to the edge keeps its mark: a rate beyond, on one seed, could not win against it."""
    compared = plan(("own",), settings=({},), scales=(1.0,), trials=None)
    tuned, stages = tuned_by(compared, lambda spec: peak(1.0)(spec) + (spec.seed > 0) * spec.lr, extend=True)
    assert [name for name, _ in stages][-1] == "race"
    assert next(iter(tuned.winners.values())).lr == 10.0


@pytest.mark.parametrize("extend", [False, True])
@pytest.mark.parametrize("rates", [(0.101, 0.103, 0.105), (0.1, 0.11, 0.12), (1.0,)])
@pytest.mark.parametrize("best", [0.01, 0.103, 5.0])
def test_close_rates_are_told_apart_and_the_budget_is_spent(rates, best, extend):
    compared = plan(("own",), settings=({},), scales=(1.0,), rates=rates, trials=9)
    tuned, _ = tuned_by(compared, peak(best), extend=extend)
    (choices,) = trials_of(tuned).values()
    assert len(choices) >= 9 if extend else len(choices) == 9


@pytest.mark.parametrize("trials", [4, 12, 16, 40])
def test_a_large_budget_is_spent_by_every_method(trials):
    compared = plan(("all",), settings=({},), scales=(1.0,), trials=trials)
    assert {len(choices) for choices in trials_of(tuned_by(compared, peak(0.1))[0]).values()} == {trials}


def test_a_grid_is_continued_for_the_network_as_it_is_and_for_every_scale_too():
    compared = plan(("own", "unconstrained", "default"), settings=({},), scales=(1.0, "relu"), trials=None)

    def score(spec):
        return peak(300.0 if spec.options == {"center": False, "scale": "relu"} else 0.1)(spec)

    tuned, _ = tuned_by(compared, score, extend=True)
    grid = [{choice.lr for choice in choices} for choices in trials_of(tuned).values()]
    assert len(grid) == 5
    assert all(rates == grid[0] for rates in grid)
    assert max(grid[0]) == 1000.0


def test_a_study_is_part_of_what_identifies_a_run_and_absent_where_there_is_none():
    spec = plan(("own",)).tuning()[0]
    assert "study" not in spec.to_dict()
    assert replace(spec, study=0).hash != spec.hash
    assert type(spec).from_dict(replace(spec, study=3).to_dict()).study == 3


def test_the_network_as_it_is_has_no_scale_and_its_own_name():
    compared = plan(("default", "unconstrained"), settings=({},))
    cells = {(label_of(cell), cell.options.get("scale")) for cell in compared.cells()}
    assert cells == {("default", None), ("unconstrained", 1.0), ("unconstrained", "relu")}
    (default,) = (cell for cell in compared.cells() if label_of(cell) == "default")
    assert (default.method, default.options) == ("unconstrained", {"start": "given"})
    assert "default" in {label_of(cell) for cell in plan(("all",)).cells()}


def test_without_a_budget_the_grid_is_all():
    compared = plan(trials=None)
    assert compared.refinement(compared.tuned(ran(compared.tuning(), peak(0.1)))) == []
    studies = plan(trials=None, studies=2)
    assert tuned_by(studies, peak(0.1))[1] == []


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
