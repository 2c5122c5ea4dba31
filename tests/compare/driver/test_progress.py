"""What a comparison says while it runs."""

from collections import Counter
from types import SimpleNamespace

import pytest

from stiefel.compare.driver import progress
from stiefel.compare.driver.progress import Progress, duration, told


def ended(*statuses):
    return [SimpleNamespace(status=status) for status in statuses]


def test_a_run_short_of_its_target_is_done():
    assert told(Counter({"done": 9, "target missed": 3, "diverged": 1})) == "12 done (3 short of target), 1 diverged"
    assert told(Counter({"killed": 1})) == "0 done, 1 killed"


def test_a_log_has_a_line_for_each_stage_and_rounds_of_one_are_one_stage(capsys):
    with Progress() as shown:
        for name, statuses in [
            ("tuning", ["done", "target missed"]),
            ("extend", ["done"]),
            ("refine", ["done", "done"]),
            ("refine", ["diverged"]),
            ("final", ["done"]),
        ]:
            advance = shown.stage(name, len(statuses))
            for record in ended(*statuses):
                advance(record)
    lines = [line.rpartition(";")[0] for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "tuning: 2 of 2 runs, 2 done (1 short of target)",
        "tuning, closer: 4 of 4 runs, 3 done, 1 diverged",
        "reported runs: 1 of 1 runs, 1 done",
    ]


def test_a_log_says_now_and_then_how_long_is_left(capsys, monkeypatch):
    clock = iter(range(0, 100_000, 10))
    monkeypatch.setattr(progress, "LOOKS", (1.0, 1.0))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    with Progress(lambda: 3700.0) as shown:
        advance = shown.stage("tuning", 40)
        for record in ended(*["done"] * 30):
            advance(record)
        said = capsys.readouterr().out.splitlines()
        assert 1 < len(said) < 6, "by this clock an estimate takes 10 s, and may take a twentieth of the time"
        assert all("so far, about 1 h 01 min left" in line for line in said)
        assert said[0].startswith("tuning: ")
        assert " of 40 runs, " in said[0]


def test_an_interrupted_stage_says_how_far_it_came(capsys):
    def interrupted():
        with Progress() as shown:
            shown.stage("tuning", 5)(*ended("done"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "tuning: 1 of 5 runs, 1 done" in capsys.readouterr().out


def test_durations():
    assert [duration(s) for s in (3, 125, 7500)] == ["3 s", "2 min 05 s", "2 h 05 min"]
