"""The cost benchmark: its tiny form end to end, and that candidates which are compared do the same work."""

import csv
import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from costs import nets, rounds, sections
from costs.cases import Candidate, Case, Work
from costs.maps import PRODUCT, REFERENCE, maps
from costs.rounds import Effort, Rounds, in_rounds
from costs.steps import OURS, steps
from costs.tables import markdown
from costs.targets import Results, faster, targets, within

import stiefel

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")
CASE = Case(3, 4, 9, dtype=torch.float64)
QUICK = Effort(rounds=6, seconds=0.001, longest=60.0)

requires = pytest.importorskip  # peers that a user has not installed are left out of the benchmark too


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("cost")
    command = [sys.executable, str(BENCHMARKS / "cost.py"), "--tiny", "--threads", "1", "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    return out, run.stdout


@pytest.fixture(scope="module")
def records(written):
    return json.loads((written[0] / "records.json").read_text())


def test_every_section_meets_every_candidate(records):
    found = {(r["section"], r["candidate"]) for r in records}
    assert {(s, c.name) for s, cs in (("maps", maps()), ("steps", steps())) for c in cs} <= found
    assert {("training", m) for m in (nets.CONTROL, *nets.RECOMMENDED)} <= found
    assert {("rest", name) for name in nets.AT_REST} <= found
    assert {r["along"] for r in records if r["section"] == "scaling"} == {"count", "p, n = p", "p, n = 4p"}
    assert {r["candidate"] for r in records if r["section"] == "scaling"} == {PRODUCT, *sections.SCALED}
    assert {r["condition"] for r in records if r["section"] == "maps"} == {2.0, sections.ILL}


def test_a_record_is_a_number_or_a_reason(records):
    for r in records:
        if r["status"] == "timed":
            assert 0 < r["seconds_q1"] <= r["seconds_median"] <= r["seconds_q3"]
            assert r["n_timed"] >= rounds.LEAST
            assert r["units_median"] == pytest.approx(r["seconds_median"] / r["unit_seconds"])
        else:
            assert r["reason"]
            assert "seconds_median" not in r
    ours = [r for r in records if r["who"] in ("ours", "reference", "unit", "floor")]
    assert {r["status"] for r in ours} == {"timed"}
    assert {r["units_median"] for r in records if r.get("unit") == r["candidate"]} == {1.0}


def test_a_record_says_what_ran_and_where(records):
    for r in records:
        assert {"commit", "version_geotorch", "version_pogo_torch", "version_orthogonium"} <= r.keys()
        assert r["threads"] == 1
        assert r["device"] == "cpu"
        assert r["dtype"] == "float32"
        assert r["torch"] == torch.__version__
        if r["status"] == "timed":
            assert [r["gpu_call_bytes"], r["gpu_reserved_bytes"], r["gpu_energy_joules"]] == [None] * 3
            assert r["gpu_reason"]


def test_orthogonality_is_that_of_the_weights(records):
    for r in records:
        method = r["candidate"].partition(",")[0]
        promised = method not in stiefel.available() or stiefel.get(method).claim is not None
        if r["status"] == "timed" and r.get("error") is not None and r.get("condition") == 2.0 and promised:
            assert r["error"] < 3e-6, r["candidate"]
        if r["section"] == "rest" or r["candidate"] == PRODUCT:
            assert r["error"] is None
    ill = {r["candidate"]: r.get("error") for r in records if r.get("condition") == sections.ILL}
    assert max(ill["own"], ill["oni"], ill["bjorck"]) < 2e-6


def test_what_is_written_agrees(written, records):
    out, told = written
    with (out / "records.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [r["candidate"] for r in rows] == [r["candidate"] for r in records]
    timed = [r for r in rows if r["status"] == "timed"]
    assert [float(r["seconds_median"]) for r in timed] == [
        r["seconds_median"] for r in records if r["status"] == "timed"
    ]
    text = (out / "cost.md").read_text()
    assert text == markdown(records, "tiny")
    for title in ("## Targets", "## Maps", "## Steps", "## Whole training steps", "## Scaling", "## At rest"):
        assert title in text
    for file, magic in (("cost.png", b"\x89PNG"), ("cost.svg", b"<?xml")):
        assert (out / file).read_bytes().startswith(magic)
    assert told.count(" timed, ") == len(
        {(r["section"], r["case"], r.get("condition"), r.get("along")) for r in records}
    )


# --- equal results ---


def ready(name, catalogue, case=CASE):
    candidate = next(c for c in catalogue if c.name == name)
    if candidate.needs:
        requires(candidate.needs.partition(".")[0])
    return candidate.setup(case)


def gradient(work):
    return torch.cat([g.reshape(-1, *g.shape[-2:]) for g in work.call()])


@pytest.mark.parametrize("condition", [2.0, 100.0])
def test_proxies_have_the_condition_number(condition):
    case = replace(CASE, condition=condition)
    s = torch.linalg.svdvals(case.proxies())
    assert torch.allclose(s[:, 0] / s[:, -1], torch.full((3,), condition, dtype=s.dtype), rtol=1e-12)
    assert torch.allclose(s[:, -1], torch.ones(3, dtype=s.dtype))


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        *((n, 1e-12) for n in ("own", "own, function", "own, eigen")),
        ("own, products", 1e-6),  # its series are cut off where float32 ends
        *((n, 1e-6) for n in ("own, iteration", "oni", "oni, function", "bjorck", "bjorck, function")),
    ],
)
def test_polar_factors_are_those_of_the_reference(name, tolerance):
    theirs, ours = ready(REFERENCE, maps()), ready(name, maps())
    assert torch.allclose(ours.result()[0], theirs.result()[0], rtol=0, atol=tolerance)
    assert torch.allclose(gradient(ours), gradient(theirs), rtol=0, atol=10 * tolerance)


