"""The documents say what is: their snippets and commands run word for word, their generated parts are current.

Run as a script, this file writes the generated parts.
"""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from documents import COMPARISON, DOCUMENTS, METHODS, README, ROOT, TRAINING, snippet, snippets

import stiefel
from stiefel.compare import cli
from stiefel.compare.analyse.statistics.scores import Interval
from stiefel.compare.present import formatting as words
from stiefel.methods import table

RESULTS, VERDICT = ROOT / "docs" / "omdsm.csv", ROOT / "docs" / "omdsm.json"


def results() -> str:
    """The verdict and the table of the committed comparison."""
    rows = list(csv.DictReader(RESULTS.read_text().splitlines()))
    (verdict,) = json.loads(VERDICT.read_text())["problems"]
    where = f"{rows[0]['cores']} CPU cores ({rows[0]['cpu']}), torch {rows[0]['torch']}, code {rows[0]['commit']}"
    said = "".join(f"> {sentence}\n" for sentence in verdict["sentences"])
    head = f"That run said ({where}):\n\n{said}\n"
    head += (
        "| method | best lr | test accuracy [95 %] | worst error | short of target | steps to target | step cost |\n"
    )
    head += "|---|---|---|---|---|---|---|\n"
    lines = []
    for row in rows:
        test = str(Interval(*(float(row[end]) for end in ("test_accuracy", "low", "high")), int(row["n"]), "interval"))
        steps = "not reached" if row["steps_to_target"] == "inf" else f"{float(row['steps_to_target']):.0f}"
        short = f"{row['short_of_target']} of {row['runs']}"
        cost = f"{float(row['step_ratio']):.1f}×" if row["step_ratio"] else "not credible"
        cells = [
            f"`{row['method']}`",
            f"{float(row['lr']):.2g}",
            test,
            words.error(float(row["error_worst"])),
            short,
            steps,
        ]
        lines.append(f"| {' | '.join(cells)} | {cost} |\n")
    return head + "".join(lines)


GENERATED = {METHODS: ("methods", table), COMPARISON: ("results", results)}
"""Documents with a generated part: its mark, and what writes it."""


def current(document: Path) -> str:
    """A document with its generated part as it should be."""
    text = document.read_text()
    mark, write = GENERATED[document]
    pattern = rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)"
    assert len(re.findall(pattern, text, flags=re.S)) == 1, f"{document.name} has lost its mark {mark!r}"
    return re.sub(pattern, lambda m: m[1] + write() + m[2], text, flags=re.S)


def first_methods() -> list[list[str]]:
    """The cells of the README's table of methods."""
    lines = re.findall(r"^\| (`\w+` \|.*) \|$", README.read_text(), flags=re.M)
    return [[cell.strip(" `") for cell in line.split("|")] for line in lines]


@pytest.mark.parametrize("document", GENERATED, ids=lambda path: path.name)
def test_generated_parts_are_current(document):
    assert document.read_text() == current(document), "run `make docs`"


def test_every_snippet_is_run_below():
    counts = {path.name: len(snippets(path)) for path in DOCUMENTS}
    run = {"README.md": 1, "CONTRIBUTING.md": 1, "training.md": 2, "comparison.md": 2, "jobs.md": 12}
    assert {name: count for name, count in counts.items() if count} == run


@pytest.mark.parametrize("method", [cells[0] for cells in first_methods()])
def test_first_snippet_runs_word_for_word(method):
    (code,) = snippets(README)
    assert code.count('"own"') == 1
    code = code.replace('"own"', f'"{method}"')
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "0.weight" in done.stdout
    assert "worst" in done.stdout


def test_the_first_methods_are_of_every_place_and_as_they_say():
    known = [[name, place, on_the_set] for name, place, on_the_set, _ in first_methods()]
    methods = [stiefel.get(name) for name, *_ in known]
    assert known == [[m.name, m.place, "—" if m.claim is None else str(m.claim)] for m in methods]
    assert {place for _, place, _ in known} == {"forward", "loss", "step"}


def test_monitor_snippet_runs_word_for_word(tmp_path):
    command = [sys.executable, "-W", "error", "-c", snippet(TRAINING, "Monitor")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "step time" in done.stdout
    assert (tmp_path / "log.jsonl").read_text().count("\n") > 1


def test_whitening_snippet_runs_word_for_word():
    command = [sys.executable, "-W", "error", "-c", snippet(TRAINING, "Whitening2d")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def compare(folder, source, *arguments):
    """Compare on a problem file with this source, in a folder, quickly."""
    (folder / "my_problem.py").write_text(source)
    command = [
        sys.executable,
        "-m",
        "stiefel",
        "compare",
        "my_problem.py",
        "--lr",
        "0.1",
        "--seeds",
        "1",
        "--scale",
        "1",
    ]
    command += ["--no-cost", "--jobs", "1", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_problem_snippet_runs_word_for_word(tmp_path):
    compare(tmp_path, snippet(COMPARISON, "make_data"), "--epochs", "4", "--methods", "own", "soft")
    assert (tmp_path / "runs" / "report.html").is_file()
    command = [sys.executable, "-c", snippet(COMPARISON, "read_report")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def commands() -> list[str]:
    """Every comparison on ``my_problem.py`` that a document shows."""
    texts = [README.read_text(), COMPARISON.read_text()]
    found = [
        line.strip()
        for text in texts
        for line in re.findall(r"^    stiefel compare (my_problem.py[^#\n]*)", text, re.M)
    ]
    return list(dict.fromkeys(found))


def test_documented_comparisons_are_plans(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my_problem.py").write_text(snippet(COMPARISON, "make_data"))
    assert len(commands()) > 3
    for command in commands():
        assert cli.main(["compare", *command.split(), *(["--dry-run"] if "--dry-run" not in command else [])]) == 0
        assert "tuning runs" in capsys.readouterr().out, command


def test_the_template_of_a_method_works_from_a_file_of_ones_own(tmp_path):
    # Registered in the problem's file, a method is known to the driver and to every run's own process.
    (template,) = snippets(ROOT / "CONTRIBUTING.md")
    assert template.count('name = "nearest_point"') == 1
    source = template.replace('"nearest_point"', '"nearest_point_of_ones_own"')  # the name may be in the catalogue
    compare(
        tmp_path,
        source + "\n\n" + snippet(COMPARISON, "make_data"),
        "--epochs",
        "2",
        "--methods",
        "nearest_point_of_ones_own",
    )
    assert "nearest_point_of_ones_own" in (tmp_path / "runs" / "summary.csv").read_text()


def test_documented_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = {name for path in DOCUMENTS for name in re.findall(r"(?:`|    )make (\w+)", path.read_text())}
    assert {"compare", "test", "cost", "docs", "reproduce"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def anchors(path: Path) -> set[str]:
    """The places in a document that a link may name, as GitHub forms them of headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target, anchor in re.findall(r"\]\(([^)#\s:]*)(?:#([^)]*))?\)", path.read_text()):
        file = path.parent / target if target else path
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


@pytest.mark.parametrize("name", ["Makefile", "README.md", "CONTRIBUTING.md"])
def test_editable_installs_are_told_in_the_way_that_type_checkers_see(name):
    # The default is an import hook, which mypy, pyright and editors do not run.
    text = (ROOT / name).read_text().replace("\\\n", " ")
    commands = re.findall(r"pip install\b[^\n`]* -e [^\n`]*", text)
    assert commands
    assert all("--config-settings editable_mode=compat" in command for command in commands)


if __name__ == "__main__":
    for document in GENERATED:
        document.write_text(current(document))
