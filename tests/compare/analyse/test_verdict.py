"""The verdict: what is compared with what, what is told apart, what to take under which requirement."""

from __future__ import annotations

import math

import numpy as np
import pytest
from records import spec, timed, trained, write

from stiefel.compare import read_report
from stiefel.compare.analyse.candidates import candidates, tolerated
from stiefel.compare.analyse.requirements import answers as answers_of
from stiefel.compare.analyse.summarize import summaries
from stiefel.compare.analyse.verdict import Verdict
from stiefel.compare.plan.plan import FRESH
from stiefel.compare.record.records import read_all

RATES = (0.01, 0.1, 1.0, 10.0)
GIVEN = {"method": "unconstrained", "options": {"start": "given"}, "label": "default"}


def study(root, level, *, n=10, spread=0.01, seed=0, error=1e-8, rates=RATES, best=1.0, width=0.1, **cell):
    """``n`` studies of one method: each tunes over the rates and runs once at its best."""
    label = cell.pop("label", None)
    known = {
        name: cell.pop(name) for name in ("log_scale", "test_examples", "metric", "higher_is_better") if name in cell
    }
    rng = np.random.default_rng(seed)
    for s in range(n):
        noise = rng.normal(scale=spread)
        for lr in rates:
            value = level - width * abs(math.log10(lr / best)) + noise
            named(trained(root, spec(**cell, lr=lr, seed=s, study=s), value, error, **known), label)
        run = spec(**cell, lr=best, seed=FRESH + s, study=s, phase="final")
        named(trained(root, run, level + rng.normal(scale=spread), error, **known), label)


def named(folder, label):
    """A record's label and whether it is a control, as the driver writes them."""
    import json

    path = folder / "run.json"
    record = json.loads(path.read_text())
    record["control"] = record["spec"]["method"] == "unconstrained"
    record["label"] = label or record["spec"]["method"]
    path.write_text(json.dumps(record))


def verdict_of(root) -> Verdict:
    return Verdict(next(summaries(read_all([root])[0])))


def by_name(verdict):
    return {candidate.name: candidate for candidate in verdict.candidates}


@pytest.fixture
def clear(tmp_path):
    """A clear gain: two equal constraints above none, one below, and the network as it is far below."""
    for i, (method, level) in enumerate({"own": 0.9, "riemannian": 0.9, "soft": 0.75, "unconstrained": 0.8}.items()):
        study(tmp_path, level, seed=i, method=method, error=1e-8 if i < 2 else 1e-1)
        timed(tmp_path, spec(kind="cost", phase="final", method=method, lr=0.01, seed=FRESH), 2.0 - 0.3 * i)
    study(tmp_path, 0.6, seed=9, error=1.0, **GIVEN)
    return tmp_path


def test_every_pair_is_compared_once_and_controls_come_second(clear):
    verdict = verdict_of(clear)
    assert [c.name for c in verdict.candidates][2:] == ["unconstrained", "soft", "default"]
    assert {c.name for c in verdict.controls} == {"unconstrained", "default"}
    pairs = [(c.first.name, c.second.name) for c in verdict.comparisons]
    assert len(pairs) == len({frozenset(pair) for pair in pairs}) == 10
    assert [c.against_control for c in verdict.comparisons] == [True] * 7 + [False] * 3
    assert all(
        not c.first.control
        for c in verdict.comparisons
        if c.second.name == "unconstrained" and c.first.name != "default"
    )


def test_what_is_clear_is_told_apart_and_equals_are_not(clear):
    verdict = verdict_of(clear)
    known = by_name(verdict)
    assert verdict.between(known["own"], known["unconstrained"]).better
    worse = verdict.between(known["unconstrained"], known["own"])
    assert worse.difference.apart
    assert not worse.better
    assert worse.difference.value == -verdict.between(known["own"], known["unconstrained"]).difference.value
    assert not verdict.between(known["own"], known["riemannian"]).difference.apart
    assert {c.name for c in verdict.rivals(known["own"], verdict.candidates)} == {"riemannian"}
    assert 0.005 < verdict.detectable < 0.05


def test_the_frame_has_a_row_for_each_comparison(clear):
    frame = read_report(clear).verdict()
    assert list(frame)[:8] == ["setting", "method", "against", "n", "difference", "low", "high", "told_apart"]
    assert len(frame) == 10
    at = frame.set_index(["method", "against"])
    assert at.loc[("own", "unconstrained"), "told_apart"]
    assert at.loc[("own", "unconstrained"), "difference"] == pytest.approx(0.1, abs=0.02)
    assert (frame.low[frame.told_apart] * frame.high[frame.told_apart] > 0).all()
    assert set(frame.setting) == {"scale 1"}
    assert set(frame.n) == {10}


