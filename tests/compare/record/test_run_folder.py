"""What runs write: texts of bounded size that any file takes, the time, and nothing by copies of a run."""

import json
import os
import sys
import time
from datetime import datetime

import pytest
from specs import spec

from stiefel.compare.record.lock import RunLock
from stiefel.compare.record.records import read
from stiefel.compare.record.run_folder import LINE, LINES, REASON, RunFolder, readable


@pytest.fixture
def folder(tmp_path):
    made = RunFolder(tmp_path, spec())
    made.start()
    return made


def test_texts_are_bounded_and_readable_wherever_they_come_from(folder):
    odd = "\ud800 \x1b[31m\x00 é √"
    outcome = {"status": "error", "reason": odd + "y" * 5_000_000, "summary": {"metric": odd, odd: 1.0}}
    folder.finish({**outcome, "traceback": ["x" * 10_000, odd] * 100}, {"gpu_reason": odd})
    raw = (folder.path / "run.json").read_bytes()
    assert len(raw) < 100_000
    found = json.loads(raw.decode("utf-8"))
    shown = "\\ud800 \\x1b[31m\\x00 é √"
    assert found["reason"].startswith(shown)
    assert "characters …]" in found["reason"]
    assert len(found["reason"]) <= REASON
    assert found["summary"] == {"metric": shown, shown: 1.0}
    assert found["environment"]["gpu_reason"] == shown
    assert len(found["traceback"]) == LINES
    assert max(map(len, found["traceback"])) <= LINE
    assert found["traceback"][-1] == shown
    found["reason"].encode("utf-8")


def test_lines_and_tabs_stay():
    assert readable("a\n\tb\r\x7f") == "a\n\tb\\r\\x7f"


def test_the_time_of_the_end_is_in_the_record_and_not_that_of_its_file(folder):
    folder.finish({"status": "error", "reason": "x", "summary": {}}, {})
    file = folder.path / "run.json"
    ended = datetime.fromisoformat(json.loads(file.read_text())["ended"])
    assert ended.utcoffset().total_seconds() == 0
    assert abs(ended.timestamp() - time.time()) < 60
    for when in (0, 2_200_000_000):  # 1970, and 2039: a clock that was wrong, or a copy
        os.utime(file, (when, when))
        assert read(folder.path).written == ended.timestamp()


def test_a_new_attempt_starts_from_nothing(folder):
    folder.append({"epoch": 0})
    folder.finish({"status": "error", "reason": "x", "summary": {}}, {})
    (folder.path / "run.json.4711").write_text("{")
    folder.start()
    assert sorted(path.name for path in folder.path.iterdir()) == ["metrics.jsonl", "output.txt"]
    assert (folder.path / "metrics.jsonl").read_text() == ""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("write", ["append", "finish"])
def test_a_forked_copy_of_a_run_writes_nothing_and_ends(folder, write):
    def act():
        if write == "append":
            folder.append({"epoch": 0})
        else:
            folder.finish({"status": "error", "reason": f"by {os.getpid()}", "summary": {}}, {})

    child = os.fork()
    if child == 0:
        act()
        os._exit(9)  # not reached
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (folder.path / "metrics.jsonl").read_text() == ""
    assert read(folder.path) is None
    act()
    sys.stdout.flush()
    if write == "append":
        assert len((folder.path / "metrics.jsonl").read_text().splitlines()) == 1
    else:
        assert read(folder.path).reason == f"by {os.getpid()}"


def test_what_is_written_names_no_folder_and_no_machine(folder, monkeypatch):
    monkeypatch.setattr("stiefel.compare.record.lock.socket.gethostname", lambda: "my-laptop")
    home = os.path.expanduser("~")
    with RunLock.take(folder.path):
        assert "my-laptop" in (folder.path / "claim").read_text(), "who looks while it runs is told where"
        where = [
            f'  File "{home}/work/problem.py", line 3, in loss',
            f'  File "{home}/v/lib/site-packages/torch/nn.py"',
        ]
        folder.finish({"status": "error", "reason": f"no {home}/data", "traceback": where, "summary": {}}, {})
    for file in ("run.json", "claim"):
        text = (folder.path / file).read_text()
        assert home not in text
        assert "my-laptop" not in text
    record = read(folder.path)
    assert record.reason == "no ~/data"
    assert "site-packages/torch/nn.py" in record.traceback[1]
    assert json.loads((folder.path / "claim").read_text()) == {"pid": os.getpid()}
