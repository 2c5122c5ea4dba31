"""What a report writes before it prints: CSV without formulas, verdict.json, and no folder of the machine."""

import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from records import comparison, spec, trained, write
from rich.console import Console

from stiefel.compare import cli, read_report
from stiefel.compare.analyse.verdict import Verdict
from stiefel.compare.present.publish import guarded, publish
from stiefel.compare.present.sentences import sentences
from stiefel.compare.present.verdict_json import document

LEVELS = {"unconstrained": (0.8, 1.0), "own": (0.9, 1e-8), "soft": (0.85, 1e-2)}
FILES = {"report.html", "summary.csv", "runs.csv", "verdict.json"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    comparison(folder, LEVELS, rates=(0.1, 1.0))
    return folder


def command(*arguments, **environment):
    return {
        "args": [sys.executable, "-W", "error", "-m", "stiefel", "report", *map(str, arguments)],
        "env": {**os.environ, **environment},
    }


# --- formulas ---

FORMULAS = ("=1+1", "+1;x", "-x", "@SUM(1)", "\tx", "\r=1", "'=1")


def test_a_spreadsheet_finds_no_formula_in_a_table():
    rows = pd.DataFrame({"text": [*FORMULAS, "own", "-0.5", None], "number": [-1.0] * 10, "=head": ["a"] * 10})
    safe = guarded(rows)
    assert list(safe.text[:-1]) == [*(f"'{text}" for text in FORMULAS), "own", "-0.5"]
    assert safe.text.isna().sum() == 1
    assert list(safe) == ["text", "number", "'=head"]
    assert safe.number.equals(rows.number)
    undone = safe.text.str.replace(r"^'(?='*[=+\-@\t\r])", "", regex=True)
    assert list(undone[:-1]) == list(rows.text[:-1])


def test_records_bring_no_formulas_into_the_csv_files(tmp_path):
    processor = {"cpu": "@SUM(1)", "threads": 1}
    for seed in range(5):
        run = spec(problem="=cmd|' /C calc'!A0", phase="final", seed=seed)
        trained(tmp_path, run, 0.9, environment=processor, **{"=key": "+text", "faults": "-fault"})
    publish(read_report(tmp_path), html=tmp_path / "report.html", console=Console(file=io.StringIO()))
    for name in ("summary", "runs"):
        rows = pd.read_csv(tmp_path / f"{name}.csv", dtype=str, keep_default_na=False)
        for text in (*rows.columns, *rows.to_numpy().ravel()):
            assert not re.match(r"[=+\-@\t\r]", text) or math.isfinite(float(text))
        assert set(rows.problem) == {"'=cmd|' /C calc'!A0"}
        assert set(rows.cpu) == {"'@SUM(1)"}
        parquet = pd.read_parquet(tmp_path / f"{name}.parquet")
        assert set(parquet.problem) == {"=cmd|' /C calc'!A0"}


# --- the verdicts as JSON ---


def test_verdict_json_says_what_the_report_says(root, tmp_path):
    report = read_report(root)
    publish(report, html=tmp_path / "report.html", console=Console(file=io.StringIO()))

    def refuse(constant):
        raise AssertionError(f"{constant} is not strict JSON")

    told = json.loads((tmp_path / "verdict.json").read_text(encoding="utf-8"), parse_constant=refuse)
    (problem,) = told["problems"]
    verdict = Verdict(report.problems[0])
    assert problem["sentences"] == sentences(verdict)
    assert problem["design"]["n"] == 5
    assert problem["design"]["methods"] == [c.name for c in verdict.candidates] == ["own", "soft", "unconstrained"]
    assert problem["design"]["detectable"] == pytest.approx(verdict.detectable)
    best = next(answer for answer in problem["answers"] if answer["requirement"] == "best metric")
    row = report.table().iloc[0]
    assert best["method"] == row.method == "own"
    assert best["score"] == {
        "value": pytest.approx(row.test_accuracy),
        "low": pytest.approx(row.low),
        "high": pytest.approx(row.high),
        "n": 5,
        "kind": "interval",
    }
    compared = report.verdict()
    assert len(problem["comparisons"]) == len(compared) == 3
    for found, (_, known) in zip(problem["comparisons"], compared.iterrows(), strict=True):
        assert (found["method"], found["against"], found["told_apart"]) == (
            known.method,
            known.against,
            known.told_apart,
        )
        assert found["difference"] == pytest.approx(known.difference)


def test_what_is_not_known_is_null(tmp_path):
    """Below five replicates nothing is told apart; an error that became infinite is not recorded."""
    for seed in range(2):
        for method, value in (("own", 0.9), ("soft", 0.8)):
            run = spec(method=method, phase="final", seed=seed)
            trained(tmp_path, run, value, orthogonality_worst=math.inf)
    told = document(read_report(tmp_path).problems)["problems"][0]
    json.dumps(told, allow_nan=False)
    assert [(c["told_apart"], c["p"], c["low"]) for c in told["comparisons"]] == [(None, None, None)]
    assert told["design"]["detectable"] is None
    assert told["answers"][0]["error"] is None


def test_the_keys_of_verdict_json_are_documented(root):
    text = (Path(__file__).parents[3] / "docs" / "comparison.md").read_text(encoding="utf-8")
    told = document(read_report(root).problems)
    problem = told["problems"][0]
    for part in (told, problem, problem["design"], problem["answers"][0], problem["answers"][0]["score"]):
        for key in part:
            assert f"`{key}`" in text, key
    for key in problem["comparisons"][0]:
        assert f"`{key}`" in text, key


# --- files first, and a terminal of any kind ---


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "latin-1"},
    ],
    ids=["C", "latin-1"],
)
def test_a_terminal_that_is_not_utf8_loses_nothing(root, tmp_path, environment):
    done = subprocess.run(
        **command(root, "--html", tmp_path / "report.html", **environment), capture_output=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert {file.name for file in tmp_path.iterdir()} >= FILES
    assert b"own" in done.stdout


def test_a_reader_who_leaves_loses_no_file_and_sees_no_traceback(root, tmp_path):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(**command(root, "--html", tmp_path / "report.html"), **pipes) as reporter:
        reporter.stdout.close()  # as head does when it has its line
        assert reporter.stderr.read() == b""
    assert reporter.returncode == 0
    assert {file.name for file in tmp_path.iterdir()} >= FILES


def test_files_are_written_before_the_terminal(root, tmp_path):
    class Broken(io.StringIO):
        def write(self, text):
            raise RuntimeError("the terminal is gone")

    with pytest.raises(RuntimeError, match="terminal is gone"):
        publish(read_report(root), html=tmp_path / "report.html", console=Console(file=Broken()))
    assert {file.name for file in tmp_path.iterdir()} >= FILES


# --- nothing of the machine, and no torch ---


def test_a_report_names_no_folder_above_its_records(tmp_path, capsys, monkeypatch):
    home = tmp_path / "home" / "ann"
    runs = home / "work" / "runs"
    runs.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "work")
    comparison(runs, LEVELS, rates=(1.0,))
    broken = write(runs, spec(seed=90), "error", f"FileNotFoundError: '{home}/data/x'")
    raw = json.loads((broken / "run.json").read_text())
    raw["traceback"] = [f'  File "{home}/work/toy.py", line 3, in loss', f'  File "{home}/lib/site-packages/a/b.py"']
    (broken / "run.json").write_text(json.dumps(raw))
    torn = write(runs, spec(seed=91))
    (torn / "run.json").write_text("{")
    assert cli.main(["report", "runs"]) == 3
    texts = {"terminal": capsys.readouterr().out}
    texts |= {name: (runs / name).read_text(encoding="utf-8") for name in FILES}
    for where, text in texts.items():
        assert str(tmp_path) not in text, where
        assert "ann" not in re.findall(r"\w+", text), where
    assert "site-packages/a/b.py" in texts["report.html"]
    assert "./toy.py" in texts["report.html"]
    assert f"{torn.name}/run.json is corrupt" in " ".join(texts["terminal"].split())
    assert f"(see {broken.name})" in " ".join(texts["terminal"].split())


def test_a_report_of_a_small_folder_starts_fast_and_without_torch(root, tmp_path):
    """Processor time of the import of all that a report needs, and of the report itself."""
    code = f"""
import sys, time
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "geoopt"):
            raise ImportError(name)
sys.meta_path.insert(0, NoTorch())
start = time.process_time()
import stiefel.compare.present.publish
imported = time.process_time() - start
from stiefel.compare import cli
status = cli.main(["report", {str(root)!r}, "--html", {str(tmp_path / "report.html")!r}])
print(imported, status, "torch" in sys.modules, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    imported, status, torch = done.stderr.split()
    assert (status, torch) == ("0", "False")
    assert float(imported) < 2