@pytest.mark.parametrize("n", [3, 4])
def test_below_five_replicates_there_is_no_verdict(tmp_path, n):
    for i, method in enumerate(("own", "unconstrained")):
        study(tmp_path, 0.9 - 0.3 * i, n=n, seed=i, method=method)
    frame = read_report(tmp_path).verdict()
    assert frame.told_apart.isna().all()
    assert frame.low.isna().all()
    assert list(frame.n) == [n]
    assert verdict_of(tmp_path).detectable is None


def test_the_control_is_a_candidate_everywhere_but_in_feasible(tmp_path):
    for i, method in enumerate(("unconstrained", "own", "soft")):
        study(tmp_path, 0.9 - 0.05 * i, seed=i, method=method, error=(1.0, 1e-8, 1e-2)[i])
        timed(tmp_path, spec(kind="cost", phase="final", method=method, lr=0.01, seed=FRESH), (1.0, 1.8, 1.2)[i])
    answers = {a.requirement.split(" (")[0]: a for a in answers_of(verdict_of(tmp_path))}
    assert answers["best metric"].best.name == "unconstrained"
    assert answers["best metric"].rivals == ()
    assert answers["exactly feasible"].best.name == "own"
    assert answers["cheapest step among the best"].best.name == "unconstrained"
    assert answers["fewest seconds to the target"].best is not None


def test_the_cheapest_is_sought_among_what_cannot_be_told_from_the_best(clear):
    answers = {a.requirement: a for a in answers_of(verdict_of(clear))}
    cheapest = answers["cheapest step among the best"]
    assert cheapest.best.name == "riemannian"  # 1.7 against 2.0; soft and none are cheaper, and worse
    assert "1.7×" in cheapest.evidence


def test_a_cost_that_is_not_credible_is_no_cost(tmp_path):
    study(tmp_path, 0.9, method="own")
    timed(tmp_path, spec(kind="cost", phase="final", lr=0.01, seed=FRESH), 2.0, spread=0.2)
    report = read_report(tmp_path)
    assert report.table().step_ratio.isna().all()
    assert report.recommendations().step_ratio.isna().all()
    (row,) = report.problems[0].settings[0].rows
    assert "busy" in row.cost.doubt
    answer = next(a for a in answers_of(verdict_of(tmp_path)) if a.requirement.startswith("cheapest"))
    assert answer.best is None
    assert "not credible" in answer.reason or "no cost is credible" in answer.reason


def test_requirements_that_nothing_meets_say_what_came_nearest(tmp_path):
    study(tmp_path, 0.4, method="soft", error=2e-2)
    for path in tmp_path.glob("*/run.json"):
        text = path.read_text().replace('"steps_to_target": 20', '"steps_to_target": null')
        path.write_text(text.replace('"status": "done"', '"status": "target missed"'))
    answers = {a.requirement.split(" (")[0]: a for a in answers_of(verdict_of(tmp_path))}
    assert answers["exactly feasible"].best is None
    assert "soft comes nearest, with 2e-02" in answers["exactly feasible"].reason
    assert "soft's comes nearest, with 0.4" in answers["fewest seconds to the target"].reason
    assert answers["best metric"].best.failures == 0, "short of the target is no failure"


def test_the_width_of_rates_at_which_a_method_works(tmp_path):
    study(tmp_path, 0.9, method="own", width=0.002)
    study(tmp_path, 0.9, method="soft", width=0.2, seed=1)
    study(tmp_path, 0.7, method="pogo", width=0.001, seed=2)
    summary = next(summaries(read_all([tmp_path])[0]))
    widths = {c.label: tolerated(c, summary) for c in candidates(summary)}
    assert widths == {"own": 3.0, "soft": 0.0, "pogo": -1.0}  # one rate, and none: never as good as the best
    answer = next(a for a in answers_of(Verdict(summary)) if a.requirement.startswith("most tolerant"))
    assert (answer.best.name, answer.rivals) == ("own", ())


