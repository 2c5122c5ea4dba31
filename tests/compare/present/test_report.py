"""The reporting side of the comparison, on made-up records: scores, ranks, recommendations, notes, profiles, files."""

import gc
import io
import json
import math
import re
import shutil
import subprocess
import sys
import time
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text
from records import CPU, GPU, comparison, edit, measured, spec, timed, trained, write
from rich.console import Console

import stiefel
from stiefel.compare import cli, read_report
from stiefel.compare.analyse.frames import runs
from stiefel.compare.analyse.notes import notes
from stiefel.compare.analyse.profile import profile
from stiefel.compare.analyse.requirements import answers as answers_of
from stiefel.compare.analyse.summarize import summaries
from stiefel.compare.analyse.summary import Summary
from stiefel.compare.analyse.verdict import Verdict
from stiefel.compare.plan.plan import FRESH
from stiefel.compare.present.publish import flat, publish
from stiefel.compare.present.report import Report
from stiefel.compare.present.sentences import grouped, sentences
from stiefel.compare.record.choice import Choice
from stiefel.compare.record.records import read_all

LEVELS = {"own": (0.9, 1e-8), "soft": (0.95, 1e-2), "pogo": (0.8, 1e-4), "unconstrained": (0.97, 1.0)}


@pytest.fixture
def root(tmp_path):
    comparison(tmp_path / "runs", LEVELS)
    return tmp_path / "runs"


def summary_of(root) -> Summary:
    return next(summaries(read_all([root])[0]))


def rows_of(root):
    (setting,) = summary_of(root).settings
    return {row.label: row for row in setting.rows}


# --- one problem ---


def test_ranks_with_and_without_feasibility(root):
    (setting,) = summary_of(root).settings
    rows = {row.label: row for row in setting.rows}
    assert [row.label for row in setting.rows] == ["unconstrained", "soft", "own", "pogo"]
    assert [setting.rank(row) for row in setting.rows] == [1, 2, 3, 4]
    assert [setting.rank(row, 1e-3) for row in setting.rows] == [None, None, 1, 2]
    assert [setting.rank(row, 1e-6) for row in setting.rows] == [None, None, 1, None]
    assert (setting.best().label, setting.best(1e-3).label) == ("unconstrained", "own")
    assert rows["own"].feasible == 1e-6
    assert rows["pogo"].feasible == 1e-3
    assert rows["soft"].feasible is None
    assert (rows["own"].runs, len(rows["own"].tuning)) == (5, 4)
    assert rows["own"].rates == [0.01, 0.1, 1.0, 10.0]


def test_the_score_is_over_all_runs_and_failures_stand_beside(root):
    trained(root, spec(method="own", phase="final", lr=1.0, seed=FRESH), 0.9, status="diverged")
    row = rows_of(root)["own"]
    assert row.failures == {"diverged": 1}
    assert row.failed == "1/5 (1 diverged)"
    assert FRESH not in row.scores
    assert row.test.value == pytest.approx(np.mean(list(row.scores.values())))
    assert (row.test.n, row.test.kind) == (4, "range"), "too few for an interval"
    assert row.error_worst == 1e-8, "of the runs that trained to their end"
    assert row.steps_to_target.high == math.inf
    assert row.steps_to_target.finite


def test_less_is_better_where_the_problem_says_so(tmp_path):
    for method, value in (("own", 0.3), ("soft", 0.1)):
        for seed in range(3):
            for phase in ("tuning", "final"):
                run = spec(method=method, phase=phase, seed=seed)
                trained(tmp_path, run, value + seed / 100, metric="mse", higher_is_better=False)
    write(tmp_path, spec(method="soft", phase="final", seed=3), "timeout")
    (setting,) = summary_of(tmp_path).settings
    assert [row.label for row in setting.rows] == ["soft", "own"]
    assert 3 not in setting.rows[0].scores
    assert setting.rows[0].test.value == pytest.approx(0.11)
    assert setting.rows[0].failures == {"timeout": 1}


def test_the_choice_has_knobs_and_only_its_runs_are_reported(root):
    knobs = {"strength": 0.01}
    trained(root, spec(method="soft", lr=1.0, knobs=knobs), 0.99)
    for seed in range(2):
        trained(root, spec(method="soft", lr=1.0, knobs=knobs, phase="final", seed=FRESH + seed), 0.985)
    row = rows_of(root)["soft"]
    assert row.choice == Choice(1.0, (("strength", 0.01),))
    assert (row.runs, row.test.value) == (2, pytest.approx(0.985))  # not the five at the defaults
    assert row.tuned.validation == 0.99
    assert row.default.choice == Choice(0.1)
    assert row.rates == [0.01, 0.1, 1.0, 10.0]
    assert not row.edge


