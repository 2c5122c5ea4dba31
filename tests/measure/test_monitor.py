"""The monitor: what it records, where it goes, and that it costs what it says."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import json
import math
import pickle
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from common import training_step
from documents import TRAINING, snippet
from torch import Tensor, nn

import stiefel
from stiefel.attach.weights import constrained_weights
from stiefel.errors import OptionError
from stiefel.measure.monitor import cadence as cadence_module
from stiefel.measure.monitor import display, history
from stiefel.measure.monitor import gauge as gauge_module
from stiefel.measure.monitor.cadence import MOST_WAITING, REFRESH, SHARE, Cadence, Due, Opening, TimeShare
from stiefel.measure.monitor.display import LiveLine
from stiefel.measure.monitor.gauge import Gauge
from stiefel.measure.monitor.history import EvenSample, History, Transfer
from stiefel.measure.monitor.rows import FLUSH, Durations, Rows
from stiefel.measure.monitor.sinks import JsonLines, Table, flat

Monitor = stiefel.Monitor


def network(method: str | None = "own", width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
    return model if method is None else stiefel.constrain(model, method)


def training(model: nn.Module, batch: int = 16) -> Callable[[], Tensor]:
    x = torch.randn(batch, model[0].in_features, generator=torch.Generator().manual_seed(1))
    return training_step(model, stiefel.optimizer(model, torch.optim.SGD, lr=0.1), x)


def wait(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def spend_all(monitor: stiefel.Monitor) -> None:
    """Leave no time for measuring or writing."""
    cadence = monitor._cadence
    cadence.opening, cadence.writing.spent, cadence.measuring.spent = None, 1e9, 1e9


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_a_row_says_what_happened_at_its_step() -> None:
    model = network("pogo")
    step, monitor = training(model), Monitor(model, every=2)
    for _ in range(4):
        with monitor:
            loss = step()
        monitor.log(loss=loss, rate=0.1)
    assert [row["step"] for row in monitor.rows] == [1, 2, 4]
    row = monitor.rows[-1]
    assert row["loss"] == loss.item()
    assert row["rate"] == 0.1
    assert 0 < row["seconds"] < row["time"]
    assert set(row["orthogonality"]) == {"0.weight", "2.weight"}
    assert row["worst"] == max(row["orthogonality"].values()) == stiefel.report(model).worst
    assert row["shortened"] == {"0.weight": 0, "2.weight": 0}
    assert row["peak_resident_bytes"] > 10**7
    assert row["gpu_peak_bytes"] is row["gpu_reserved_bytes"] is row["gpu_energy_joules"] is None
    assert "CUDA" in row["gpu_reason"]


@pytest.mark.parametrize("method", stiefel.available())
def test_a_monitor_changes_nothing_in_a_training(method: str) -> None:
    plain, watched = network(method), network(method)
    one, other, monitor = training(plain), training(watched), Monitor(watched, every=1, signal=True)
    torch.manual_seed(2)  # for what draws random numbers
    for _ in range(4):
        one()
    torch.manual_seed(2)
    for _ in range(4):
        with monitor:
            other()
    monitor.close()
    for (name, a), b in zip(plain.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


SHORTENING = [m for m in stiefel.available() if stiefel.get(m).lifts and not stiefel.get(m).feasible]
SHORTENING = [m for m in SHORTENING if stiefel.get(m).claim is not None]


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("method", SHORTENING)
def test_steps_shortened_at_any_rate_are_counted_in_report_and_rows(
    method: str, cls: type[torch.optim.Optimizer]
) -> None:
    """Methods that shorten steps instead of leaving their tube say how often, and none where the rate is small."""
    assert {"landing", "pogo"} <= set(SHORTENING)
    counts = {}
    for rate in [10.0**k for k in range(-6, 7)]:
        model = network(method)
        optimizer, monitor = stiefel.optimizer(model, cls, lr=rate), Monitor(model, every=1)
        generator = torch.Generator().manual_seed(0)
        for _ in range(10):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
                p.grad /= p.grad.norm()
            with monitor:
                optimizer.step()
            monitor.log()
            assert all(found.allows(found.residual()) for found in constrained_weights(model)), rate
        rows = stiefel.report(model).rows
        counts[rate] = [row.shortened for row in rows]
        assert monitor.rows[-1]["shortened"] == {row.name: row.shortened for row in rows}
        totals = [sum(row["shortened"].values()) for row in monitor.rows]
        assert totals == sorted(totals)
        assert monitor.summary()["weights"][rows[0].name]["shortened"] == rows[0].shortened
        if rows[0].shortened:
            assert f"{rows[0].shortened} of 10" in str(stiefel.report(model))
            assert f"{rows[0].shortened} of 10" in str(monitor)
    assert counts[1e-6] == [0, 0]
    assert all(9 <= n <= 10 for n in counts[1e6])


def test_step_times_are_those_of_the_with() -> None:
    model = network()
    monitor = Monitor(model, every=1)
    for _ in range(5):
        with monitor:
            time.sleep(0.02)
        wait(0.03)  # loading, evaluation
        monitor.log()
    seconds = [row["seconds"] for row in monitor.rows]
    assert all(0.02 <= s < 0.045 for s in sorted(seconds)[:3])
    assert monitor.summary()["seconds_per_step"]["n"] == 5
    assert monitor.summary()["seconds"] == pytest.approx(sum(seconds))


def test_nothing_constrained_is_recorded_as_well() -> None:
    model = network(None)
    step, monitor = training(model), Monitor(model)
    with monitor:
        loss = step()
    monitor.log(loss=loss)
    assert (monitor.rows[0]["worst"], monitor.rows[0]["orthogonality"]) == (None, {})
    assert "none is constrained" in str(monitor)
    monitor.plot()


# --- cadence and overhead ---


@pytest.mark.parametrize("step", [1e-4, 1e-3, 0.1])
def test_a_share_is_never_overspent_after_its_first(step: float) -> None:
    """Against a clock that is only counted: what is allowed fits, and half of what fits is used."""
    share, trained, taken, cost = TimeShare(0.005), 0.0, 0, 2e-3
    share.spend(cost)
    for n in range(200_000):
        trained += step
        if share.allows(trained):
            share.spend(cost * (1 + 0.5 * math.sin(n)))
            taken += 1
            assert share.spent <= 1.5 * cost + 0.005 * trained
        if trained > 100:
            break
    assert taken >= 0.5 * min(0.005 * trained / cost, trained / step)


def cadence_of(
    seconds: float, *, step: float, measurement: float, writing: float = 0.0, every: int | None = None
) -> tuple[Cadence, dict[int, Due]]:
    """A cadence after so much training of steps that all log a loss, and what was due at each step."""
    cadence, found = Cadence(every, 0, by_clock=False), {}
    for n in range(1, round(seconds / step) + 1):
        cadence.trained += step
        found[n] = Due.NOTHING
        if cadence.idle(n, cadence.trained, {"loss": 0.0}.keys()):
            cadence.idled(n, 0.0)
            continue
        found[n] = due = cadence.due(n, ["loss"], looked=False, ahead=False)
        if due is Due.MEASURED:
            cadence.measured(n)
        if due is not Due.NOTHING:
            cadence.spend(due, measurement if due is Due.MEASURED else writing)
        cadence.plan(n, cadence.trained)
    return cadence, found


@pytest.mark.parametrize("step", [1e-3, 7e-3, 0.04])
@pytest.mark.parametrize("measurement", [1e-5, 0.1])
def test_a_cadence_is_dense_in_the_first_second_and_keeps_its_share_afterwards(step: float, measurement: float) -> None:
    cadence, found = cadence_of(41, step=step, measurement=measurement, writing=1e-4)
    measured = [n for n, due in found.items() if due is Due.MEASURED]
    first = [n for n in measured if n * step < 1]
    assert cadence.opening is None
    assert measured[0] == 1
    assert min(20, int(0.9 / step)) <= len(first)
    if measurement == 0.1:  # what costs next to nothing may be denser, and all along
        assert len(first) <= 50
        assert sum(n * step < 0.5 for n in first) > len(first) / 2
        assert cadence.overhead > 0.04
    later, each = len(measured) - len(first), 0.5 * SHARE / measurement  # affordable in a second
    assert 0.5 * min(40 * each, 40 / step) <= later + 1 <= 40 * each + 2
    assert cadence.later_overhead is not None
    assert cadence.later_overhead <= SHARE + measurement / 40
    assert cadence.overhead == pytest.approx(cadence.spent / cadence.trained)


def test_a_cadence_with_every_is_due_at_its_multiples_whatever_that_costs() -> None:
    cadence, found = cadence_of(3, step=0.01, measurement=1e6, every=7)
    assert [n for n, due in found.items() if due is not Due.NOTHING] == [1, *range(7, 301, 7)]
    assert set(found.values()) == {Due.NOTHING, Due.MEASURED}
    assert cadence.later_overhead is None
    names = {"loss": 0.0}.keys()
    cadence.plan(301, 0.0)
    assert [cadence.idle(n, 0.0, names) for n in (302, 307, 308)] == [True, True, False]
    assert not cadence.idle(302, 0.0, {"loss": 0.0, "accuracy": 0.0}.keys())
    assert cadence.due(302, ["loss", "accuracy"], looked=False, ahead=False) is Due.NEW
    assert cadence.due(303, ["loss", "accuracy"], looked=False, ahead=False) is Due.NOTHING
    assert cadence.due(304, ["loss"], looked=True, ahead=True) is Due.MEASURED
    assert cadence.due(305, ["accuracy"], looked=False, ahead=False) is Due.NEW  # 304 did not have it
    assert cadence.looks(307)
    assert not cadence.looks(308)


def test_a_cadence_looks_at_no_two_steps_in_a_row_and_measures_no_others() -> None:
    cadence = Cadence(None, 0, by_clock=False)
    assert cadence.looks(0)
    assert cadence.due(1, [], looked=True, ahead=True) is Due.MEASURED
    cadence.measured(1)
    cadence.trained = 0.5  # another is due since long
    assert cadence.measures(2)
    assert not cadence.looks(1)
    assert cadence.due(2, [], looked=False, ahead=True) is Due.ROW
    assert cadence.looks(2)
    cadence.looked(0.5, usual=0.2)
    assert (cadence.trained, cadence.measuring.spent) == (0.7, 0.3)


def test_a_cadence_is_due_by_the_clock_where_something_may_come_by_it() -> None:
    names = {"loss": 0.0}.keys()
    for by_clock in (False, True):
        cadence = Cadence(10**6, 0, by_clock=by_clock)
        cadence.due(1, names, looked=False, ahead=False)
        cadence.plan(1, 5.0)
        assert cadence.idle(2, 5.0 + 0.9 * REFRESH, names)
        assert cadence.idle(2, 5.0 + 1.1 * REFRESH, names) is not by_clock
        assert cadence.idle(MOST_WAITING, 5.0, names)
        assert not cadence.idle(MOST_WAITING + 1, 5.0, names)
    assert [cadence.sends(n) for n in (MOST_WAITING - 1, MOST_WAITING)] == [False, True]
    cadence.shown = 5.0
    assert [cadence.shows(5.0 + x * REFRESH) for x in (0.9, 1.1)] == [False, True]


def on_a_fake_clock(
    monkeypatch: pytest.MonkeyPatch, *, step: float, measurement: float, until: float, **options: Any
) -> stiefel.Monitor:
    """A training of so many seconds whose steps and measurements take what is said, and nothing else any time."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def errors(model: nn.Module) -> dict[str, float]:
        now[0] += measurement
        return dict.fromkeys(("0.weight", "2.weight"), 1e-7)

    monkeypatch.setattr(gauge_module, "errors", errors)
    model = network()  # kept alive so long
    monitor = Monitor(model, live=False, **options)
    for n in range(round(until / step)):
        with monitor:
            now[0] += step
        monitor.log(loss=n)
    return monitor


