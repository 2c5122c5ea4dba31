"""One torn or odd record is named and left out, and costs no other record: by seeded damage to good ones."""

import io
import random
import shutil
from pathlib import Path

import pytest
from records import comparison, spec, timed, trained
from rich.console import Console
from torn import damage

from stiefel.compare import read_report
from stiefel.compare.present.publish import publish
from stiefel.compare.present.verdict_json import document

AT_ONCE = 12
"""Records of a folder that are damaged together: each round costs a report."""
KINDS = ("seeds", "studies", "decades")


@pytest.fixture(scope="module", params=KINDS)
def good(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    if request.param == "seeds":
        methods = {"unconstrained": (0.8, 1.0), "own": (0.9, 1e-8), "soft": (0.85, 1e-2)}
        comparison(folder, methods, fields=({"depth": 2},), rates=(0.1, 1.0), signals=True)
    else:
        studies(folder, decades=request.param == "decades")
    return folder


def studies(folder: Path, decades: bool) -> None:
    """Two methods with a tuning for each of five replicates: accuracies on 50 examples, or gaps over decades."""
    more = {"higher_is_better": False, "log_scale": True, "metric": "gap"} if decades else {"test_examples": 50}
    for k, method in enumerate(("unconstrained", "own")):
        for study in range(5):
            value = 10.0 ** -(study % 3 + k) if decades else (40 + k + study % 3) / 50
            parts = {} if decades else {"test_parts": [value, value - 0.02, value + 0.02]}
            for lr in (0.1, 1.0):
                trained(folder, spec(method=method, study=study, seed=study, lr=lr, knobs={"a": 1}), value * lr, **more)
            run = spec(
                method=method, study=study, seed=50 + study, lr=0.1 if decades else 1.0, phase="final", knobs={"a": 1}
            )
            trained(folder, run, value, **more, **parts)
        timed(folder, spec(method=method, kind="cost", phase="final"), 1.0 + k, spread=0.01)


def tables(report):
    """Every table that a report has."""
    report.runs(), report.epochs(), report.table(), report.verdict(), report.recommendations()
    report.layers(), report.dependence(), report.rates(), report.profile("steps"), report.profile("seconds")
    return [*report.notes, document(report.problems)]


def rounds(good: Path, folder: Path, seed: int, count: int, at_once: int):
    """Reports of folders in which some records have been damaged, with what must be in them."""
    rng = random.Random(seed)
    shutil.copytree(good, folder)
    for _ in range(count):
        damaged = rng.sample(sorted(good.iterdir()), at_once)
        texts = [damage(folder / run.name, rng) for run in damaged]
        intact = {run.name for run in good.iterdir()} - {run.name for run in damaged}
        yield read_report(folder), intact, texts
        for run in damaged:
            shutil.copytree(run, folder / run.name, dirs_exist_ok=True)


def check(report, intact, texts):
    found = {record.spec.hash for record in report.records}
    if all('"digest": "d"' in text or '"digest"' not in text for text in texts):  # else another source of the problem
        assert intact <= found, texts
    assert all(len(fault.split("run.json")[0]) == 17 for fault in report.faults)  # the run's folder alone
    try:
        tables(report)
    except Exception as error:
        error.add_note("\n".join(text[:3000] for text in texts))
        raise


def test_no_damage_to_a_record_costs_another(good, tmp_path):
    """2,000 damages, of which most cost their record or the end of its measurements."""
    faults = torn = 0
    for report, intact, texts in rounds(good, tmp_path / "runs", 1, 2000 // AT_ONCE // len(KINDS), AT_ONCE):
        check(report, intact, texts)
        faults += len(report.faults)
        torn += sum(len(row.torn) for summary in report.problems for s in summary.settings for row in s.rows)
    assert faults > 200
    assert torn > 12


@pytest.mark.slow
def test_no_damage_to_a_record_costs_another_at_length(good, tmp_path):
    for report, intact, texts in rounds(good, tmp_path / "runs", 2, 3000, 1):
        check(report, intact, texts)


def test_a_report_of_damaged_records_is_written(good, tmp_path):
    """Page, figures, files and terminal."""
    console = Console(file=io.StringIO())
    for report, _, texts in rounds(good, tmp_path / "runs", 3, 4, 12):
        if not any("frac" in text for text in texts):
            publish(report, html=tmp_path / "report.html", console=console)
