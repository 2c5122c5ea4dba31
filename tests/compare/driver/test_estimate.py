"""How long a comparison may take: its runs, those that are left, and the time of each."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from records import spec

from stiefel.compare.driver import estimate
from stiefel.compare.plan.plan import Plan
from stiefel.compare.plan.variants import parse_variants
from stiefel.compare.record.records import Record

RATES = (0.1, 1.0, 10.0)


@pytest.fixture(autouse=True)
def starts(monkeypatch):
    """A new process takes 2 s to import what a run needs first, and 3 s for all."""
    known = {"stiefel.compare.worker.main": 2.0, "stiefel.compare.worker.preload": 3.0}
    monkeypatch.setattr(estimate, "_STARTS", known)


def trained(run, seconds, *, step=None, value=0.5, status="done"):
    summary = {"best_validation": value} | ({} if step is None else {"steps": 50, "seconds": 50 * step})
    return Record(Path("."), run, status, None, summary, {}, wall_seconds=seconds)


def timed(run, seconds):
    return Record(Path("."), run, "done", None, {}, {}, wall_seconds=seconds)


def test_a_cost_run_starts_a_process_and_steps_the_method_and_the_control():
    pace = estimate.Pace(
        [trained(spec(method="own"), 9.0, step=0.1), trained(spec(method="unconstrained"), 7.0, step=0.02)]
    )
    # 20 rounds to warm up and 60 timed ones of both, and the step that is counted
    assert pace.seconds([spec(method="own", kind="cost")], 4) == pytest.approx(3 + 80 * (0.1 + 0.02) + 0.1)
    assert pace.seconds([spec(method="unconstrained", kind="cost")], 1) == pytest.approx(3 + 80 * 0.04 + 0.02)
    both = [spec(method="own"), spec(method="unconstrained")]
    assert pace.seconds(both, 2) == pytest.approx(8.0)
    assert pace.seconds([replace(run, device="cuda") for run in both], 1) == pytest.approx(16 + 2 * 2)
    apart = estimate.Pace([trained(spec(method="own"), 9.0, step=0.1)], forked=False)  # under torchrun, or elsewhere
    assert apart.seconds([spec(method="own")], 1) == pytest.approx(9 + 2)


def test_without_the_control_no_step_beside_is_longer_than_the_methods():
    records = [trained(spec(method=m), 9.0, step=s) for m, s in (("own", 0.1), ("soft", 0.02), ("pogo", 0.5))]
    pace = estimate.Pace(records)
    assert pace.seconds([spec(method="soft", kind="cost")], 1) == pytest.approx(3 + 80 * 0.04 + 0.02)
    assert pace.seconds([spec(method="pogo", kind="cost")], 1) == pytest.approx(3 + 80 * 0.6 + 0.5)


def test_a_cost_run_that_has_ended_tells_its_own_time_and_the_imports_before_it():
    pace = estimate.Pace([trained(spec(), 9.0, step=0.1), timed(spec(kind="cost"), 5.0)])
    assert pace.seconds([spec(kind="cost")], 1) == pytest.approx(2 + 5)
    assert pace.seconds([spec(kind="cost", fields={"depth": 8})], 1) == pytest.approx(3 + 80 * 0.2 + 0.1)


def test_times_are_those_of_the_setting_before_those_of_the_method():
    times = estimate.Times()
    assert not times
    for depth, method, seconds in ((4, "own", 1.0), (4, "own", 3.0), (4, "soft", 5.0), (8, "own", 20.0)):
        times.add(spec(method=method, fields={"depth": depth}), seconds)
    assert times.of(spec(method="own")) == 2.0
    assert times.of(spec(method="pogo")) == 3.0
    assert times.of(spec(method="soft", fields={"depth": 8})) == 20.0
    assert times.of(spec(method="soft", fields={"depth": 9})) == 5.0
    assert times.of(spec(method="pogo", fields={"depth": 9})) == 4.0


@pytest.mark.parametrize("extend", [False, True])
@pytest.mark.parametrize("studies", [0, 3])
def test_what_is_left_is_what_a_comparison_would_still_run(extend, studies):
    """Its stages as ``Comparison.run`` has them, run by run, with the best rate on the edge of the grid."""
    variants = parse_variants(["own", "soft", "unconstrained"])
    design = {"studies": studies} if studies else {"seeds": 2}
    plan = Plan("toy", "d", ({"depth": 4}, {"depth": 8}), variants, (1.0,), RATES, trials=5, **design)
    records, ended, names = {}, [], []

    def left():
        return estimate.left(plan, records, cost=True, extend=extend)

    def run(specs):
        for i, one in enumerate(specs):
            if i % 7 == 0:
                assert {s.hash for s in specs[i:]} <= {s.hash for s in left()}
            failed = one.method == "own" and one.fields["depth"] == 8
            ended.append(trained(one, 1.0, value=one.lr, status="diverged" if failed else "done"))
            records[one.hash] = ended[-1]

    cells, from_nothing = 6 * max(1, studies), estimate.whole(plan, cost=True)
    raced, reported = (0, 1) if studies else (3 * 4, 2)
    assert len(left()) == len(from_nothing) == cells * (5 + raced + reported) + 6
    run(plan.tuning())
    while more := plan.following(plan.tuned(ended), extend=extend):
        names.append(more[0])
        run(more[1])
    assert ("extend" in names) == extend
    assert ("race" in names) == (not studies)
    assert "refine" in names
    tuned = plan.tuned(ended)
    rest = plan.final(tuned) + plan.cost(tuned)
    assert [s.hash for s in left()] == [s.hash for s in rest]
    assert len(rest) == 5 * (studies or 2) + 6  # a method whose every run failed has no fresh seeds
    run(rest[:4])
    assert [s.hash for s in left()] == [s.hash for s in rest[4:]]
    run(rest[4:])
    assert left() == []


def test_a_start_is_measured_once(monkeypatch):
    monkeypatch.setattr(estimate, "_STARTS", {})
    start = time.monotonic()
    found = estimate.start_seconds("json")
    assert 0.001 < found <= time.monotonic() - start
    assert estimate.start_seconds("json") == found