def test_the_default_cadence_measures_as_rarely_as_its_share_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 10 ms, a measurement of half of what 20 of them pay for; the first second is another's."""
    monitor = on_a_fake_clock(monkeypatch, step=0.01, measurement=10 * 0.01 * SHARE, until=11)
    measured = [row["step"] for row in monitor.rows if "worst" in row and row["step"] > 100]
    assert 45 <= len(measured) <= 51
    assert max(b - a for a, b in pairwise(measured)) <= 42
    assert len(monitor.rows) == 1100  # writing is free on this clock
    assert monitor.summary()["later_overhead"] == pytest.approx(SHARE / 2, rel=0.1)


@pytest.mark.parametrize("step", [1e-3, 1.6e-3, 7e-3, 0.026, 0.031, 0.04, 0.051, 0.3])
@pytest.mark.parametrize("measurement", [1e-4, 0.1])
def test_the_first_second_is_measured_twenty_times_whatever_that_costs(
    step: float, measurement: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor = on_a_fake_clock(monkeypatch, step=step, measurement=measurement, until=30)
    first = [row["step"] for row in monitor.rows if "worst" in row and row["step"] * step < 1]
    assert len(first) >= min(20, int(1 / step))
    assert len(first) <= 50
    later = sum("worst" in row for row in monitor.rows) - len(first)
    if measurement == 0.1:
        assert later <= 2 + 0.5 * SHARE * 29 / measurement
    assert monitor.summary()["later_overhead"] <= SHARE + measurement / 29


@pytest.mark.parametrize("slowest", [1, 3, 30, 1000])
def test_the_opening_holds_whatever_the_first_step_takes(slowest: int) -> None:
    for step in [10**k for k in torch.linspace(-5, -0.3, 200).tolist()]:
        opening, trained, steps, taken = Opening(), slowest * step, 0, 0
        while trained < Opening.SECONDS:
            steps += 1
            if opening.allows(trained, steps):
                opening.take(trained, steps)
                taken += 1
            trained += step
        assert min(20, steps) <= taken <= 80, step


def test_every_step_is_measured_where_it_is_asked_for_and_the_last_one_always() -> None:
    model = network()
    step, monitor = training(model), Monitor(model, every=3)
    for _ in range(7):
        with monitor:
            step()
    monitor.close()
    assert [row["step"] for row in monitor.rows] == [1, 3, 6, 7]
    monitor.close()
    assert len(monitor.rows) == 4


def test_a_name_that_comes_rarely_is_never_left_out() -> None:
    model = network()
    monitor = Monitor(model)
    monitor._cadence.opening, monitor._cadence.writing.spent = None, 1e9  # nothing more may be written
    for n in range(1, 41):
        with monitor:
            pass
        monitor.log(loss=n)
        if n % 10 == 0:
            monitor.log(accuracy=n)
    assert [row["accuracy"] for row in monitor.rows if "accuracy" in row] == [10, 20, 30, 40]
    assert [row["step"] for row in monitor.rows if "accuracy" in row] == [10, 20, 30, 40]
    assert sum("loss" in row for row in monitor.rows) < 10


@pytest.mark.parametrize("method", ["own", "pogo"])
def test_the_overhead_at_the_default_cadence_is_within_one_percent(method: str, tmp_path: Path) -> None:
    """By the monitor's own account, after the first second; the factor is for a machine that does other things."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = network(method, width=256)
        step = training(model, batch=256)
        monitor = Monitor(model, sinks=[tmp_path / "log.jsonl"], live=False)
        for _ in range(5):
            step()
        while monitor._cadence.trained < 4:
            with monitor:
                loss = step()
            monitor.log(loss=loss)
        rest = monitor._cadence.later_overhead
        monitor.close()
    finally:
        torch.set_num_threads(threads)
    assert rest is not None
    print(f"{method}: overhead {100 * rest:.2f} % of {monitor._cadence.trained:.1f} s, {len(monitor.rows)} rows")
    assert rest <= 0.01
    assert monitor.step > 10


def test_memory_is_bounded() -> None:
    kept = EvenSample(100)
    for n in range(100_000):
        kept.add(n)
    assert 50 <= len(kept.entries) <= 100
    gaps = {b - a for a, b in pairwise(kept.entries)}
    assert len(gaps) == 1
    assert kept.entries[0] == 0
    monitor = Monitor(nn.Linear(2, 2), energy=False)
    for _ in range(12_000):
        with monitor:
            pass
        monitor.log(loss=1.0)
    assert len(monitor._rows.durations.entries) <= 5_000
    assert len(monitor._clock._cpu) <= 1_000
    assert len(monitor._rows.durations._recent) <= 1_001


# --- every number ---


def test_a_number_logged_before_the_first_step_delays_no_row():
    monitor = Monitor(network("own"), every=1)
    monitor.log(validation=0.5)
    for _ in range(3):
        with monitor:
            time.sleep(1e-3)
        monitor.log(loss=1.0)
    monitor.close()
    assert [row["step"] for row in monitor.rows] == [1, 2, 3, 4]
    first, *others = monitor.rows
    assert first["seconds"] is None
    assert all(row["seconds"] >= 1e-3 for row in others)


def test_a_name_that_is_logged_from_a_device_and_from_the_host_has_both_numbers(monkeypatch):
    """The host's number, of a later step, is there first."""

    class Slow(Transfer):
        def __init__(self, entries):
            self.entries = [(name, step) for name, step, _ in entries]
            self.values = [float(value) for *_, value in entries]

        arrived = False

        def numbers(self):
            return self.values

    monkeypatch.setattr(history, "Transfer", Slow)
    rows = Rows([], 0)
    rows.history.add(1, {"loss": torch.tensor(0.5)})
    rows.add(rows.begin({"step": 1}, ["loss"], marked=True))
    rows.history.add(2, {"loss": 0.25})
    rows.deliver(2, timed=False, wait=True)
    assert [row["loss"] for row in rows.kept] == [0.5]


def test_the_readmes_example_is_seen_to_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its hundred steps take a tenth of a second: each loss is drawn, and orthogonality as it went."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(snippet(TRAINING, "Monitor"), names)
    monitor, (logged, orthogonality, *_) = names["monitor"], names["figure"].axes
    assert list(logged.lines[0].get_xdata()) == list(range(1, 101))
    assert [value for _, value in monitor.history["loss"]] == list(logged.lines[0].get_ydata())
    assert monitor.history["loss"][-1] == (100, names["loss"].item())
    assert [line.get_label() for line in orthogonality.lines] == ["0.weight", "2.weight"]
    for line in orthogonality.lines:
        steps = list(line.get_xdata())
        assert len(steps) >= 10
        assert (steps[0], steps[-1]) == (1, 100)
    text = str(monitor)
    assert text.count("0 of 100") == 2
    assert f"worst of {len(steps)} measurements" in text
    rows = read(tmp_path / "log.jsonl")
    assert len(rows) >= 10
    assert all("loss" in row for row in rows)


@pytest.mark.parametrize("every", [None, 7])
def test_every_number_is_kept_however_few_rows_are_written(every: int | None) -> None:
    model = network("pogo")
    monitor = Monitor(model, every=every)
    spend_all(monitor)
    expected: dict[str, list[tuple[int, float]]] = {"loss": [], "rate": [], "accuracy": []}
    value = torch.zeros((), requires_grad=True)
    for n in range(1, 3001):
        with monitor:
            loss = (value + n) / 3
            with torch.no_grad():
                value.add_(1)  # what was logged before does not follow
        monitor.log(loss=loss, rate=n)
        expected["loss"].append((n, loss.item()))
        expected["rate"].append((n, n))
        if n % 10 == 0:
            monitor.log(accuracy=n / 7)
            expected["accuracy"].append((n, n / 7))
    if every is None:
        assert sum("loss" in row for row in monitor.rows) < 10
    assert monitor.history == expected


def test_of_very_many_numbers_an_evenly_spread_part_is_kept() -> None:
    history = History(limit=100)
    for n in range(1, 10_001):
        history.add(n, {"loss": 0.5 * n, "rate": n} if n % 2 else {"loss": 0.5 * n})
    series = history.series()
    for name, gap in (("loss", 1), ("rate", 2)):
        assert 50 <= len(series[name]) <= 100
        assert len({b[0] - a[0] for a, b in pairwise(series[name])}) == 1
        assert series[name][0][0] == 1
        assert (series[name][1][0] - 1) % gap == 0
    assert all(value == 0.5 * n for n, value in series["loss"])


def test_the_last_row_has_the_last_numbers_and_the_summary_speaks_of_all_steps(tmp_path: Path) -> None:
    model = network(SHORTENING[0])
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=1e6)
    monitor = Monitor(model, sinks=[tmp_path / "log.jsonl"])
    spend_all(monitor)
    for n in range(1, 31):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        with monitor:
            optimizer.step()
        monitor.log(loss=n)
    assert [row["step"] for row in monitor.rows] == [1]
    rows = {row.name: row for row in stiefel.report(model).rows}
    for name, weight in monitor.summary()["weights"].items():
        assert (weight["steps"], weight["measured"]) == (30, 2)
        assert weight["shortened"] == rows[name].shortened >= 29
        assert weight["last"] == rows[name].relative <= weight["worst"]
    monitor.close()
    assert [(row["step"], row["loss"]) for row in read(tmp_path / "log.jsonl")] == [(1, 1), (30, 30)]


