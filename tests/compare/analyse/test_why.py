"""Why methods differ, from the run to the report: what is recorded, when, and what becomes of it."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from records import comparison, conditioned, diagnosed, measured, spec, trained
from rich.console import Console
from torch import nn

from stiefel.compare import Data, Problem, read_report
from stiefel.compare.analyse.layers import PERCENT, Why, line
from stiefel.compare.analyse.summarize import summaries
from stiefel.compare.analyse.summary import Summary
from stiefel.compare.plan.plan import FRESH
from stiefel.compare.present.figures import layers as why_figures
from stiefel.compare.present.figures import style as figures
from stiefel.compare.present.publish import publish
from stiefel.compare.present.report import Report
from stiefel.compare.record.records import read_all
from stiefel.compare.record.run_folder import RunFolder
from stiefel.compare.record.spec import RunSpec
from stiefel.compare.worker.probes import RATES
from stiefel.compare.worker.quality import run_quality

LEVELS = {"own": (0.9, 1e-8), "soft": (0.95, 1e-2), "pogo": (0.8, 1e-4), "unconstrained": (0.97, 1.0)}


def summary_of(root) -> Summary:
    return next(summaries(read_all([root])[0]))


# --- what a run records ---


@dataclass(frozen=True, kw_only=True)
class Toy(Problem):
    epochs: int = 3
    batch_size: int = 16
    dependent_layers: ClassVar[int] = 2

    def make_model(self) -> nn.Module:
        hidden = [part for _ in range(3) for part in (nn.Linear(6, 6), nn.Dropout(0.2), nn.BatchNorm1d(6), nn.ReLU())]
        return nn.Sequential(*hidden, nn.Linear(6, 2))

    def make_data(self) -> Data:
        x = torch.randn(96, 6)
        y = (x[:, 0] > 0).long()
        return Data((x[:64], y[:64]), (x[64:80], y[64:80]), (x[80:], y[80:]))


@dataclass(frozen=True, kw_only=True)
class Undiagnosed(Toy):
    dependent_layers: ClassVar[int] = 0


class Uncopied(nn.Linear):
    def __deepcopy__(self, memo):
        raise RuntimeError("this layer cannot be copied")


@dataclass(frozen=True, kw_only=True)
class NoCopies(Toy):
    def make_model(self) -> nn.Module:
        return nn.Sequential(Uncopied(6, 6), nn.ReLU(), nn.Linear(6, 2))


def run(problem: Problem, root, method="own", phase="final") -> list[dict]:
    fields = problem.identity()
    known = RunSpec("quality", phase, "toy", "d", fields, method, {"scale": 1.0}, 0.1, 3)
    folder = RunFolder(root, known)
    folder.start()
    assert run_quality(problem, known, folder)["status"] == "done"
    return [json.loads(text) for text in (folder.path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["own", "riemannian", "soft", "landing"])
def test_a_run_records_layers_at_its_ends_and_rates_between(tmp_path, method):
    rows = run(Toy(), tmp_path, method)
    assert [("dependence" in row, "variance" in row, "effective_rate" in row) for row in rows] == [
        (True, True, True), (False, False, True), (False, False, True), (True, True, True)
    ]  # fmt: skip
    names = ["0.weight", "4.weight", "8.weight", "12.weight"]
    assert list(rows[-1]["variance"]) == list(rows[-1]["effective_rate"]) == names
    found = rows[-1]["dependence"]
    assert found["layers"] == ["0.weight", "12.weight"]  # two, evenly spread
    assert np.array(found["turn"]).shape == (2, 2)
    assert np.isfinite(np.array(found["turn"])).all()
    assert all(value > 0 for value in rows[0]["variance"].values())


def test_rates_are_measured_a_few_times_in_a_long_run(tmp_path):
    rows = run(Toy(epochs=47), tmp_path)
    known = [row["epoch"] for row in rows if "effective_rate" in row]
    assert known[0] == 0
    assert known[-1] == 47
    assert len(known) <= RATES + 2


def test_tuning_runs_do_not_pay_for_what_is_not_reported(tmp_path):
    rows = run(Toy(), tmp_path, phase="tuning")
    assert not any("effective_rate" in row or "dependence" in row for row in rows)
    assert "variance" in rows[-1]


@pytest.mark.parametrize("method", ["own", "rsdm"])
def test_looking_does_not_change_what_is_trained(tmp_path, method):
    looked, blind = run(Toy(), tmp_path / "a", method), run(Undiagnosed(), tmp_path / "b", method)
    for row, other in zip(looked, blind, strict=True):
        assert row["train_loss"] == other["train_loss"]  # to the bit, with dropout and random methods
        assert row["validation"] == other["validation"]
        assert row["orthogonality"] == other["orthogonality"]
        assert not {"dependence", "effective_rate", "gradients_reason"} & set(other)


def test_a_model_that_cannot_be_copied_costs_these_fields_and_not_the_run(tmp_path):
    rows = run(NoCopies(), tmp_path)
    assert {row["gradients_reason"] for row in rows} == {"RuntimeError: this layer cannot be copied"}
    assert "variance" in rows[-1]
    assert "effective_rate" not in rows[-1]


@dataclass(frozen=True, kw_only=True)
class Images(Toy):
    """A convolution whose operator is periodic, one whose images have more entries than are written out, a Linear."""

    def make_model(self) -> nn.Module:
        first = nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular")
        rest = (nn.ReLU(), nn.Flatten(), nn.Linear(800, 2))
        return nn.Sequential(nn.Unflatten(1, (1, 10, 20)), first, nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), *rest)

    def make_data(self) -> Data:
        x = torch.randn(96, 200)
        y = (x[:, 0] > 0).long()
        return Data((x[:64], y[:64]), (x[64:80], y[64:80]), (x[80:], y[80:]))


def test_reported_runs_record_conditions_and_norms_at_their_ends(tmp_path):
    rows = run(Images(), tmp_path / "a")
    assert [("conditioning" in row, "operator" in row) for row in rows] == [
        (True,) * 2,
        *[(False,) * 2] * 2,
        (True,) * 2,
    ]
    for row in (rows[0], rows[-1]):
        assert list(row["conditioning"]) == list(row["energy"]) == ["1.weight", "3.weight", "6.weight"]
        first, second, last = row["conditioning"].values()
        assert (first["input_rank"], first["input_size"]) == (9, 9)
        assert second["input_size"] == 36
        assert (last["input_size"], last["input_rank"]) == (800, 16)  # of 16 examples
        assert first["block_condition"] == pytest.approx(first["input_condition"] * first["gradient_condition"])
        assert list(row["operator"]) == ["1.weight", "3.weight"]
        assert 1 <= row["operator"]["1.weight"]["operator_largest"] <= 3
        assert row["operator"]["1.weight"]["operator_smallest"] <= 1
        assert row["operator"]["3.weight"]["operator_smallest"] is None
    assert not any({"conditioning", "operator"} & set(row) for row in run(Images(), tmp_path / "b", phase="tuning"))
    vectors = run(Toy(), tmp_path / "c")[-1]
    assert vectors["operator"] == {}
    assert all(layer["input_condition"] >= 1 for layer in vectors["conditioning"].values())


# --- what the report makes of it ---


def test_frames_have_the_medians_of_layers_pairs_and_steps(tmp_path):
    comparison(tmp_path, LEVELS, signals=True)
    report = read_report(tmp_path)
    layers = report.layers()
    assert list(layers.columns[:5]) == ["setting", "method", "moment", "depth", "layer"]
    own = layers[(layers.method == "own") & (layers.moment == "end")].set_index("layer")
    assert own.forward.tolist() == pytest.approx([0.9**k for k in range(4)])
    assert own.backward.tolist() == pytest.approx([1.1**k for k in range(4)])
    assert own.variance.tolist() == pytest.approx([0.5**k for k in range(4)])
    assert own.redundancy.tolist() == pytest.approx([0.1] * 4)
    assert own.effective_rate.tolist() == pytest.approx([0.975] * 4)
    pairs = report.dependence()
    assert len(pairs) == len(LEVELS) * 2 * 16
    (pair,) = pairs[
        (pairs.method == "soft") & (pairs.moment == "end") & (pairs.layer == "l3") & (pairs.stepped == "l1")
    ].to_dict("records")
    assert pair["degrees"] == pytest.approx(1.2 * 0.25 * PERCENT)
    assert pair["degrees_per_step"] == pytest.approx(math.degrees(1.2 * 0.25 * 0.1 * 1.0))  # its rate is 1
    assert (pair["depth"], pair["distance"]) == (4, 2)
    rates = report.rates()
    assert set(rates.step) == {0, 10, 20}
    assert rates[(rates.method == "soft") & (rates.step == 10)].effective_rate.tolist() == pytest.approx([0.99] * 4)


def test_a_method_in_one_row(tmp_path):
    comparison(tmp_path, LEVELS, signals=True)
    (setting,) = summary_of(tmp_path).settings
    rows = Why(setting).methods.set_index("method")
    assert rows.loc["pogo", "turned_by_itself"] == pytest.approx(1.3 * PERCENT)
    assert rows.loc["pogo", "turned_by_others"] == pytest.approx(
        1.3 * PERCENT * np.median([0.5 ** abs(n - m) for n in range(4) for m in range(4) if n != m])
    )
    assert rows.loc["pogo", "variance_kept"] == pytest.approx(0.5**3)
    assert rows.loc["pogo", ["rate_low", "rate", "rate_high"]].tolist() == pytest.approx([0.925] * 3)
    assert rows.loc["own", "forward"] == pytest.approx(0.9**1.5)


def test_figures_show_all_methods_beside_the_start(tmp_path):
    comparison(tmp_path, LEVELS, signals=True)
    summary = summary_of(tmp_path)
    why = Why(summary.settings[0])
    forward, backward, variance, redundancy, last, along = why_figures.depth(summary, why).figure().axes
    assert forward.lines[0].get_ydata().tolist() == pytest.approx([0.9**k for k in range(4)])
    assert backward.lines[0].get_ydata().tolist() == pytest.approx([1.1**k for k in range(4)])
    assert {len(ax.lines) for ax in (forward, backward, variance, last)} == {len(LEVELS) + 1}
    assert max(redundancy.lines[-1].get_ydata()) == 1e-7  # the least that is drawn; the start: exactly orthogonal
    assert len(along.lines) == len(LEVELS)
    maps = [ax for ax in why_figures.heat(summary, why).figure().axes if ax.images]
    assert [ax.get_title() for ax in maps] == ["start, all methods", "unconstrained", "own", "pogo", "soft"]
    image = np.array(maps[-1].images[0].get_array())
    assert image[3, 1] == pytest.approx(1.2 * 0.25 * PERCENT)
    assert image[0, 0] == pytest.approx(1.2 * PERCENT)


def test_conditions_and_norms_have_panels_and_columns_where_they_were_recorded(tmp_path):
    for method, level in (("own", 1.0), ("soft", 2.0)):
        signals = diagnosed(3, level) | conditioned(3, level)
        rows = [measured(epoch, 0.5, 1e-8, layers=3, **signals) for epoch in (0, 1)]
        trained(tmp_path, spec(method=method, phase="final", seed=FRESH), 0.9, rows=rows)
    summary = summary_of(tmp_path)
    why = Why(summary.settings[0])
    own = why.layers[(why.layers.method == "own") & (why.layers.moment == "end")]
    assert own.input_condition.tolist() == [10, 100, 1000]
    assert own.input_rank.tolist() == [5, 4, 3]
    assert own.operator_largest.tolist()[:1] == [3]
    methods = why.methods.set_index("method")
    assert methods.loc["soft", "input_condition"] == pytest.approx(100)
    assert methods.loc["soft", ["block_condition", "operator_largest"]].tolist() == pytest.approx([102, 4])
    axes = why_figures.depth(summary, why).figure().axes
    titles = [ax.get_ylabel() + ax.get_title() for ax in axes]
    assert len(axes) == 9
    (inputs,) = (ax for ax, title in zip(axes, titles, strict=True) if "condition of inputs" in title)
    assert inputs.lines[0].get_ydata().tolist() == [10, 100, 1000]
    publish(Report.of(*read_all([tmp_path])), html=tmp_path / "report.html", console=Console(file=io.StringIO()))
    page = (tmp_path / "report.html").read_text()
    assert "condition<br>of inputs" in page
    assert "convolution,<br>largest" in page
    assert "convolution,<br>smallest" not in page  # of which nothing is known


def test_a_rate_far_above_all_others_is_told_and_not_drawn(tmp_path):
    for method, rate in (("own", 0.5), ("soft", 0.9), ("pogo", 2000.0)):
        signals = diagnosed(2, 0.1) | {"effective_rate": {"l0": rate, "l1": rate * 1.1}}
        rows = [measured(0, 0.1, 1e-8, **diagnosed(2, 0.0)), measured(1, 0.5, 1e-8, **signals)]
        trained(tmp_path, spec(method=method, phase="final", seed=FRESH), 0.9, rows=rows)
    summary = summary_of(tmp_path)
    *_, last, _ = why_figures.depth(summary, Why(summary.settings[0])).figure().axes
    assert last.get_ylim()[1] < 2
    assert [text.get_text() for text in last.texts] == ["above:\npogo 2000–2200"]


def test_pages_with_and_without(tmp_path):
    def page(root) -> tuple[str, str]:
        out = Console(file=io.StringIO(), width=80)
        publish(Report.of(*read_all([root])), html=tmp_path / "report.html", console=out)
        return (tmp_path / "report.html").read_text(), " ".join(out.file.getvalue().split())

    comparison(tmp_path / "with", LEVELS, signals=True)
    comparison(tmp_path / "without", LEVELS)
    html, text = page(tmp_path / "with")
    assert '<h3 id="why">' in html
    assert "turned by<br>others" in html
    assert "condition<br>of inputs" not in html  # of records without
    assert "step of layer" in html
    assert "http" not in html.replace("http://www.w3.org", "")
    start, low, high = (PERCENT * 0.375 * (1 + level) for level in (0.0, 0.1, 0.4))  # of 0.5, 0.25, 0.125
    assert text.count("dependence:") == 1
    assert f"by {start:.2g}° at the start" in text
    assert f"{low:.2g}° (own) to {high:.2g}° (unconstrained) at the end" in text
    html, text = page(tmp_path / "without")
    assert 'id="why"' not in html
    assert "dependence:" not in text


def test_records_of_earlier_versions_are_read(tmp_path):
    old = {"energy": {"l0": {"forward": 0.9, "backward": 1.1}}, "redundancy": {"l0": 0.2}}
    rows = [measured(0, 0.1, 1e-8, layers=1, **old), measured(1, 0.5, 1e-8, layers=1, **old)]
    trained(tmp_path, spec(phase="final", seed=FRESH), 0.9, rows=rows)
    trained(tmp_path, spec(method="soft", phase="final", seed=FRESH), 0.9)  # no signals at all
    summary = summary_of(tmp_path)
    why = Why(summary.settings[0])
    assert why.layers.forward.tolist() == [0.9, 0.9]
    assert why.layers.effective_rate.isna().all()
    assert why.dependence.empty
    assert why_figures.heat(summary, why) is None
    axes = why_figures.depth(summary, why).figure().axes
    assert [text.get_text() for ax in axes for text in ax.texts] == ["not recorded"] * 3
    assert list(line(summary)) == []
    assert math.isnan(why.methods.rate.iloc[0])
    publish(Report.of(*read_all([tmp_path])), html=tmp_path / "report.html", console=Console(file=io.StringIO()))


def test_a_reason_for_what_is_missing_is_on_the_page(tmp_path):
    signals = {key: value for key, value in diagnosed(2, 0.1).items() if key not in ("effective_rate", "dependence")}
    rows = [measured(epoch, 0.5, 1e-8, **signals, gradients_reason="RuntimeError: no copy") for epoch in (0, 1)]
    trained(tmp_path, spec(phase="final", seed=FRESH), 0.9, rows=rows)
    publish(Report.of(*read_all([tmp_path])), html=tmp_path / "report.html", console=Console(file=io.StringIO()))
    assert "RuntimeError: no copy" in (tmp_path / "report.html").read_text()


def test_turns_that_are_zero_or_missing_leave_their_cells_empty(tmp_path):
    signals = diagnosed(2, 0.1)
    signals["dependence"] |= {"turn": [[1.0, 0.0], [None, 2.0]], "gradient": [0.1, 0.0]}
    rows = [measured(epoch, 0.5, 1e-8, **signals) for epoch in (0, 1)]
    trained(tmp_path, spec(phase="final", seed=FRESH), 0.9, rows=rows)
    summary = summary_of(tmp_path)
    drawn = why_figures.heat(summary, Why(summary.settings[0])).figure()
    image = drawn.axes[0].images[0].get_array()
    assert image[0, 0] == pytest.approx(PERCENT)
    assert image[0, 1] == 0  # which a logarithmic colour does not show
    assert np.isnan(np.asarray(image.filled(np.nan))[1, 0])
    figures.svg(drawn)


def test_a_layer_without_a_gradient_keeps_its_place_in_the_map(tmp_path):
    signals = diagnosed(3, 0.1)
    turn = [[1.0, None, 0.5], [None] * 3, [0.5, None, 1.0]]
    signals["dependence"] |= {"turn": turn, "gradient": [0.1, 0.0, 0.1]}
    rows = [measured(epoch, 0.5, 1e-8, **signals) for epoch in (0, 1)]
    trained(tmp_path, spec(phase="final", seed=FRESH), 0.9, rows=rows)
    summary = summary_of(tmp_path)
    image = why_figures.heat(summary, Why(summary.settings[0])).figure().axes[0].images[0].get_array()
    assert image.filled(np.nan) == pytest.approx(PERCENT * np.array(turn, dtype=float), nan_ok=True)
