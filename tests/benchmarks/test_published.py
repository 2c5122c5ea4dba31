"""The published comparisons: their commands are plans, their files give their README, a rerun is set beside them."""

import re
from pathlib import Path

import experiments
import pandas as pd
import published
import pytest
import tables
from records import CPU, comparison

from stiefel.compare import cli, read_report

ROOT = Path(__file__).parents[2]

LEVELS = {"own": (0.9, 1e-8), "soft": (0.95, 1e-2), "released": (0.7, 1e-8), "unconstrained": (0.97, 1.0)}


@pytest.fixture
def result(tmp_path, monkeypatch) -> tables.Result:
    """Made-up records, collected."""
    points = [{"depth": 4}, {"depth": 8}]
    made_up = {"wrong": {"released": "made up"}, "environment": CPU | {"torch": "2"}}
    comparison(tmp_path / "runs", LEVELS, fields=points, scales=(1.0, "relu"), **made_up)
    monkeypatch.setattr(published, "HERE", tmp_path)
    shown = {"page": True, "figures": ["sensitivity", "depth 8, scale √2"]}
    monkeypatch.setitem(published.COMPARISONS, "omdsm", published.COMPARISONS["omdsm"] | shown)
    assert published.collect("omdsm", tmp_path / "runs") == 0
    return tables.Result(tmp_path / "results" / "omdsm")