# --- rows ---


class Log:
    """A sink that notes what is done to it."""

    def __init__(self) -> None:
        self.done: list[Any] = []

    def write(self, row: dict[str, Any]) -> None:
        self.done.append(row["step"])

    def flush(self) -> None:
        self.done.append("flush")

    def close(self) -> None:
        self.done.append("close")


class Late(Transfer):
    """A number that arrives when it is told to."""

    def __init__(self, name: str, step: int, number: float) -> None:
        self.entries, self.number, self.here = [(name, step)], number, False

    @property
    def arrived(self) -> bool:
        return self.here

    def numbers(self) -> list[Any]:
        return [self.number]


def add(rows: Rows, step: int, *, marked: bool = False, transfers: list[Transfer] | None = None) -> None:
    pending = rows.begin({"step": step, "seconds": None}, ["loss"], marked=marked)
    pending.transfers += transfers or []
    rows.add(pending)


def test_rows_are_delivered_in_their_order_once_their_numbers_and_durations_are_here() -> None:
    log = Log()
    rows = Rows([log], step=0)
    late = [Late("loss", n, n / 2) for n in (1, 2)]
    for n in (1, 2):
        add(rows, n, marked=n == 2, transfers=[late[n - 1]])
    rows.history.add(3, {"loss": 1.5})
    add(rows, 3)
    late[1].here = True
    for seconds in (0.1, 0.2):
        assert rows.durations.add(seconds)
    rows.deliver(3, timed=True)
    assert (log.done, rows.kept, rows.latest) == ([], [], {})  # the first waits for its number, the others for it
    late[0].here = True
    rows.deliver(3, timed=True)
    assert [step for step in log.done if step != "flush"] == [1, 2]  # the third waits for its duration
    rows.durations.add(0.3)
    rows.deliver(3, timed=True)
    assert rows.kept == [{"step": n, "seconds": n / 10, "loss": n / 2} for n in (1, 2, 3)]
    assert rows.latest is rows.kept[-1]
    add(rows, 4, transfers=[Late("loss", 4, 2.0)])
    rows.deliver(4, timed=False)
    assert len(rows.kept) == 3
    rows.deliver(4, timed=False, wait=True)
    assert rows.kept[-1] == {"step": 4, "seconds": None, "loss": 2.0}
    rows.close()
    assert log.done[-1] == "close"