def test_the_edge_is_that_of_the_rates_tried_with_default_knobs(tmp_path):
    for lr, value in ((0.1, 0.5), (1.0, 0.9)):
        trained(tmp_path, spec(lr=lr), value)
    trained(tmp_path, spec(lr=1.0, knobs={"iterations": 9}), 0.95)
    (row,) = rows_of(tmp_path).values()
    assert row.edge
    assert row.default.choice.lr == 0.1


def test_the_default_is_the_nearest_rate_tried(tmp_path):
    for lr, value in ((0.03, 0.5), (1.0, 0.9)):
        trained(tmp_path, spec(lr=lr), value, default_rate=0.1)
    (row,) = rows_of(tmp_path).values()
    assert (row.default.choice.lr, row.default.validation) == (0.03, 0.5)
    for record in row.tuning:
        del record.summary["default_rate"]
    assert row.default is None


def test_a_skipped_method_is_in_the_table_with_its_reason(root):
    for lr in (0.1, 1.0):
        write(root, spec(method="cayley", lr=lr), "skipped", "no tall weights")
    summary = summary_of(root)
    row = summary.settings[0].rows[-1]
    assert (row.label, row.state, row.skipped, row.test) == ("cayley", "skipped", "no tall weights", None)
    assert summary.settings[0].rank(row) is None
    text = shown(root)
    assert text.count("no tall weights") == 1
    assert read_report(root).table().set_index("method").loc["cayley", "state"] == "skipped"


def test_states_without_a_score(tmp_path):
    write(tmp_path, spec(method="own"), "diverged")
    trained(tmp_path, spec(method="soft"), 0.9)
    rows = rows_of(tmp_path)
    assert (rows["own"].state, rows["soft"].state) == ("every run failed", "no fresh-seed run")


def test_settings_are_sorted_by_number_and_costs_belong_to_their_own(tmp_path):
    for depth, ratio in ((40, 7.0), (4, 2.0)):  # "depth 4" is the beginning of "depth 40"
        timed(tmp_path, spec(kind="cost", phase="final", fields={"depth": depth}), ratio)
        trained(tmp_path, spec(fields={"depth": depth}, phase="final"), 0.9, target=depth)
    found = [(s.title, s.rows[0].cost.ratio, s.target) for s in summary_of(tmp_path).settings]
    assert found == [("depth 4, scale 1", 2.0, 4), ("depth 40, scale 1", 7.0, 40)]


def test_counts_of_a_step_may_be_missing(root):
    old = timed(root, spec(kind="cost", phase="final", method="own", seed=FRESH, lr=0.01), 2.0)
    (cost,) = (c for c in summary_of(root).cost if c.label == "own")
    assert cost.counts == {"matmul_flops": None, "factorization_flops": None, "operators": None}
    shutil.rmtree(old)
    timed(root, spec(kind="cost", phase="final", method="own", seed=FRESH, lr=0.01), 2.0, operators=17)
    (cost,) = (c for c in summary_of(root).cost if c.label == "own")
    assert cost.counts["operators"] == 17


# --- notes ---


def notes_of(root) -> str:
    return "\n".join(notes(summary_of(root)))


def test_a_comparison_that_keeps_the_protocol_has_no_notes(root):
    assert notes_of(root) == ""


def test_notes_tell_where_the_protocol_was_not_kept(tmp_path):
    comparison(tmp_path, LEVELS, rates=(0.1, 1.0, 10.0), seeds=3)
    trained(tmp_path, spec(method="soft", lr=3.0), 0.1)
    for path in tmp_path.glob("*/run.json"):
        if '"kind": "cost"' in path.read_text():
            shutil.rmtree(path.parent)
    trained(tmp_path, spec(method="landing", lr=0.1), 0.1)
    trained(tmp_path, spec(method="landing", lr=10.0), 0.9)
    notes = notes_of(tmp_path)
    assert "unequal numbers of tuning runs: 2 (landing) against 3 (unconstrained, own, pogo) against 4 (soft)" in notes
    assert "the learning rates span 2.0 decades, the protocol asks for 3" in notes
    assert "only n = 3 replicates: there is no verdict and no interval below n = 5" in notes
    assert "no run with fresh seeds, so no score: landing" in notes
    assert "on the edge of those tried, a better one may lie outside: landing" in notes
    assert "there is no cost pass" in notes