@pytest.mark.parametrize("name", published.COMPARISONS)
def test_every_command_is_a_plan(name, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    assert cli.main([*published.command(name), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"\d+ tuning runs \(\d+ learning rates", said)
    assert f"runs/published/{name}" in said


@pytest.mark.parametrize("template", published.DOCUMENTS)
def test_a_document_is_what_the_records_say(template):
    path = ROOT / "benchmarks" / published.DOCUMENTS[template]
    assert path.read_text() == published.rendered(template), "run `make docs`"


def test_the_published_files_are_small_and_know_no_machine():
    files = [file for file in (ROOT / "benchmarks" / "results").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 20e6
    for file in files:
        if file.suffix in (".html", ".csv", ".md"):
            assert not re.search(r"/(home|root|tmp|work)/", file.read_text()), file


def test_collected_files_hold_what_the_report_says(result, tmp_path):
    report = read_report(tmp_path / "runs")
    files = {file.name for file in result.folder.iterdir()}
    assert files == {
        "report.html",
        "summary.csv",
        "verdict.csv",
        "runs.csv.gz",
        "epochs.csv.gz",
        "sensitivity.png",
        "depth-8-scale-relu.png",
    }
    assert len(result.summary) == len(report.table())
    assert len(result.runs) == len(report.runs())
    row = report.table().set_index(["setting", "method"]).loc[("depth 8, scale √2", "own")]
    assert result.score("own", "depth 8, scale √2") == pytest.approx(row["test_accuracy"], rel=1e-5)
    assert result.settings == ["depth 4, scale 1", "depth 4, scale √2", "depth 8, scale 1", "depth 8, scale √2"]
    assert result.methods == ["unconstrained", "soft", "own", "released"]
    assert result.faulty == {"released"}
    assert result.best("depth 4, scale 1") == "unconstrained"
    assert result.best("depth 4, scale 1", result.constrained) == "soft"
    assert result.worst("depth 4, scale 1", result.methods) == "released"
    assert result.above("soft", "released", "depth 4, scale 1")
    assert not result.above("released", "soft", "depth 4, scale 1")
    assert result.ratio("soft") == pytest.approx(1.5, rel=1e-5)
    for told in report.verdict().itertuples():  # of methods at a scale, where that is a choice too
        assert result.overall(told.method, told.against).difference == pytest.approx(told.difference, rel=1e-5)
    protocol = result.protocol()
    assert "64 tuning runs, 80 reported ones on fresh seeds and 8 cost runs" in protocol
    assert "4 tuning runs each over rates from 0.01 to 10, 5 fresh seeds" in protocol


def test_a_table_marks_known_faults(result):
    lines = result.scores(result.where("scale 1")).splitlines()
    assert [line.split("|")[1].strip() for line in lines] == [
        "method",
        "---",
        "`unconstrained`",
        "`soft`",
        "`own`",
        "`released` †",
    ]
    assert "**" not in lines[-1]
    assert "\n".join(lines).count("**") == 4  # one score of each of two settings
    assert lines[0].endswith("| worst error | step |")
    free = tables.Result(result.folder)
    free.__dict__["runs"] = result.runs[result.runs.kind == "quality"]
    assert free.scores(free.settings).splitlines()[0].endswith("| worst error |"), "no cost was measured"


def rerun(tmp_path, change) -> tables.Result:
    """The made-up runs again, with a change to their frames."""
    folder = tmp_path / "again"
    folder.mkdir()
    frames = published.frames(read_report(tmp_path / "runs"))
    published.write({name: change(frame) for name, frame in frames.items()}, folder)
    return tables.Result(folder)


def test_a_rerun_that_is_what_is_published_agrees(result, tmp_path):
    said, apart = published.beside(rerun(tmp_path, lambda frame: frame), result)
    assert said.startswith("16 scores beside the published ones")
    assert "≠ depth" not in said
    assert said.endswith("0 of 16 differ")
    assert apart == 0


def test_a_rerun_with_a_method_that_moved_differs_there(result, tmp_path):
    def moved(frame):
        if "test_at_best" not in frame:
            return frame
        return frame.assign(test_at_best=frame.test_at_best - 0.1 * (frame.label == "soft"))

    said, apart = published.beside(rerun(tmp_path, moved), result)
    assert said.count("≠ depth") == apart == 4
    assert all("soft" in line for line in said.splitlines() if line.startswith("≠"))


def test_a_method_that_fails_in_a_rerun_differs(result, tmp_path):
    def failed(frame):
        lost = frame.label == "own" if "label" in frame else None
        return frame if lost is None else frame.assign(test_at_best=frame.test_at_best.mask(lost))

    said, apart = published.beside(rerun(tmp_path, failed), result)
    assert apart == 4
    assert said.count("own: failed → ") == 4


def test_a_run_that_disagrees_fails(result, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(published, "RUNS", tmp_path)
    monkeypatch.setattr(published.cli, "main", lambda arguments: 0)
    (tmp_path / "runs").rename(tmp_path / "omdsm")
    assert published.main(["run", "omdsm"]) == 0
    told = pd.read_csv(result.folder / "runs.csv.gz", low_memory=False)
    told.assign(test_at_best=told.test_at_best + 0.05).to_csv(result.folder / "runs.csv.gz", index=False)
    assert published.main(["run", "omdsm"]) == 1
    assert "16 of 16 differ" in capsys.readouterr().out


def test_the_luck_of_the_test_set_is_in_the_interval(result):
    narrow = result.interval("own", "depth 4, scale 1")
    parts = "[" + ", ".join(["0.8", "1.0"] * 10) + "]"
    wide = tables.Result(result.folder)
    wide.__dict__["runs"] = result.runs.assign(test_parts=parts)  # a cached property: as if it had been read
    found = wide.interval("own", "depth 4, scale 1")
    shared = (0.1**2 * 20 / 19) / 20
    t = 2.7764451
    assert (found.high - found.value) ** 2 - (narrow.high - narrow.value) ** 2 == pytest.approx(
        t**2 * (shared - tables.resolution(result.runs.test_at_best) ** 2), rel=0.02
    )


def test_scores_are_means_with_t_intervals_and_names_their_resolution(result, tmp_path):
    """As the report of the same records has them; the files hold six digits."""
    rows = read_report(tmp_path / "runs").table().set_index(["setting", "method"])
    for (setting, method), row in rows.iterrows():
        found = result.interval(method, setting)
        expected = [row["test_accuracy"], row["low"], row["high"]]
        assert [found.value, found.low, found.high] == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize(
    ("examples", "scores"), [(1536, (0.793620, 0.854167)), (512, (0.998047, 0.5)), (0, (0.1234, 2.5))]
)
def test_the_size_of_a_test_set_is_found_from_scores(examples, scores):
    assert tables.resolution(pd.Series(scores)) == (pytest.approx(1 / examples) if examples else 0.0)


def test_both_controls_are_in_the_first_family(result):
    assert set(result.against_control) == {
        (method, "unconstrained", setting) for method in ("own", "soft") for setting in result.settings
    }, "known faults are in no family with no constraint"
    given = tables.Result(result.folder)
    given.__dict__["summary"] = result.summary.replace({"method": {"soft": "default"}})
    given.__dict__["runs"] = result.runs.replace({"label": {"soft": "default"}})
    assert set(given.against_control) == {
        (*pair, setting)
        for pair in (("own", "unconstrained"), ("own", "default"), ("default", "unconstrained"))
        for setting in result.settings
    }
    assert given.difference("unconstrained", "default", "depth 4, scale 1").value == pytest.approx(0.02, abs=0.01)
    assert len(result.pairs) == 4 * 6


def test_times_of_a_busy_machine_are_not_published(result):
    assert result.refused == (0, 8)
    loud = result.runs.assign(
        step_seconds=result.runs.step_seconds.str.replace(r'"q3": [\d.]+', '"q3": 9.0', regex=True)
    )
    busy = tables.Result(result.folder)
    busy.__dict__["runs"] = loud
    assert busy.refused == (8, 8)
    assert "not credible" in busy.scores(busy.where("scale 1"))


def test_a_sentence_must_not_outlive_its_numbers():
    assert published.holds(True) == ""
    with pytest.raises(AssertionError, match="what the records do not"):
        published.holds(False)


def test_what_an_experiment_left_is_read(tmp_path):
    lines = ["kind,lr,seed,accuracy,validation,layer"]
    for lr, accuracy, validation in ((0.1, 0.9, 0.8), (1.0, 0.5, 0.9)):
        lines += [f"a,{lr},{seed},{accuracy + 0.02 * seed},{validation},{layer}" for seed in (0, 1) for layer in (1, 2)]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    found = experiments.Experiment(tmp_path)
    assert found.rate(kind="a") == 1.0, "by validation, not by the test"
    tuned = found.tuned(kind="a")
    assert (tuned.mean, tuned.error) == (pytest.approx(0.51), pytest.approx(0.01))
    assert str(tuned) == ".510 ± .010"
    assert found.mean("accuracy", lr=0.1, seed=1, layer=2) == pytest.approx(0.92)
    with pytest.raises(ValueError, match="no rows"):
        found.mean("accuracy", kind="b")
