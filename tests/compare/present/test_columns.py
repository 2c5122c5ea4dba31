"""The columns of the report's tables: one list for terminal and page, and one of values for the files."""

import io
import re
from html import escape
from html.parser import HTMLParser

import pytest
from records import comparison, measured, spec, timed, trained, write
from rich.console import Console

from stiefel.compare import read_report
from stiefel.compare.analyse.values import VALUES
from stiefel.compare.plan.plan import FRESH
from stiefel.compare.present import columns
from stiefel.compare.present.columns import BOTH, PAGE, RESULTS, Column, valued
from stiefel.compare.present.publish import publish
from stiefel.compare.present.report import Report
from stiefel.compare.record.records import read_all

LEVELS = {"own": (0.9, 1e-8), "soft": (0.95, 1e-2), "unconstrained": (0.97, 1.0)}
NAMES = """
problem digest device dtype setting method faults lr knobs lr_on_edge state test_accuracy low high n failed runs
rank rank_at_1e-6 rank_at_1e-3 error_worst error_final feasible_at steps_to_target steps_low steps_high
seconds_to_target seconds_low seconds_high redundancy step_ratio step_seconds constraint_share memory_bytes
matmul_flops factorization_flops operators gpu_peak_bytes gpu_energy_joules cost_hardware
default_validation default_lr tuned_validation tuning_runs tuning_failures commit cpu cores threads gpu torch
short_of_target studies_on_edge cost_doubt gradient_norm
"""