def test_a_busy_machine_shows_in_the_controls_own_step(root):
    def told():
        return [note for note in notes(summary_of(root)) if "other work shared the machine" in note]

    assert not told()
    control = {"median": 0.04, "q1": 0.03, "q3": 0.05, "n": 60}
    run = spec(method="soft", lr=0.01, seed=FRESH, phase="final", kind="cost")
    timed(root, run, 1.5, step_seconds={"method": control, "control": control})
    assert len(told()) == 1
    assert "took 10 to 40 ms" in told()[0]


def test_versions_of_the_code_and_machines_are_told(root):
    other = CPU | {"commit": "def", "cpu": "another"}
    trained(root, spec(method="own", lr=0.1), 0.5, environment=other)
    assert "2 versions of the code, whose results may differ: abc, def" in notes_of(root)
    assert "the quality runs come from 2 kinds of hardware" in notes_of(root)


# --- all problems ---


def test_problems_devices_and_sources_are_never_mixed(tmp_path):
    comparison(tmp_path / "a", {"own": (0.9, 1e-8)}, problem="first")
    comparison(tmp_path / "a", {"own": (0.8, 1e-8)}, problem="second")
    comparison(tmp_path / "b", {"own": (0.7, 1e-8)}, problem="second", device="cuda", environment=GPU)
    edit(trained(tmp_path / "a", spec(problem="first", digest="earlier"), 0.1), ended=1)
    shutil.copytree(tmp_path / "a", tmp_path / "copy")  # the same runs twice count once
    report = read_report(tmp_path / "a", tmp_path / "b", tmp_path / "copy")
    found = {(s.problem, s.digest, s.device): (len(s.records), s.older) for s in report.problems}
    assert found == {
        ("second", "d", "cuda"): (10, 0),
        ("second", "d", "cpu"): (10, 0),
        ("first", "d", "cpu"): (10, 1),
    }
    assert "1 record is left out: made with an earlier source of first" in "".join(notes(report.problems[-1]))
    table = report.table()
    assert list(table.groupby(["problem", "device"]).size()) == [1, 1, 1]
    cuda = next(s for s in report.problems if s.device == "cuda")
    assert cuda.title == "second · GPU cost, a GPU"
    assert report.problems[-1].title == "first · CPU cost, a processor, 1 thread"
    assert set(report.figures()) >= {"profile-cpu", "second-cuda-float32-sensitivity"}
    assert next(summaries(read_all([tmp_path / "a"])[0])).problem in ("first", "second")


def test_faults_are_a_note(root, tmp_path):
    (root / "broken").mkdir()
    (root / "broken" / "run.json").write_text("{")
    report = read_report(root)
    assert "unreadable records left out: 1 (" in report.notes[0]
    assert "broken/run.json is corrupt" in report.notes[0]
    assert "broken/run.json is corrupt" in shown(root, width=300)
    assert "broken/run.json is corrupt" in page(root)


def test_nothing_to_report(tmp_path):
    with pytest.raises(stiefel.ProblemError, match="there is no folder"):
        read_report(tmp_path / "missing")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "run.json").write_text("[]")
    with pytest.raises(stiefel.ProblemError, match=r"no finished run.*1 unreadable"):
        read_report(tmp_path)


# --- methods with known faults ---


def test_known_faults_keep_a_method_apart_everywhere(tmp_path):
    root, better = tmp_path / "runs", {"own_as_released": (0.99, 1e-8)}
    comparison(root, LEVELS | better, wrong={"own_as_released": "never zeroes its gradient"}, signals=True)
    summary = summary_of(root)
    (setting,) = summary.settings
    assert [row.label for row in setting.rows][-1] == "own_as_released"  # although its score is the best
    assert [setting.rank(row) for row in setting.rows] == [1, 2, 3, 4, None]
    assert [setting.rank(row, 1e-6) for row in setting.rows] == [None, None, 1, None, None]
    verdict = Verdict(summary)
    for answer in answers_of(verdict):
        named = [answer.best, *answer.rivals] if answer.best else []
        assert "own_as_released" not in [candidate.name for candidate in named]
    assert not any("own_as_released" in sentence for sentence in sentences(verdict))
    (note,) = [note for note in notes(summary) if "known faults" in note]
    assert "never zeroes its gradient" in note
    assert note.endswith(": own_as_released")
    assert "own_as_released †" in shown(root)
    text = page(root)
    assert text.count("<td>own_as_released †</td>") == 5  # standings, results, cost, default beside tuned, why
    assert ">own_as_released<" not in text
    # In every figure with methods in it: on the line in the legend, the axis or the panel.
    figures = read_report(root).figures()
    for name, figure in figures.items():
        texts = [t.get_text() for t in figure.findobj(Text)]
        assert "own_as_released" not in texts, name
        verdicts = name.endswith(("dependence", "scores", "cost"))  # figures of what is ranked
        assert ("own_as_released †" in "\n".join(texts)) != verdicts, name
    curves = next(figure for name, figure in figures.items() if name.endswith("scale 1"))
    (line,) = [line for line in curves.axes[0].lines if line.get_label() == "own_as_released †"]
    assert line.get_linestyle() != "-"
    assert read_report(root).table().set_index("method").faults["own_as_released"] == "never zeroes its gradient"