def test_rows_are_thinned_evenly_marked_ones_and_others_apart() -> None:
    seen: list[int] = []
    log = Log()
    log.write = lambda row: seen.append(row["step"])
    rows = Rows([log], step=0, limit=10)
    for n in range(1, 1001):
        add(rows, n, marked=n % 100 == 0)
        rows.deliver(n, timed=False)
    kept = [row["step"] for row in rows.kept]
    assert seen == list(range(1, 1001))
    assert kept == sorted(kept)
    assert [n for n in kept if n % 100 == 0] == list(range(100, 1001, 100))
    others = [n for n in kept if n % 100]
    assert 5 <= len(others) <= 10
    assert others[0] == 1
    gaps = [b - a for a, b in pairwise(others)]
    assert max(gaps) - min(gaps) <= 1  # those that are marked lie between


def test_rows_are_flushed_every_second_and_marked_ones_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    log = Log()
    rows = Rows([log], step=0)
    for n, marked, later in ((1, False, 0.0), (2, False, 0.6 * FLUSH), (3, False, 0.6 * FLUSH), (4, True, 0.0)):
        now[0] += later
        add(rows, n, marked=marked)
        rows.deliver(n, timed=False)
    assert log.done == [1, "flush", 2, 3, "flush", 4, "flush"]