def test_orthogoniums_weight_is_that_of_the_reference():
    """It computes in float32 only."""
    case = replace(CASE, dtype=torch.float32)
    theirs, ours = ready(REFERENCE, maps(), case), ready("orthogonium Björck", maps(), case)
    assert torch.allclose(ours.result()[0], theirs.result()[0], rtol=0, atol=2e-6)


def test_errors_are_of_the_weights_as_they_are_timed():
    """Together, layers are large enough for another solver than one by one, and its error is the one to report."""
    case = Case(8, 64, 96)
    layers, function, eigen = (ready(name, maps(), case).error() for name in ("own", "own, function", "own, eigen"))
    assert layers == function
    assert layers != eigen


@pytest.mark.parametrize("name", ["own_pca", "cayley", "matrix_exp", "householder"])
def test_layers_and_functions_are_the_same_map(name):
    layers, function = ready(name, maps()), ready(f"{name}, function", maps())
    assert torch.allclose(layers.result()[0], function.result()[0], rtol=0, atol=1e-12)
    assert torch.allclose(gradient(layers), gradient(function), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("ours", "others"),
    [
        ("riemannian", ["geoopt Stiefel", "retraction"]),
        ("pogo", ["pogo, stacked", "pogo-torch", "pogo-torch, stacked"]),
        ("landing", ["landing, stacked"]),
    ],
)
def test_steps_that_are_compared_are_equal(ours, others):
    work, start = ready(ours, steps()), CASE.points()
    for other in others:
        peer = ready(other, steps())
        for _ in range(5):
            peer.call()
        work = ready(ours, steps())
        for _ in range(5):
            work.call()
        assert torch.allclose(work.result()[0], peer.result()[0], rtol=0, atol=1e-12), other
    assert (work.result()[0] - start).norm(dim=(-2, -1)).min() > 1e-3


@pytest.mark.parametrize("name", OURS)
def test_a_step_follows_the_gradient(name):
    """All matrices move, and none the wrong way; soft's own gradient, at a point of the set, is zero."""
    work = ready(name, steps())
    work.call()
    slope = ((work.result()[0] - CASE.points()) * CASE.gradients()).sum((-2, -1))
    assert (slope.abs() < 1e-12).all() if name == "soft" else (slope < -1e-6).all()


# --- rounds ---


def test_slow_candidates_get_fewer_turns_and_at_least_three(monkeypatch):
    calls = []
    monkeypatch.setattr(rounds, "_warm", lambda work, device, effort: {"quick": 1e-9, "slow": 1.0}[work.call()])
    works = {name: Work(lambda name=name: calls.append(name) or name) for name in ("quick", "slow")}
    found = in_rounds(works, CPU, Effort(rounds=9, seconds=1e-3, longest=9))
    assert (found["quick"].n, found["slow"].n) == (9, rounds.LEAST)
    assert calls.count("slow") == 1 + rounds.LEAST
    assert calls.count("quick") == 1 + 2 * 9  # each timed call follows an untimed one
    turns = [i for i, name in enumerate(calls[2:]) if name == "slow"]
    assert all(5 <= b - a <= 9 for a, b in itertools.pairwise(turns))  # they lie among the others'