# --- the verdict in words ---


def said(root) -> list[str]:
    return sentences(Verdict(summary_of(root)))


def test_a_gain_is_said_with_what_is_cheaper_and_no_worse(tmp_path):
    comparison(tmp_path, {"unconstrained": (0.7, 1.0), "soft": (0.9, 1e-2), "own": (0.9, 1e-8)}, seeds=10)
    first, second, *_ = said(tmp_path)
    start = "On this problem, at the rates that one tuning chose, `own` raises accuracy by "
    assert first.startswith(start)
    assert re.fullmatch(
        r"20\.\d+ points \[19[\d.]+, 20[\d.]+\] over no constraint, n = 10 runs; "
        r"a step takes 2 times as long as without\.",
        first[len(start) :],
    )
    assert second.startswith("`soft` cannot be told from it (a difference above ")
    assert second.endswith("and costs 1.5× instead of 2× a step.")


def test_no_gain_is_said_with_what_would_have_been_found(tmp_path):
    comparison(tmp_path, {"unconstrained": (0.9, 1.0), "own": (0.9, 1e-8)}, seeds=10)
    first, second, *_ = said(tmp_path)
    assert "`own` did not beat training without one: it is 0.00 points [" in first
    assert re.search(r"a difference above [\d.]+ points would have been found about 4 times in 5\.$", first)
    assert second.startswith("If the weights must be orthogonal, take `own`: it is 0.0")


def test_a_loss_is_said_of_those_that_lose(tmp_path):
    comparison(tmp_path, {"unconstrained": (0.95, 1.0), "own": (0.85, 1e-8), "soft": (0.8, 1e-2)}, seeds=10)
    assert "every constraint costs accuracy: the best, `own`, is 10.00 points" in said(tmp_path)[0]


def test_too_few_runs_are_no_verdict(tmp_path):
    comparison(tmp_path, LEVELS, seeds=3)
    first = said(tmp_path)[0]
    assert first.startswith("n = 3 is too few to tell methods apart: a verdict needs 5, better 10 (`--studies 10`).")
    assert "that of no constraint, 0.8" in first


def test_without_a_control_the_gain_is_not_known(tmp_path):
    comparison(tmp_path, {"own": (0.9, 1e-8)}, seeds=5)
    first = said(tmp_path)[0]
    assert "`own` has the best accuracy" in first
    assert "told apart" not in first, "there is no other"
    assert "no network without one has a score" in first


def test_what_failed_is_named_where_it_has_no_score(tmp_path):
    comparison(tmp_path, {"unconstrained": (0.9, 1.0), "own": (0.9, 1e-8)}, seeds=5)
    for seed in range(3):
        write(tmp_path, spec(method="unconstrained", phase="final", lr=1.0, seed=FRESH + seed), "diverged", "loss")
    text = " ".join(said(tmp_path))
    assert "no network without one has a score" in text
    assert "Without a score, and not compared: `unconstrained`: failed in 3/5 (3 diverged) runs." in text


def test_failures_of_any_candidate_are_said(tmp_path):
    comparison(tmp_path, {"unconstrained": (0.8, 1.0), "own": (0.9, 1e-8)}, seeds=10)
    for seed in range(2):
        write(tmp_path, spec(method="unconstrained", phase="final", lr=1.0, seed=FRESH + seed), "diverged", "loss")
    assert "Runs failed, and are in no mean: 2 of 10 of `unconstrained`." in said(tmp_path)


def test_a_metric_of_which_less_is_better_is_lowered(tmp_path):
    rng = np.random.default_rng(0)
    for method, level in (("own", 0.2), ("unconstrained", 0.5)):
        for seed in range(10):
            known = {"metric": "mse", "higher_is_better": False}
            trained(tmp_path, spec(method=method, seed=seed), level, **known)
            final = spec(method=method, phase="final", seed=FRESH + seed)
            trained(tmp_path, final, level + rng.normal(scale=0.01), **known)
    assert "`own` lowers mse by 0.29" in said(tmp_path)[0]