def test_failed_replicates_are_counted_and_are_in_no_mean(tmp_path):
    for i, method in enumerate(("own", "unconstrained")):
        study(tmp_path, 0.9, seed=i, method=method)
    for s in range(3):
        write(tmp_path, spec(method="own", lr=1.0, seed=FRESH + s, study=s, phase="final"), "diverged", "loss")
    own = by_name(verdict_of(tmp_path))["own"]
    assert (own.failures, own.runs, len(own.scores), own.score.n) == (3, 10, 7, 7)
    assert math.isfinite(own.score.value)
    frame = read_report(tmp_path)
    assert list(frame.verdict().n) == [7]
    row = frame.table().set_index("method").loc["own"]
    assert (row.failed, row.n, row.runs, row.short_of_target) == (3, 7, 10, 0)
    for s in range(3, 6):
        write(tmp_path, spec(method="own", lr=1.0, seed=FRESH + s, study=s, phase="final"), "crashed", "SIGSEGV")
    assert "own" not in by_name(verdict_of(tmp_path)), "more than half failed: there is no score"


def test_one_verdict_over_all_settings_pairs_what_belongs_together(tmp_path):
    for depth in (4, 8):
        for i, method in enumerate(("own", "unconstrained")):
            study(tmp_path, 0.9 - 0.1 * i - depth / 100, seed=depth + i, method=method, fields={"depth": depth})
    verdict = verdict_of(tmp_path)
    assert verdict.title == "all settings"
    own = by_name(verdict)["own"]
    assert own.score.value == pytest.approx(0.84, abs=0.01)
    assert own.score.n == 10, "replicates, not runs"
    assert len(verdict.comparisons) == 1
    assert set(read_report(tmp_path).recommendations().setting) == {"all settings"}


def test_the_network_as_it_is_belongs_to_every_scale(tmp_path):
    for scale in (1.0, "relu"):
        for i, method in enumerate(("own", "unconstrained")):
            study(tmp_path, 0.9 - 0.1 * i, seed=i, method=method, options={"scale": scale})
    study(tmp_path, 0.5, seed=5, **GIVEN)
    summary = next(summaries(read_all([tmp_path])[0]))
    assert [s.title for s in summary.settings] == ["scale 1", "scale √2"]
    assert all(len(s.rows) == 3 for s in summary.settings)
    names = sorted(c.name for c in candidates(summary))
    assert names == [
        "default",
        "own at scale 1",
        "own at scale √2",
        "unconstrained at scale 1",
        "unconstrained at scale √2",
    ]
    assert len(Verdict(summary).comparisons) == 10


def test_a_metric_over_decades_is_compared_by_ratios(tmp_path):
    rng = np.random.default_rng(0)
    known = {"metric": "gap", "higher_is_better": False, "log_scale": True}
    for method, level in (("own", 1e-6), ("soft", 1e-3), ("unconstrained", 1e-3)):
        for s in range(6):
            run = spec(method=method, lr=1.0, seed=s, study=s)
            trained(tmp_path, run, level, **known)
            final = spec(method=method, lr=1.0, seed=FRESH + s, study=s, phase="final")
            trained(tmp_path, final, level * math.exp(rng.normal(scale=1.0)), **known)
    verdict = verdict_of(tmp_path)
    known = by_name(verdict)
    assert verdict.candidates[0].name == "own"
    found = verdict.between(known["own"], known["unconstrained"])
    assert found.is_ratio
    assert found.better
    assert found.difference.value == pytest.approx(1e-3, rel=2)
    assert found.difference.low < found.difference.value < found.difference.high < 1
    back = verdict.between(known["unconstrained"], known["own"]).difference
    assert back.value == pytest.approx(1 / found.difference.value)
    assert known["own"].score.low < known["own"].score.value < known["own"].score.high


def test_a_gap_that_rounding_made_zero_counts_as_the_rounding_of_1(tmp_path):
    known = {"metric": "gap", "higher_is_better": False, "log_scale": True}
    for method, level in (("own", 0.0), ("soft", 1e-3), ("unconstrained", -1e-17)):
        for s in range(6):
            trained(tmp_path, spec(method=method, lr=1.0, seed=s, study=s), level, **known)
            value = level * (1 + s / 10) + (1e-9 if s == 0 else 0.0)
            trained(tmp_path, spec(method=method, lr=1.0, seed=FRESH + s, study=s, phase="final"), value, **known)
    verdict = verdict_of(tmp_path)
    known = by_name(verdict)
    assert known["own"].score.value == pytest.approx((1e-9 * 2.0 ** (-52 * 5)) ** (1 / 6), rel=1e-6)
    assert all(comparison.is_ratio for comparison in verdict.comparisons)
    assert verdict.between(known["own"], known["soft"]).better
    assert not verdict.between(known["own"], known["unconstrained"]).difference.apart