def test_what_cannot_be_timed_has_its_reason():
    def fail():
        raise ValueError("no such shape")

    found = in_rounds({"quick": Work(lambda: None), "broken": Work(fail)}, CPU, QUICK)
    assert found["quick"].median > 0
    assert found["broken"] == "ValueError: no such shape"
    (reason,) = in_rounds({"slow": Work(lambda: None)}, CPU, replace(QUICK, longest=0.0)).values()
    assert "may take 0 s" in reason


def test_a_peer_that_is_missing_or_too_slow_is_told_and_costs_nobody_else():
    told = []
    bench = sections.Bench(replace(sections.FORMS["tiny"], effort=replace(QUICK, longest=1e-12)), CPU, tell=told.append)
    absent = Candidate("absent", "nobody", lambda case: Work(list), needs="no_such_package")
    slow = Candidate("slow", "nobody", lambda case: Work(list), per_layer=True)
    bench.compare({"section": "maps", "condition": 2.0}, CASE, [absent, slow])
    reasons = {r["candidate"]: r["reason"] for r in bench.records}
    assert reasons["absent"].startswith("no_such_package is not installed")
    assert "3 times that of one matrix" in reasons["slow"]
    assert told == ["    maps  3×4×9: 0 timed, 2 skipped"]
    assert "no_such_package is not installed" in markdown(bench.records, "tiny")


# --- targets ---


def test_targets_are_ratios_of_medians():
    def record(candidate, seconds):
        return {"section": "steps", "case": "1×2×3", "candidate": candidate, "seconds_median": seconds}

    results = Results([record("ours", 2.0), record("theirs", 6.0)])
    speed, share = faster("steps", "1×2×3", "ours", "theirs", 3, 4), within("steps", "1×2×3", "theirs", "ours", 2)
    assert speed.value(results) == share.value(results) == 3
    assert speed.met(3, speed.bound)
    assert not speed.met(3, speed.goal)
    assert not share.met(3, share.bound)
    assert faster("steps", "1×2×3", "ours", "absent", 1).value(results) is None


def test_targets_are_judged_by_the_least_of_the_rounds_too():
    records = [
        {"section": "steps", "case": "1×2×3", "candidate": c, "seconds_median": m, "seconds_least": least}
        for c, m, least in (("ours", 2.0, 1.0), ("theirs", 3.0, 2.0))
    ]
    speed = faster("steps", "1×2×3", "ours", "theirs", 1.8)
    assert (speed.value(Results(records)), speed.value(Results(records, "least"))) == (1.5, 2.0)
    sample = Rounds.of([3.0, 1.0, 2.0])
    assert (sample.least, sample.median, sample.n) == (1.0, 2.0, 3)


def test_every_target_is_of_what_the_full_form_measures():
    """A name that changed would make its target vanish from the table without a word."""
    names = {"maps": [c.name for c in maps()], "steps": [c.name for c in steps()]}
    names |= {"training": [nets.CONTROL, *nets.RECOMMENDED], "rest": list(nets.AT_REST)}
    form = sections.FORMS["full"]
    shapes = ["×".join(map(str, s)) for s in form.shapes]
    cases = {"maps": shapes, "steps": shapes}
    cases["training"] = [str(n) for n in (*nets.nets(form.widths, form.batches), *form.convolutional)]
    cases["rest"] = [f"layer {form.width}×{form.width}, batch {b}" for b in form.rest] + ["access of a weight"]
    everything = [
        {"section": s, "case": c, "condition": k, "candidate": n, "seconds_median": 1.0, "error": 0.0}
        for s in names
        for c in cases[s]
        for n in names[s]
        for k in ((2.0, sections.ILL) if s == "maps" else (None,))
    ]
    values = [t.value(Results(everything)) for t in targets()]
    assert len(values) > 50
    assert all(v is not None and math.isfinite(v) for v in values)


def test_the_run_on_a_gpu_has_a_dry_one(tmp_path, capsys):
    import gpu

    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    where = json.loads((tmp_path / "environment.json").read_text())
    assert where["gpu"] is None
    assert where["gpu_reason"]
    assert where["driver"] is None
    assert where["driver_reason"]
    assert (tmp_path / "cost" / "records.json").exists()
    assert "passed" in (tmp_path / "tests.txt").read_text() or "100%" in (tmp_path / "tests.txt").read_text()


def test_without_a_gpu_it_says_so(tmp_path, capsys):
    import gpu

    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "try --dry-run" in capsys.readouterr().err