def test_durations_leave_out_steps_that_were_looked_at() -> None:
    durations = Durations(5)
    assert durations.usual is None
    durations.looked.add(7)
    assert [durations.add(seconds) for seconds in (1.0, 9.0, 2.0, 3.0)] == [True, False, True, True]
    assert durations.entries == [(6, 1.0), (8, 2.0), (9, 3.0)]
    assert (durations.told, durations.usual, durations.looked) == (9, 2.0, set())
    assert [durations.of(step) for step in (6, 7, 9)] == [1.0, None, 3.0]
    durations.forget(9)
    assert [durations.of(step) for step in (6, 7, 9)] == [None, None, 3.0]


# --- the gauge ---


def test_a_gauge_keeps_the_worst_and_counts_energy_from_row_to_row() -> None:
    model = network("unconstrained")
    gauge = Gauge(model, torch.device("cpu"), energy=False)
    assert (gauge.worst, gauge.weights) == (None, {})
    rows: list[dict[str, Any]] = []
    for joules, scale in ((3.0, 2.0), (10.0, 0.5)):
        gauge._meter = type("Meter", (), {"joules": lambda self, now=joules: now, "reason": None})()
        with torch.no_grad():
            model[0].weight.mul_(scale)
        rows.append({"step": 10 * len(rows)})
        gauge.measure(rows[-1], None)
    assert [row["gpu_energy_joules"] for row in rows] == [3.0, 7.0]
    assert gauge.costs()["gpu_energy_joules"] == 10.0
    last, worst = gauge.weights["0.weight"]["last"], gauge.weights["0.weight"]["worst"]
    assert rows[0]["orthogonality"]["0.weight"] == worst > last == rows[1]["orthogonality"]["0.weight"]
    assert gauge.weights["0.weight"]["measured"] == 2
    assert (gauge.weights["0.weight"]["worst_step"], gauge.weights["0.weight"]["last_step"]) == (0, 10)
    assert gauge.worst == max(rows[1]["orthogonality"].values()) == rows[1]["worst"]


# --- sinks ---


