"""The README says what is: its snippets run word for word, its generated parts are current.

Run as a script, this file writes the generated parts.
"""

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stiefel.methods import table

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "docs" / "omdsm.csv"


def results() -> str:
    """The table of the committed comparison."""
    rows = list(csv.DictReader(RESULTS.read_text().splitlines()))
    what = f"{rows[0]['cores']} CPU cores ({rows[0]['cpu']}), torch {rows[0]['torch']}, code {rows[0]['commit']}"
    head = f"Every setting of that run, from its records ({what}):\n\n"
    head += "| setting | method | best lr | test accuracy [95 %] | worst error | steps to target | step cost |\n"
    head += "|---|---|---|---|---|---|---|\n"
    lines = []
    for row in rows:
        low, high = float(row["low"]), float(row["high"])
        steps = "∞" if row["steps_to_target"] == "inf" else f"{float(row['steps_to_target']):.0f}"
        test = f"{float(row['test_accuracy']):.3f} [{low:.3f}, {high:.3f}], n = {row['n']}"
        error = f"{float(row['error_worst']):.0e}"
        cells = [row["setting"], f"`{row['method']}`", f"{float(row['lr']):g}", test, error, steps]
        lines.append(f"| {' | '.join(cells)} | {float(row['step_ratio']):.1f}× |\n")
    return head + "".join(lines)


def current(text: str) -> str:
    """The README with its generated parts as they should be."""
    for mark, part in (("methods", table()), ("results", results())):
        pattern = rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)"
        assert len(re.findall(pattern, text, flags=re.S)) == 1, f"the README has lost its mark {mark!r}"
        text = re.sub(pattern, lambda m, part=part: m[1] + part + m[2], text, flags=re.S)
    return text


def snippets() -> list[str]:
    """The README's Python code blocks."""
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)


def snippet(word: str) -> str:
    """The one code block with this word in it."""
    (found,) = (code for code in snippets() if word in code)
    return found


def test_generated_parts_are_current():
    assert README.read_text() == current(README.read_text()), "run `make docs`"


@pytest.mark.parametrize("method", ["own", "riemannian", "pogo", "soft"])
def test_first_snippet_runs_word_for_word(method):
    code = snippets()[0]
    assert code.count('"own"') == 1
    code = code.replace('"own"', f'"{method}"')
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "0.weight" in done.stdout
    assert "worst" in done.stdout


def test_monitor_snippet_runs_word_for_word(tmp_path):
    command = [sys.executable, "-W", "error", "-c", snippet("Monitor")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "step time" in done.stdout
    assert (tmp_path / "log.jsonl").read_text().count("\n") > 1


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
    compare(tmp_path, snippet("make_data"), "--epochs", "4", "--methods", "own", "soft")
    assert (tmp_path / "runs" / "report.html").is_file()


def test_the_template_of_a_method_works_from_a_file_of_ones_own(tmp_path):
    # Registered in the problem's file, a method is known to the driver and to every run's own process.
    (template,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.S)
    assert template.count('name = "nearest_point"') == 1
    source = template.replace('"nearest_point"', '"nearest_point_of_ones_own"')  # the name may be in the catalogue
    compare(tmp_path, source + "\n\n" + snippet("make_data"), "--epochs", "2", "--methods", "nearest_point_of_ones_own")
    assert "nearest_point_of_ones_own" in (tmp_path / "runs" / "summary.csv").read_text()


def test_documented_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"(?:`|    )make (\w+)", README.read_text())
    assert {"compare", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


@pytest.mark.parametrize("name", ["Makefile", "README.md", "CONTRIBUTING.md"])
def test_editable_installs_are_told_in_the_way_that_type_checkers_see(name):
    # The default is an import hook, which mypy, pyright and editors do not run.
    text = (ROOT / name).read_text().replace("\\\n", " ")
    commands = re.findall(r"pip install\b[^\n`]* -e [^\n`]*", text)
    assert commands
    assert all("--config-settings editable_mode=compat" in command for command in commands)


if __name__ == "__main__":
    README.write_text(current(README.read_text()))