def test_a_gap_over_decades_is_told_by_a_factor(tmp_path):
    rng = np.random.default_rng(0)
    for method, level in (("own", 1e-6), ("unconstrained", 1e-3)):
        for seed in range(10):
            known = {"metric": "gap", "higher_is_better": False, "log_scale": True}
            trained(tmp_path, spec(method=method, seed=seed), level, **known)
            final = spec(method=method, phase="final", seed=FRESH + seed)
            trained(tmp_path, final, level * np.exp(rng.normal(scale=0.3)), **known)
    first = said(tmp_path)[0]
    factor = float(re.search(r"`own` lowers gap by a factor of ([\d.e+]+) \[", first)[1])
    assert 500 < factor < 2000


def test_each_candidate_stands_once_and_nothing_is_empty(tmp_path):
    comparison(tmp_path, {"unconstrained": (0.7, 1.0), "own": (0.9, 1e-8), "soft": (0.8, 1e-2)}, seeds=10)
    groups, missing = grouped(Verdict(summary_of(tmp_path)))
    names = [answer.best.name for _, answer, _ in groups]
    assert len(names) == len(set(names))
    best = ["best metric", "exactly feasible (error ≤ 1e-6)", "feasible (error ≤ 1e-3)", "cheapest step among the best"]
    assert groups[0][0][:4] == best
    (reason,) = missing
    assert reason == "most tolerant of the learning rate: " + (
        "no method is near the best at two neighbouring rates of those tried"
    )
    uses = page_of(tmp_path).partition('<table class="uses">')[2].partition("</table>")[0]
    assert uses.count("<tr>") == len(groups) + 1


def test_the_verdict_is_first_on_the_page_and_in_the_terminal(tmp_path):
    root = tmp_path / "runs"
    comparison(root, LEVELS, seeds=10)
    first = said(root)[0].replace("`", "")
    lines = re.sub(r"\s+", " ", shown(root))
    assert lines.index(first[:60]) < lines.index("what to use")
    text = re.sub(r"<code>|</code>", "", page(root))
    assert text.index(first[:60]) < text.index("What to use") < text.index("<h3>Results")


# --- profiles ---


def test_a_performance_profile_by_hand():
    table = pd.DataFrame(
        {"a": [10, 20, math.inf, math.inf], "b": [20, 10, 30, math.inf], "c": [10, math.nan, 1, 1]},
        index=["w", "x", "y", "z"],
    )
    found = profile(table, factors=[1, 2, 3])
    assert list(found) == ["a", "b"]  # c was not run everywhere
    # a: fastest at w, twice at x, never at y, z;  b: twice at w, fastest at x and y.
    assert found["a"].tolist() == [0.25, 0.5, 0.5]
    assert found["b"].tolist() == [0.5, 0.75, 0.75]
    assert profile(table).index.tolist() == [1.0, 2.0]


def test_times_over_problems_and_settings(tmp_path):
    for problem, steps in (("first", (10, 30)), ("second", (40, None))):
        for method, needed in zip(("own", "soft"), steps, strict=True):
            trained(tmp_path, spec(problem=problem, method=method, phase="final"), 0.9, steps=needed)
    report = read_report(tmp_path)
    table = report.times("steps")
    assert table.loc["first, scale 1"].to_dict() == {"own": 10.0, "soft": 30.0}
    assert table.loc["second, scale 1"].to_dict() == {"own": 40.0, "soft": math.inf}
    assert report.times("seconds").loc["first, scale 1", "own"] == pytest.approx(0.1)
    assert report.profile("steps").loc[[1.0, 3.0], "soft"].tolist() == [0.0, 0.5]
    assert "profile-cpu" in report.figures()


# --- files ---


def page_of(root) -> str:
    stream, path = io.StringIO(), root.parent / "page" / "report.html"
    publish(Report.of(*read_all([root])), html=path, console=Console(file=stream))
    return path.read_text()


def page(root) -> str:
    path = root.parent / "report.html"
    records, faults = read_all([root])
    publish(Report.of(records, faults), html=path, console=Console(file=io.StringIO()))
    return path.read_text()


def shown(root, width=80) -> str:
    stream = io.StringIO()
    records, faults = read_all([root])
    publish(Report.of(records, faults), html=root.parent / "shown.html", console=Console(file=stream, width=width))
    return stream.getvalue()