class Tables(HTMLParser):
    """The tables of a page: rows of cells, each its attributes and its text."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.rows, self.open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag in ("meta", "br"):
            return
        self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
            self.rows.append(dict(attrs))
        elif tag in ("td", "th"):
            self.tables[-1][-1].append((dict(attrs), ""))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            attributes, text = self.tables[-1][-1][-1]
            self.tables[-1][-1][-1] = attributes, text + data


def published(root, width=120):
    """The page and what the terminal shows."""
    stream, path = io.StringIO(), root.parent / "report.html"
    publish(Report.of(*read_all([root])), html=path, console=Console(file=stream, width=width))
    return path.read_text(), stream.getvalue()


def results(page):
    """The table of the first setting: heading → cells."""
    table = next(t for t in Tables(page).tables if any(text == "tuningruns" for _, text in t[0]))
    return {text: [row[i] for row in table[1:]] for i, (_, text) in enumerate(table[0])}


@pytest.fixture
def root(tmp_path):
    comparison(tmp_path / "runs", LEVELS)
    return tmp_path / "runs"


def test_a_column_is_added_by_a_value_and_by_how_it_is_shown(root, monkeypatch):
    comparison(root, LEVELS, fields=({"depth": 8},))  # of one setting the terminal shows the standings alone
    monkeypatch.setitem(VALUES, "letters", lambda at: len(at.row.label) if at.row.label != "soft" else None)
    added = valued("letters\nof it", VALUES["letters"], "{:.1f} <b>".format, where=BOTH)
    monkeypatch.setattr(columns, "RESULTS", (*RESULTS, added))
    page, terminal = published(root)
    cells = results(page)["lettersof it"]
    assert [text for _, text in cells] == ["13.0 <b>", "—", "3.0 <b>"]
    assert [attributes for attributes, _ in cells] == [{"data-v": "13"}, {"data-v": ""}, {"data-v": "3"}]
    assert '<button type="button">letters<br>of it</button>' in page
    assert re.search(r"step +letters *\n.* cost +of it *\n", terminal)
    assert re.search(r"^ unconstrained .* 13\.0 <b> *$", terminal, re.MULTILINE)
    assert re.search(r"^ soft .* — *$", terminal, re.MULTILINE)
    assert read_report(root).table().set_index("method").letters.to_dict()["own"] == 3


def test_a_column_of_the_page_is_not_in_the_terminal(root, monkeypatch):
    monkeypatch.setattr(columns, "RESULTS", (*RESULTS, Column("extra", lambda at: "shown", where=PAGE)))
    page, terminal = published(root)
    assert results(page)["extra"] == [({}, "shown")] * 3  # sorted by its text
    assert "extra" not in terminal


def test_an_optional_column_is_left_out_where_no_row_has_it(root):
    assert "redundancy" not in results(published(root)[0])
    rows = [measured(epoch, 0.9, 1e-8, redundancy={"a": 0.25}) for epoch in range(2)]
    trained(root, spec(method="more", phase="tuning"), 0.9)
    trained(root, spec(method="more", phase="final"), 0.9, rows=rows)
    cells = results(published(root)[0])["redundancy"]
    assert sorted((attributes["data-v"], text) for attributes, text in cells) == [("", "—")] * 3 + [("0.25", "0.25")]


def test_what_a_metric_is_called_is_text_and_not_markup(tmp_path):
    metric = "<script>alert(1)</script> [red]{metric}[/red]"
    for method in ("own", "soft"):
        for phase in ("tuning", "final"):
            trained(tmp_path / "runs", spec(method=method, phase=phase), 0.9, metric=metric)
    page, terminal = published(tmp_path / "runs", width=160)
    assert "<script>alert" not in page
    assert f'<button type="button">test {escape(metric)}</button>' in page
    assert f"test {metric}" in results(page)
    assert f"test {metric}" in terminal
    assert f"test_{metric}" in read_report(tmp_path / "runs").table()


def test_what_records_say_is_text_and_not_markup_in_every_heading_and_title(tmp_path):
    name = "<script>alert(1)</script>[red]"
    for value in ("<i>[red]", "<b>[/red]"):
        fields = {"width": value}
        for method in (name, "own"):
            for phase in ("tuning", "final"):
                trained(tmp_path / "runs", spec(method=method, phase=phase, fields=fields), 0.9)
            timed(tmp_path / "runs", spec(method=method, phase="final", kind="cost", fields=fields), 1.5)
    page, terminal = published(tmp_path / "runs", width=160)  # the profile's table has methods as headings
    assert not re.search(r"<script>alert|<i>|<b>\[", page)
    assert "width <i>[red], scale 1" in terminal
    assert "width <b>[/red], scale 1" in terminal
    assert Tables(page).open == []


def test_all_rows_of_a_table_have_as_many_cells_as_it_has_headings(tmp_path):
    root = tmp_path / "runs"
    comparison(root, {**LEVELS, "pogo": (0.8, 1e-4)}, scales=(1.0, "relu"), signals=True, faults=True)
    write(root, spec(method="own", lr=0.3), "error", "broken")
    page, _ = published(root)
    found = Tables(page)
    assert found.open == []
    assert len(found.tables) == 11  # what to use, standings, results, cost, defaults, why, failures, profiles' cases
    for table in found.tables:
        assert {len(row) for row in table} == {len(table[0])}
        assert len(table) > 1 or "what to use" in page.lower()


def test_the_control_is_marked_in_every_table_of_scores(root):
    classes = [row["class"] for row in Tables(published(root)[0]).rows if "class" in row]
    assert classes == ["ref", "ref"]  # standings and results


def standing(page):
    """The table of the verdict: heading → texts."""
    table = next(t for t in Tables(page).tables if any(text == "place" for _, text in t[0]))
    return {text: [row[i][1] for row in table[1:]] for i, (_, text) in enumerate(table[0])}


def test_methods_that_cannot_be_told_apart_share_their_places(tmp_path):
    root = tmp_path / "runs"
    comparison(root, {"own": (0.9, 1e-8), "soft": (0.9001, 1e-2), "unconstrained": (0.5, 1.0)}, seeds=10)
    found = standing(published(root)[0])
    assert dict(zip(found["method"], found["place"], strict=True)) == {
        "own": "1–2",
        "soft": "1–2",
        "unconstrained": "3",
    }
    gains = dict(zip(found["method"], found["over no constraint"], strict=True))
    assert gains["unconstrained"] == "—"
    assert gains["own"].startswith("+40.00 points [")
    assert not gains["own"].endswith("≈")
    assert read_report(root).verdict().query("method == 'own' and against == 'unconstrained'").told_apart.item()


def test_what_cannot_be_told_from_no_constraint_says_so(tmp_path):
    root = tmp_path / "runs"
    comparison(root, {"own": (0.9, 1e-8), "unconstrained": (0.9, 1.0)}, seeds=10)
    page, terminal = published(root)
    assert [text.endswith("≈") for text in standing(page)["over no constraint"]].count(True) == 1
    assert "over no constraint" in terminal  # of 120 characters
    assert "over no constraint" not in published(root, width=80)[1].partition("what to use")[2]


def test_a_method_without_a_score_stands_below_without_a_place(root):
    for phase in ("tuning", "final"):
        write(root, spec(method="pogo", phase=phase, lr=1.0, seed=FRESH if phase == "final" else 0), "diverged")
    found = standing(published(root)[0])
    assert (found["method"][-1], found["place"][-1], found["test accuracy"][-1]) == ("pogo", "—", "every run failed")


def test_failures_and_errors_are_coloured(root):
    write(root, spec(method="own", phase="final", lr=1.0, seed=FRESH), "diverged")
    page, _ = published(root)
    failed = {attributes["class"] for attributes, _ in results(page)["failed"]}
    assert failed == {"failed", "failed bad"}
    assert '<span class="bad">0.01</span>' in page
    assert "∞" not in page, "the error is that of the runs that trained to their end"


def test_the_columns_of_the_file_keep_their_names_and_order(root):
    assert list(read_report(root).table()) == NAMES.split()