class Writer:
    """Looks like TensorBoard's SummaryWriter."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []
        self.flushed = False

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, value, step))

    def flush(self) -> None:
        self.flushed = True


def test_sinks_get_the_rows(tmp_path: Path) -> None:
    model, writer, seen = network("pogo"), Writer(), []
    step = training(model)
    monitor = Monitor(
        model, every=1, sinks=[str(tmp_path / "a" / "log.jsonl"), tmp_path / "log.csv", writer, seen.append]
    )
    for _ in range(3):
        with monitor:
            loss = step()
        monitor.log(loss=loss)
    monitor.close()
    rows = monitor.rows
    assert read(tmp_path / "a" / "log.jsonl") == rows == seen
    table = [line.split(",") for line in (tmp_path / "log.csv").read_text().splitlines()]
    assert table[0] == [name for name, _ in flat(rows[0])]
    assert [float(line[table[0].index("orthogonality/2.weight")]) for line in table[1:]] == [
        row["orthogonality"]["2.weight"] for row in rows
    ]
    assert ("loss", rows[2]["loss"], 3) in writer.scalars
    assert ("orthogonality/0.weight", rows[0]["orthogonality"]["0.weight"], 1) in writer.scalars
    assert all(isinstance(value, (int, float)) for _, value, _ in writer.scalars)
    assert writer.flushed
    frame = monitor.frame()
    assert list(frame["step"]) == [1, 2, 3]
    assert list(frame["loss"]) == [row["loss"] for row in rows]


def test_tensorboard_itself(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with (
        contextlib.closing(SummaryWriter(tmp_path)) as writer,
        contextlib.closing(Monitor(network(), sinks=[writer])) as m,
    ):
        with m:
            pass
        m.log(loss=1.0)
    assert any(tmp_path.iterdir())


@pytest.mark.parametrize("bad", ["log.txt", 3, None, Path("log")])
def test_a_sink_that_is_none_is_named(bad: object) -> None:
    with pytest.raises(OptionError, match=r"is not understood; use a path that ends in \.jsonl or \.csv"):
        Monitor(network(), sinks=[bad])
    with pytest.raises(OptionError, match="has to be a list"):
        Monitor(network(), sinks="log.jsonl")


def test_numbers_that_are_not_finite_are_null_and_named(tmp_path: Path) -> None:
    model = network()
    monitor = Monitor(model, sinks=[tmp_path / "log.jsonl", tmp_path / "log.csv"])
    with monitor:
        pass
    monitor.log(loss=torch.tensor(float("nan")), other=float("-inf"))
    monitor.close()
    (row,) = read(tmp_path / "log.jsonl")
    assert row["loss"] is row["other"] is None
    assert row["nonfinite"] == {"loss": "nan", "other": "-inf"}
    header, line = (tmp_path / "log.csv").read_text().splitlines()
    assert dict(zip(header.split(","), line.split(","), strict=True))["loss"] == "nan"
    assert math.isnan(monitor.rows[0]["loss"])


def test_a_new_column_keeps_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    table = Table(path)
    table.write({"step": 1, "text": 'with "quotes", and commas'})
    table.write({"step": 2, "layers": {"0.weight": 0.5}})
    table.write({"text": "last"})
    table.close()
    assert path.read_text().splitlines() == [
        "step,text,layers/0.weight",
        '1,"with ""quotes"", and commas",',
        "2,,0.5",
        ",last,",
    ]
    again = Table(path)  # a training that is resumed
    again.write({"text": "more", "step": 3})
    again.write({"new": 1})
    again.close()
    assert path.read_text().splitlines()[-2:] == ["3,more,,", ",,,1"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_line_torn_by_a_crash_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"ste')
    lines = JsonLines(path)
    lines.write({"step": 2})
    lines.close()
    assert path.read_text().splitlines() == ['{"step": 1}', '{"ste', '{"step": 2}']


def test_rows_survive_a_process_that_is_killed(tmp_path: Path) -> None:
    code = f"""
import os, stiefel, torch
model = stiefel.constrain(torch.nn.Linear(4, 4))
monitor = stiefel.Monitor(model, every=1, sinks=[r"{tmp_path / "log.jsonl"}", r"{tmp_path / "log.csv"}"])
for n in range(3):
    with monitor: pass
    monitor.log(loss=n)