def test_the_page_is_one_file_without_the_network(root):
    text = page(root)
    links = set(re.findall(r"https?://[^\s\"'<>)]+", text))
    assert all(link.startswith("http://www.w3.org/") for link in links), links
    assert not re.search(r"<(link|img|iframe)\b|\bsrc=|@import|url\((?!#)", text)
    panels = re.findall(r'<div style="width: (\d+)px"><svg', text)
    # scores, cost; rates of each method; errors against steps and by layer; curves; defaults; one case: no profile
    assert len(panels) == 1 + 1 + len(LEVELS) + 2 + 4 + 1
    assert all(int(width) < 600 for width in panels), "a panel fits a phone, or nearly"
    for words in (
        "CPU cost",
        "worst layer, ‖XX",
        "unconstrained",
        "no CUDA device",
        "training seconds",
        "1e-6",
        "n = 5",
    ):
        assert words in text, words
    assert ">0.01<" in text  # the numbers of the axes are not shortened with the coordinates
    assert 'aria-sort="none"' in text
    assert "nan" not in re.sub(r"isNaN", "", text)


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CLICKS = """<script>
const found = [...document.querySelectorAll("table.sortable")].map(table => [...table.tHead.rows[0].cells].map(head =>
  ["ascending", "descending"].map(way => {
    head.querySelector("button").click();
    const rows = [...table.tBodies[0].rows].map(row => [...row.cells]), text = cell => cell.textContent;
    return [head.ariaSort, rows.map(row => row[head.cellIndex]).map(cell => cell.dataset.v ?? text(cell)),
      rows.map(row => text(row[0]))];
  })));
document.body.innerHTML = "<pre>" + encodeURIComponent(JSON.stringify(found)) + "</pre>";
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_click_on_a_heading_sorts_its_table(root, tmp_path):
    for lr in (0.01, 0.1):
        write(root, spec(method="cayley", lr=lr), "skipped", "no tall weights")
    trained(root, spec(method="pogo", phase="final", lr=1.0, seed=FRESH), 0.9, status="diverged")
    (tmp_path / "clicked.html").write_text(page(root).replace("</body>", CLICKS + "</body>"))
    browser = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    dumped = subprocess.run(
        [*browser, "--dump-dom", (tmp_path / "clicked.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    tables = json.loads(unquote(re.search("<pre>(.*)</pre>", dumped.stdout)[1]))

    def key(text):
        try:
            return 0, float(text), ""
        except ValueError:
            return 1, 0.0, text

    assert len(tables) == 5  # standings, results, cost, default beside tuned, runs without a result
    for columns in tables:
        for ways in columns:
            for way, values, names in ways:
                known = [value for value in values if value]
                order = sorted(known, key=key, reverse=way == "descending")
                assert values == order + [""] * (len(values) - len(known)), "nothing comes last both ways"
                assert sorted(names) == sorted(columns[0][0][2]), "no row is lost"
            assert [way for way, _, _ in ways] == ["ascending", "descending"]
    _, values, names = tables[0][2][1]  # results by test metric, best first
    rows = rows_of(root)
    assert names == ["unconstrained", "soft", "own", "pogo", "cayley"]
    assert [float(value) for value in values[:-1]] == [rows[name].test.value for name in names[:-1]]


FRAMES = """<body>
<iframe src="report.html" style="width: 1280px; height: 900px; border: 0"></iframe>
<iframe src="report.html" style="width: 390px; height: 844px; border: 0"></iframe>
<script>
addEventListener("load", () => {
  const told = [...document.querySelectorAll("iframe")].map(({contentDocument: page}) => {
    page.querySelectorAll("details").forEach(part => (part.open = true));
    const all = (what, of) => [...page.querySelectorAll(what)].map(of), root = page.documentElement;
    const beyond = part => part.scrollWidth - part.clientWidth;
    return [beyond(root), Math.max(...all(".scroll", beyond)),
      Math.max(...all(".sortable td:first-child", cell => cell.offsetWidth)) / root.clientWidth,
      page.querySelector(".verdict").getBoundingClientRect().bottom / page.defaultView.innerHeight];
  });
  document.body.innerHTML = "<pre>" + JSON.stringify(told) + "</pre>";
});
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")
def test_the_page_fits_a_screen_and_a_phone(tmp_path):
    root, names = tmp_path / "runs", {"torch_orthogonal": (0.7, 1e-6)}
    comparison(root, LEVELS | names, scales=(1.0, "relu"), signals=True, faults=True, seeds=10)
    (tmp_path / "report.html").write_text(page(root))
    (tmp_path / "frames.html").write_text(FRAMES)
    browser = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    options = ["--allow-file-access-from-files", "--dump-dom", (tmp_path / "frames.html").as_uri()]
    dumped = subprocess.run([*browser, *options], capture_output=True, text=True, timeout=120)
    screen, phone = json.loads(re.search(r"<pre>(\[.*\])</pre>", dumped.stdout)[1])
    for beside, _, _, verdict in (screen, phone):
        assert beside <= 0, "the page does not scroll sideways"
        assert verdict < 0.6, "the answer is above the fold"
    assert screen[1] <= 0, "every table fits"
    assert phone[2] < 0.36, "names leave two thirds of a phone to numbers"