def test_the_resolution_is_known_where_every_score_is_a_number_of_examples(tmp_path):
    for s in range(5):
        for method, right in (("own", 270), ("unconstrained", 271)):
            for phase, seed in (("tuning", s), ("final", FRESH + s)):
                run = spec(method=method, lr=1.0, seed=seed, study=s, phase=phase)
                trained(tmp_path, run, right / 360, test_examples=360)
    verdict = verdict_of(tmp_path)
    assert verdict.summary.measure.resolution == pytest.approx(1 / 360)
    (found,) = verdict.comparisons
    assert found.difference.apart is False, "one example of 360 in every run"
    assert found.difference.low < 0 < found.difference.high


def test_other_metrics_have_no_resolution(tmp_path):
    study(tmp_path, 0.9, method="own", test_examples=360)
    assert verdict_of(tmp_path).summary.measure.resolution == 0.0


def test_records_of_one_tuning_are_left_out_where_there_are_studies(tmp_path):
    study(tmp_path, 0.9, method="own", n=5)
    for seed in range(5):
        trained(tmp_path, spec(lr=1.0, seed=FRESH + seed, phase="final"), 0.2)
    trained(tmp_path, spec(lr=1.0), 0.2)
    verdict = verdict_of(tmp_path)
    assert verdict.summary.studies
    assert verdict.summary.single == 6
    assert verdict.candidates[0].score.value > 0.8


def test_each_study_has_its_own_choice_and_edges(tmp_path):
    for s, best in enumerate((0.1, 1.0, 1.0, 1.0, 10.0)):
        for lr in RATES:
            trained(tmp_path, spec(lr=lr, seed=s, study=s), 0.9 - abs(math.log10(lr / best)))
        trained(tmp_path, spec(lr=best, seed=FRESH + s, study=s, phase="final"), 0.9)
    (row,) = next(summaries(read_all([tmp_path])[0])).settings[0].rows
    assert {s: choice.lr for s, choice in row.choices.items()} == dict(enumerate((0.1, 1.0, 1.0, 1.0, 10.0)))
    assert row.choice.lr == 1.0
    assert row.edges == (4,)
    assert by_name(verdict_of(tmp_path))["own"].bound
    assert len(row.final) == 5


def test_a_target_met_before_the_first_step_decides_nothing(tmp_path):
    for s in range(5):
        for phase, seed in (("tuning", s), ("final", FRESH + s)):
            trained(tmp_path, spec(lr=1.0, seed=seed, study=s, phase=phase), 0.9, steps=0)
    (answer,) = (a for a in answers_of(verdict_of(tmp_path)) if a.requirement.startswith("fewest"))
    assert answer.best is None
    assert "before the first step" in answer.reason


def test_a_failed_tuning_run_of_many_is_no_failure_of_its_choice(tmp_path):
    for s in range(5):
        for lr in RATES:
            trained(tmp_path, spec(lr=lr, seed=s, study=s), 0.5)
    write(tmp_path, spec(lr=1.0, seed=0, study=0), "diverged")
    for s in range(3):
        write(tmp_path, spec(lr=10.0, seed=s, study=s), "diverged")
    (row,) = next(summaries(read_all([tmp_path])[0])).settings[0].rows
    assert {trial.choice.lr: trial.validation for trial in row.trials} == {
        0.01: 0.5,
        0.1: 0.5,
        1.0: 0.5,
        10.0: -math.inf,
    }


def test_one_problem_in_two_precisions_is_two_cases_of_a_profile(tmp_path):
    for dtype in ("float32", "float64"):
        for method in ("own", "soft"):
            trained(tmp_path, spec(method=method, dtype=dtype, lr=1.0, phase="final"), 0.9)
    assert sorted(read_report(tmp_path).times().index) == ["toy, scale 1, float32", "toy, scale 1, float64"]


def test_a_factor_called_like_a_column_of_the_machine_keeps_its_name(tmp_path):
    trained(tmp_path, spec(fields={"threads": 7}, lr=1.0), 0.9)
    (row,) = read_report(tmp_path).runs().to_dict("records")
    assert (row["threads"], row["machine_threads"]) == (7, 1)
