"""Specs and plans: hashes that do not drift, equal budgets."""

import json

import pytest
from specs import record, spec

import stiefel
from stiefel.compare.plan.plan import FRESH, Plan
from stiefel.compare.plan.variants import Variant, label_of, parse_variants
from stiefel.compare.record.choice import Choice, Tuned, cell_key, on_edge, winners
from stiefel.compare.record.spec import RunSpec


def test_hash_identifies_a_spec_and_does_not_drift():
    assert spec().hash == RunSpec.from_dict(json.loads(json.dumps(spec().to_dict()))).hash
    changed = [{"lr": 0.2}, {"seed": 1}, {"options": {"scale": "relu"}}, {"fields": {"depth": 8}}, {"phase": "final"}]
    assert len({spec(**c).hash for c in [{}, *changed]}) == 6
    # Records on disk are found by this hash: a change of it orphans every earlier result.
    assert spec().hash == "1a813998f7e33059"


def test_plan_gives_every_method_the_same_trials():
    variants = parse_variants(["own", "soft:strength=0.5", "riemannian:metric=canonical"])
    plan = Plan(
        "toy", "d", ({"depth": 4}, {"depth": 8}), variants, (1.0, "relu"), (0.1, 1.0, 10.0), seeds=3, tuning_seeds=2
    )
    tuning = plan.tuning()
    assert len(tuning) == 2 * 3 * 2 * 3 * 2
    assert len({s.hash for s in tuning}) == len(tuning)
    counts = [sum(label_of(s) == label for s in tuning) for label in {label_of(s) for s in tuning}]
    assert len(set(counts)) == 1
    # Methods are compared on one set: own does not centre unless told to.
    assert all(s.options["center"] is False for s in tuning if s.method == "own")
    assert {label_of(s) for s in tuning} == {"own", "soft:strength=0.5", "riemannian:metric=canonical"}


def test_winner_is_chosen_on_validation_and_run_again_with_fresh_seeds():
    plan = Plan("toy", "d", ({"depth": 4},), (Variant("own"),), (1.0,), (0.1, 1.0, 10.0), seeds=2)
    tuned = [record(0.1, 0.8), record(1.0, 0.9), record(10.0, 0.95, "diverged")]
    final = plan.final(plan.tuned(tuned))
    assert [s.lr for s in final] == [1.0, 1.0]
    assert {s.seed for s in final} == {FRESH, FRESH + 1}
    assert not {s.seed for s in final} & {s.seed for s in plan.tuning()}
    assert [s.lr for s in plan.final(Tuned(tuple(tuned), higher_is_better=False))] == [0.1, 0.1]
    assert plan.final(plan.tuned([record(0.1, 0.8, "diverged")])) == []


def test_a_rate_that_fails_on_some_seeds_loses_to_one_that_does_not():
    tuned = [record(0.1, 0.8), record(0.1, 0.8, seed=1), record(1.0, 0.99), record(1.0, 0.9, "diverged", seed=1)]
    assert winners(tuned, higher_is_better=True) == {cell_key(spec()): Choice(0.1)}


def test_edges_of_the_grid():
    assert on_edge(0.1, (0.1, 1.0, 10.0))
    assert on_edge(10.0, (0.1, 1.0, 10.0))
    assert not on_edge(1.0, (0.1, 1.0, 10.0))


@pytest.mark.parametrize("text", ["nonsense", "own:centre=False", "own:center", "own:center=maybe", "soft:strength=-1"])
def test_bad_variants_are_named_errors(text):
    with pytest.raises(stiefel.StiefelError):
        parse_variants([text])