def test_what_records_say_is_text_and_not_markup(root):
    reason = "<script>alert(1)</script> [rank0]: [bold]"
    write(root, spec(method="own", lr=0.3), "error", reason)
    assert "<script>alert" not in page(root)
    assert "[rank0]: [bold]" in shown(root).replace("\n", " ")


def test_the_terminal_shows_all_methods_in_80_columns(tmp_path):
    root = tmp_path / "runs"
    names = [*stiefel.available(), "torch_orthogonal_of_another_name"]
    comparison(root, {name: (0.95 - i // 2 / 50, 1e-8) for i, name in enumerate(names)}, faults=True, seeds=9)
    lines = shown(root).splitlines()
    tables = [line for line in lines if not line.startswith(("·", "report:", "tables:", "verdict:"))]
    assert max(map(len, tables)) <= 80
    assert "…" not in "".join(tables)
    assert all(any(line.strip().startswith(name[:13]) for line in lines) for name in names[:-1])  # folded
    assert "cannot be told from it" in re.sub(r"\s+", " ", " ".join(lines))


def test_failures_are_listed_with_their_traceback_and_folder(root):
    path = write(root, spec(method="own", lr=0.3), "error", "KeyError: broken on purpose")
    text = page(root)
    assert text.count("broken on purpose") == 2  # the reason, and the end of the traceback
    assert "<details><summary>traceback</summary><pre>Traceback" in text
    assert path.name in text
    assert f"(see {path.name})" in shown(root, width=200)


def test_cost_runs_alone_are_reported(tmp_path):
    for method, ratio in (("unconstrained", 1.0), ("own", 1.5)):
        timed(tmp_path / "runs", spec(method=method, phase="final", kind="cost", seed=FRESH), ratio)
    text, said = page(tmp_path / "runs"), shown(tmp_path / "runs", width=300)
    assert '<td data-v="1.5">1.50×</td>' in text
    for what in ("<h3>Results", "<h3>Default", "<h3>Learning-rate", "<h3>Curves", "<svg"):
        assert what not in text
    assert "there are only cost runs" in said
    assert "what to use" not in said
    report = read_report(tmp_path / "runs")
    assert (report.figures(), len(report.table()), len(report.runs())) == ({}, 0, 2)
    assert cli.main(["report", str(tmp_path / "runs"), "--figures", str(tmp_path / "png")]) == 0


def test_curves_are_thinned_and_a_missing_one_costs_only_itself(root):
    run = spec(method="own", phase="final", lr=1.0, seed=FRESH)
    trained(root, run, 0.9, rows=[measured(epoch, 0.5, 1e-8, layers=4) for epoch in range(1000)])
    row = rows_of(root)["own"]
    assert max(map(len, row.curves)) == 40
    assert (row.curves[0][0]["epoch"], row.curves[0][-1]["epoch"], row.ends[0]["epoch"]) == (0, 999, 999)
    torn = "measurements are torn, and shown as far as they can be read, of runs of own"
    assert torn not in notes_of(root)
    file = root / run.hash / "metrics.jsonl"
    damages = (lambda: file.write_text(file.read_text()[:-9]), lambda: file.write_text("[]\n"), file.unlink)
    for damage, left in zip(damages, (5, 4, 4), strict=True):  # of a cut file the whole lines are left
        damage()
        row = rows_of(root)["own"]
        assert (row.runs, len(row.curves), len(row.ends)) == (5, left, left)
        assert torn in notes_of(root)
        page(root)


def test_epochs_are_those_that_can_be_read(root):
    whole = read_report(root).epochs()
    first, second, *_ = (root / hash_ for hash_ in whole.hash.unique())
    (first / "metrics.jsonl").unlink()
    (second / "metrics.jsonl").write_text('{"step": 0, ')
    left = read_report(root).epochs()
    assert set(whole.hash) - set(left.hash) == {first.name, second.name}
    assert len(left) == len(whole) - 6  # three epochs each


def test_tables_are_written_as_csv_and_parquet(root):
    page(root)
    csv = pd.read_csv(root.parent / "summary.csv").set_index("method")
    assert csv.loc["own", ["n", "failed", "lr", "rank", "rank_at_1e-6", "tuning_runs"]].tolist() == [5, 0, 1, 3, 1, 4]
    assert csv.loc["own", "test_accuracy"] == pytest.approx(rows_of(root)["own"].test.value)
    assert csv.loc["own", "low"] < csv.loc["own", "test_accuracy"] < csv.loc["own", "high"]
    assert csv.loc["own", ["cpu", "threads", "commit"]].tolist() == ["a processor", 1, "abc"]
    runs = pd.read_csv(root.parent / "runs.csv")
    assert len(runs) == 4 * (4 + 5 + 1)
    parquet = pytest.importorskip("pyarrow.parquet")
    assert parquet.read_table(root.parent / "runs.parquet").num_rows == 40
    assert parquet.read_table(root.parent / "summary.parquet").num_rows == 4


def test_columns_of_mixed_types_become_text():
    rows = pd.DataFrame({"scale": [1.0, "relu", None], "step": [{"a": 1}, None, None], "none": [None] * 3})
    found = flat(rows)
    assert found["scale"].tolist()[:2] == ["1.0", "relu"]
    assert found["step"].iloc[0] == '{"a": 1}'
    assert found["none"].isna().all()


def test_a_factor_keeps_its_column_beside_what_a_run_tells(tmp_path):
    trained(tmp_path, spec(fields={"steps": 7}), 0.9, **{"steps_to_target": 3, "compile_seconds": 0.0})
    write(tmp_path, spec(fields={"steps": 7}, seed=1), "done", best_validation=0.5, steps=70)
    rows = runs(read_all([tmp_path])[0]).set_index("seed")
    assert rows.steps.tolist() == [7, 7]
    assert rows.run_steps[1] == 70


def test_frame_has_a_row_per_run(root):
    records, _ = read_all([root])
    assert len(runs(records)) == len(records) == len(read_report(root).runs())
    assert {"method", "lr", "seed", "status", "cpu", "commit"} <= set(read_report(root).runs())


def test_the_command_writes_the_report_and_every_figure(root, tmp_path, capsys):
    assert cli.main(["report", str(root), "--figures", str(tmp_path / "png")]) == 0
    assert "what to use" in capsys.readouterr().out
    assert (root / "report.html").stat().st_size > 10_000
    names = {path.name for path in (tmp_path / "png").glob("*.png")}
    kinds = ("scores", "cost", "sensitivity", "defaults", "scale-1", "scale-1-orthogonality")
    assert names == {f"toy-{kind}.png" for kind in kinds}


WITHOUT_TORCH = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "geoopt"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
from stiefel.compare.cli import main

sys.exit(main(["report", sys.argv[1]]))
"""


def test_a_report_needs_no_torch(root):
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, str(root)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "report.html" in done.stdout


def test_the_command_looks_for_garbage_rarely_while_it_reports(root, monkeypatch):
    from stiefel.compare.present import publish

    usual, during = gc.get_threshold(), []
    monkeypatch.setattr(publish, "publish", lambda *args, **kwargs: during.append(gc.get_threshold()))
    assert cli.main(["report", str(root)]) == 0
    assert during[0][0] > 10 * usual[0]
    assert cli.main(["report", str(root / "missing")]) == 2
    assert gc.get_threshold() == usual


def test_a_report_that_cannot_be_written_says_where_else(root, capsys):
    assert cli.main(["report", str(root), "--html", "/proc/report.html"]) == 2
    error = capsys.readouterr().err
    assert "StorageError: /proc cannot be written" in error
    assert "--html" in error


def test_a_large_comparison_is_reported_fast_and_small(tmp_path):
    root = tmp_path / "runs"
    levels = {name: (0.97 - 0.02 * i, 10.0 ** -(i % 9)) for i, name in enumerate(stiefel.available())}
    comparison(
        root,
        levels,
        fields=({"depth": 4}, {"depth": 8}),
        scales=(1.0, "relu"),
        rates=(0.1, 1.0),
        seeds=2,
        epochs=30,
        signals=True,
        faults=True,
    )
    records, faults = read_all([root])
    assert len(records) > 300
    start = time.process_time()
    publish(Report.of(records, faults), html=tmp_path / "report.html", console=Console(file=io.StringIO()))
    assert time.process_time() - start < 30  # measured 7 s, half of it for each: a shared machine may be slower
    assert (tmp_path / "report.html").stat().st_size < 2e6
    assert Report.of(records).problems[0].settings[0].title == "depth 4, scale 1"