os._exit(1)
"""
    subprocess.run([sys.executable, "-c", code], timeout=60)
    assert [row["loss"] for row in read(tmp_path / "log.jsonl")] == [0, 1, 2]
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 4


def test_a_resumed_training_appends_and_goes_on_counting(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for start in (0, 2):
        model = network()
        monitor = Monitor(model, every=1, sinks=[path], step=start)
        for n in range(2):
            with monitor:
                pass
            monitor.log(loss=n)
        monitor.close()
    assert [row["step"] for row in read(path)] == [1, 2, 3, 4]


# --- use and misuse ---


def test_what_can_be_logged() -> None:
    model = network()
    monitor = Monitor(model, every=1)
    with monitor:
        pass
    values = {"a": 1, "b": 2.5, "c": torch.tensor([3.0], requires_grad=True), "d": torch.tensor(4), "e": True}
    monitor.log(**values, **{"val/loss": 5.0})
    assert {k: monitor.rows[0][k] for k in values} == {"a": 1, "b": 2.5, "c": 3.0, "d": 4, "e": True}
    assert monitor.rows[0]["val/loss"] == 5.0
    for name, wrong in {"x": torch.ones(2), "y": "text", "z": None, "w": 1j, "v": torch.tensor(1j)}.items():
        with pytest.raises(OptionError, match=rf"{name}=.* cannot be logged; give a single real number"):
            monitor.log(**{name: wrong})
    monitor = Monitor(model)
    with pytest.raises(OptionError, match="loss="):
        monitor.log(loss="no step")
    assert monitor.step == 0
    spend_all(monitor)
    for loss in (1.0, 2.0, torch.ones(2)):  # also where no row is due
        with monitor:
            pass
        with pytest.raises(OptionError, match="loss=") if isinstance(loss, Tensor) else contextlib.nullcontext():
            monitor.log(loss=loss)
    with pytest.raises(OptionError, match="'seconds' is a name of the monitor's own"):
        monitor.log(seconds=3)
    with pytest.raises(OptionError, match="every=0"):
        Monitor(network(), every=0)


def test_logging_inside_the_with_is_not_timed_and_an_unlogged_step_has_a_row() -> None:
    model = network()
    monitor = Monitor(model, every=1)
    running = torch.zeros(())
    with monitor:
        running += 1
        monitor.log(total=running)
        running += 1
    with monitor:
        pass
    with monitor:
        pass
    monitor.log(total=running)
    assert [(row["step"], row.get("total")) for row in monitor.rows] == [(1, 1.0), (2, None), (3, 2.0)]


def test_a_step_that_fails_is_none() -> None:
    model = network()
    monitor = Monitor(model, every=1, signal=True)
    with pytest.raises(KeyError), monitor:
        raise KeyError
    with monitor:
        pass
    assert monitor.step == 1
    assert monitor.summary()["seconds_per_step"] is None  # the only one was looked at
    with pytest.raises(OptionError, match="inside its own"), monitor, monitor:
        pass


def test_without_a_with_each_log_is_a_step_that_is_not_timed() -> None:
    model = network()
    monitor = Monitor(model, every=2)
    for n in range(4):
        monitor.log(loss=n)
    monitor.close()
    assert [(row["step"], row["seconds"]) for row in monitor.rows] == [(1, None), (2, None), (4, None)]


def test_signals_are_measured_in_the_steps_that_are_not_timed() -> None:
    model = network("retraction")
    step, monitor = training(model), Monitor(model, every=3, signal=True)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model]  # some are the constraint's own
    for _ in range(6):
        with monitor:
            step()
    monitor.close()
    assert [(row["step"], row["seconds"]) for row in monitor.rows] == [(1, None), (3, None), (6, None)]
    assert monitor.rows[1]["signal"]["2.weight"]["forward"] == pytest.approx(1, rel=1e-5)
    assert monitor.rows[1]["signal"]["0.weight"]["backward"] == pytest.approx(1, rel=1e-5)
    assert monitor.summary()["seconds_per_step"]["n"] == 3
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model] == hooks


def test_signals_are_measured_at_the_default_cadence_too() -> None:
    model = network("retraction")
    step, monitor = training(model), Monitor(model, signal=True)
    for _ in range(100):
        with monitor:
            step()
        monitor.log(loss=1.0)
    measured = [row["step"] for row in monitor.rows if "signal" in row]
    assert len(measured) >= 5
    assert measured == [row["step"] for row in monitor.rows if "worst" in row]
    assert min(b - a for a, b in pairwise(measured)) > 1  # the steps in between are timed
    assert monitor.summary()["seconds_per_step"]["n"] >= 50


def test_a_model_is_neither_kept_alive_nor_kept_from_being_copied() -> None:
    model = network()
    monitor = Monitor(model, every=1)
    with monitor:
        copy.deepcopy(model)
    monitor.log(loss=1)
    pickle.loads(pickle.dumps(network("pogo")))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    with monitor:
        pass
    monitor.close()
    assert "orthogonality" not in monitor.rows[-1]
    assert "0.weight" in str(monitor)  # what it was when it was last seen


def test_a_weight_that_diverged_is_seen() -> None:
    model = network("unconstrained")
    monitor = Monitor(model, every=1)
    with monitor, torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    monitor.log(loss=1.0)
    assert math.isnan(monitor.rows[0]["worst"])
    assert "nan" in str(monitor)
    monitor.plot()


class FakeEvent:
    """An event that has happened once the device has got that far."""

    made, reached = 0, 0

    def __init__(self, device: torch.device, enable_timing: bool = False) -> None:
        FakeEvent.made += 1
        self.number = FakeEvent.made

    def record(self, stream: object) -> None:
        self.at = self.number

    def query(self) -> bool:
        return FakeEvent.reached >= self.number

    def elapsed_time(self, other: FakeEvent) -> float:
        return 10.0 * (other.number - self.number)


def test_on_a_gpu_a_row_waits_for_the_device_and_the_loop_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeEvent.made = FakeEvent.reached = 0
    monkeypatch.setattr(torch, "Event", FakeEvent)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: None)
    synchronized = []
    monkeypatch.setattr(torch.accelerator, "synchronize", synchronized.append)
    monkeypatch.setattr(gauge_module, "peak_allocated_bytes", lambda device: 7)
    monkeypatch.setattr(gauge_module, "peak_reserved_bytes", lambda device: 8)
    model = network()
    monitor = Monitor(model, every=1, device="cuda:0", energy=False)
    for n in range(3):
        with monitor:
            pass
        monitor.log(loss=n)
    assert monitor.rows == synchronized == []
    FakeEvent.reached = 4  # two steps
    monitor.log(loss=3)
    assert [(row["step"], row["seconds"], row["gpu_peak_bytes"]) for row in monitor.rows] == [
        (1, 0.01, 7),
        (2, 0.01, 7),
    ]
    monitor.close()
    assert len(synchronized) == 0 or FakeEvent.reached < 6
    FakeEvent.reached = 6
    monitor.close()
    assert [row["step"] for row in monitor.rows][:3] == [1, 2, 3]
    assert monitor.summary()["seconds"] == pytest.approx(0.03)


class Far(Tensor):
    """A number on a GPU, of which nothing may be asked before it has arrived."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = torch.device("cuda", 0)

    def item(self) -> Any:
        raise AssertionError("the host would wait here")

    tolist = __float__ = item


