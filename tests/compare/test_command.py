"""The command line, with runs in processes of their own."""

import json

import pytest
from common import compare
from records import comparison

from stiefel.compare import cli, load_problem
from stiefel.compare.plan.plan import Plan
from stiefel.compare.plan.variants import parse_variants
from stiefel.compare.record.run_folder import RunFolder


def test_the_same_command_again_does_only_what_is_missing(toy):
    arguments = ("--methods", "own", "soft", "--jobs", "2", "--scale", "1", "--seeds", "1")
    assert compare(toy, *arguments) == 0
    records = {path: path.stat().st_mtime_ns for path in toy.parent.glob("runs/*/run.json")}
    assert len(records) == 2 * (1 + 1 + 1)  # tuning, final and cost for each method
    lost = min(records)
    lost.unlink()
    (lost.parent / "metrics.jsonl").write_text('{"half a row')  # as a killed run leaves it
    assert compare(toy, *arguments) == 0
    again = {path: path.stat().st_mtime_ns for path in toy.parent.glob("runs/*/run.json")}
    assert again.keys() == records.keys()
    assert {path for path in again if again[path] != records[path]} == {lost}
    assert all(json.loads(line) for line in (lost.parent / "metrics.jsonl").read_text().splitlines())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "ownn"], "did you mean 'own'"),
        (["--device", "cuda"], "no such device on this machine"),
        (["--methods", "own:eps=7"], "eps=7"),
    ],
)
def test_bad_arguments_are_one_line_on_stderr(toy, capsys, arguments, words):
    assert cli.main(["compare", str(toy), *arguments, "--out", str(toy.parent / "runs")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert not (toy.parent / "runs").exists()


def test_compare_on_a_file_without_a_problem(tmp_path, capsys):
    (tmp_path / "empty.py").write_text("x = 1")
    assert cli.main(["compare", str(tmp_path / "empty.py")]) == 2
    assert "ProblemError" in capsys.readouterr().err


def test_report_on_nothing(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "no finished run" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "missing")]) == 2


def test_dry_run_runs_nothing(toy, capsys):
    out = toy.parent / "runs"
    assert cli.main(["compare", str(toy), "--dry-run", "--methods", "own", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "10 studies: 200 tuning runs (7 learning rates, 10 trials each), then 20 runs" in said  # two scales
    assert "no estimate yet" in said
    assert not out.exists()


def test_dry_run_estimates_from_what_has_ended(toy, capsys):
    out = toy.parent / "runs"
    arguments = ["compare", str(toy), "--methods", "own", "--out", str(out), "--lr", "0.1", "1", "--scale", "1"]
    arguments += ["--seeds", "5"]
    assert cli.main([*arguments, "--dry-run", "--jobs", "2"]) == 0
    plan = Plan("toy", load_problem(toy).digest(), (load_problem(toy)().identity(),), parse_variants(["own"]), (1,),
                (0.1, 1.0), seeds=5)  # fmt: skip
    folder = RunFolder(out, plan.tuning()[0])
    folder.start()
    folder.finish({"status": "done", "reason": None, "summary": {"best_validation": 0.9}, "wall_seconds": 60.0}, {})
    capsys.readouterr()
    assert cli.main([*arguments, "--dry-run", "--jobs", "2", "--no-cost"]) == 0
    said = capsys.readouterr().out  # (2 + 8 + 5) runs of a minute, two at a time, of which one has ended
    assert "from scratch about 7 min 30 s, about 7 min 00 s left; estimated from 1 finished training runs" in said


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--timeout", "soon", "expected a positive, finite number, got soon"),
        ("--lr", "-1", "expected a positive, finite number, got -1"),
        ("--lr", "nan", "expected a positive, finite number, got nan"),
        ("--jobs", "0", "expected a whole number ≥ 1, got 0"),
        ("--studies", "many", "expected a whole number ≥ 1, got many"),
    ],
)
def test_a_number_that_is_none_says_what_was_expected(toy, capsys, option, value, expected):
    with pytest.raises(SystemExit) as raised:
        cli.main(["compare", str(toy), "--methods", "own", f"{option}={value}", "--dry-run"])
    assert raised.value.code == 2
    assert expected in capsys.readouterr().err


def test_open_shows_the_page(tmp_path, monkeypatch):
    comparison(tmp_path / "runs", {"own": (0.9, 1e-8), "unconstrained": (0.9, 1.0)})
    shown = []
    monkeypatch.setattr("webbrowser.open", lambda address: shown.append(address) or True)
    assert cli.main(["report", str(tmp_path / "runs"), "--open"]) == 0
    assert shown == [(tmp_path / "runs" / "report.html").resolve().as_uri()]