def test_numbers_on_a_gpu_are_all_kept_and_none_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeEvent.made = FakeEvent.reached = 0
    monkeypatch.setattr(torch, "Event", FakeEvent)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    monkeypatch.setattr(gauge_module, "peak_allocated_bytes", lambda device: 7)
    monkeypatch.setattr(gauge_module, "peak_reserved_bytes", lambda device: 8)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs))
    monkeypatch.setattr(cadence_module, "MOST_WAITING", 50)
    model = network()
    monitor = Monitor(model, every=400, device="cuda:0", energy=False)
    running, count = torch.zeros(()), torch.zeros(1, dtype=torch.int64)
    for _ in range(1000):
        with monitor:
            running += 0.5
            count += 2
        monitor.log(loss=running.as_subclass(Far), count=count.as_subclass(Far), rate=0.1)
        assert monitor._rows.history.waiting <= 2 * 50 + 2
    assert monitor.rows == []
    FakeEvent.reached = FakeEvent.made
    assert monitor.history == {
        "rate": [(n, 0.1) for n in range(1, 1001)],
        "loss": [(n, n / 2) for n in range(1, 1001)],
        "count": [(n, 2 * n) for n in range(1, 1001)],
    }
    assert [(row["step"], row["loss"], row["count"]) for row in monitor.rows] == [
        (1, 0.5, 2),
        (400, 200.0, 800),
        (800, 400.0, 1600),
    ]
    monitor.close()
    assert (monitor.rows[-1]["step"], monitor.rows[-1]["loss"], monitor.rows[-1]["rate"]) == (1000, 500.0, 0.1)


# --- what is seen ---


def test_it_prints_as_a_table() -> None:
    model = network("pogo")
    step, monitor = training(model), Monitor(model)
    assert "steps        0" in str(monitor)
    for _ in range(3):
        with monitor:
            step()
        monitor.log(loss=1.0)
    monitor.close()
    text = str(monitor)
    parts = ("steps        3", "median and quartiles", "MiB resident", "energy       — (", "0.weight", "0 of 3")
    for part in (*parts, "in steps, less after the first second", "worst of 3 measurements"):
        assert part in text
    json.dumps(monitor.summary(), allow_nan=False)


def test_it_prints_what_is_now_and_the_step_of_each_number() -> None:
    model = network("pogo")
    step, monitor = training(model), Monitor(model, every=4)
    for _ in range(6):
        with monitor:
            step()
    assert monitor.rows[-1]["step"] < 6, "the last step is not one that is measured by itself"
    weights = monitor.summary()["weights"]
    exact = {row.name: row.relative for row in stiefel.report(model).rows}
    for name, weight in weights.items():
        assert weight["last_step"] == 6
        assert weight["last"] == pytest.approx(exact[name])
        line = next(line for line in str(monitor).splitlines() if line.startswith(name))
        assert f"{weight['last']:.1e} at step 6" in line
        assert f"{weight['worst']:.1e} at step {weight['worst_step']}" in line
        found = {row["step"]: row["orthogonality"][name] for row in monitor.rows if "orthogonality" in row}
        assert found[weight["worst_step"]] == weight["worst"] == max(found.values())


def test_the_live_line_is_one_line_within_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display.shutil, "get_terminal_size", lambda: types_size(40))
    out = io.StringIO()
    line = LiveLine(out)
    line.show("step 1 · loss 0.5 · a long tail that does not fit the terminal")
    line.show("short")
    line.close()
    line.close()
    first, second = out.getvalue().removesuffix("\n").split("\r")[1:]
    assert len(first) == 39
    assert first.endswith("…")
    assert second == "short".ljust(39)  # covers what was there
    assert out.getvalue().count("\n") == 1


def types_size(columns: int) -> Any:
    return type("Size", (), {"columns": columns})


def test_the_live_line_is_shown_on_terminals_or_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(display.shutil, "get_terminal_size", lambda: types_size(100))
    for live in (None, True):
        model = network()
        monitor = Monitor(model, live=live)
        for n in range(3):
            with monitor:
                wait(0.06)
            monitor.log(loss=n / 3)
        monitor.close()
        shown = capsys.readouterr().err
        assert bool(shown) is bool(live)
    assert shown.count("\r") >= 2
    last = shown.split("\r")[-1]
    assert last.startswith("step 3 · ")
    assert "ms/step" in last
    assert "‖XXᵀ−I‖/√p" in last
    assert last.endswith("\n")


def test_the_figure_has_three_panels_also_with_many_weights(tmp_path: Path) -> None:
    model = stiefel.constrain(nn.Sequential(*(nn.Linear(6, 6) for _ in range(12))), "pogo")
    monitor = Monitor(model, every=1)
    for n in range(5):
        with monitor:
            pass
        monitor.log(loss=math.exp(-n), accuracy=n)
    figure = monitor.plot()
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[:2] == ["loss, accuracy", "orthogonality ‖XXᵀ−I‖/√p"]
    assert titles[2].startswith("step time, median")
    figure.savefig(tmp_path / "figure.png")
    Monitor(model).plot()  # before the first step
