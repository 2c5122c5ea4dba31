"""Two hundred injected faults: none loses a record, costs another run, ends without a word or leaves a process behind.

Each is made beside records that have ended; then the same command again does the rest and reports all.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from drivers import Driver, Host
from odd_problem import HARMLESS, OUTCOMES, PLACES, PROBLEM

from stiefel.compare.record.records import BROKEN, read, read_all

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
DAMAGE = (
    "cut run.json", "cut metrics.jsonl", "garbage", "invalid UTF-8", "[]", "empty", "half a character", "a folder",
    "no metrics.jsonl", "metrics.jsonl of zeros", "a temporary file", "claim of garbage", "a loop", "2040", "1970",
)  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """What is done: ``kind`` is user, trial, import, kill, files or disk."""

    number: int
    kind: str
    what: str
    details: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.number:03d} {self.kind}: {self.what} {' '.join(map(str, self.details.values()))}".strip()


def faults(count: int = 200, seed: int = 15) -> list[Fault]:
    chance, made = random.Random(seed), []
    for fault in OUTCOMES:
        made += [("user", fault, {"place": place}) for place in chance.sample(PLACES, 2)]
    for fault in [name for name in OUTCOMES if name not in HARMLESS]:
        made.append(("trial", fault, {"place": f"trial {chance.choice(PLACES[:-1])}"}))
    made += [("import", fault, {}) for fault in ("exit0", "segfault", "hang", "sysexit0", "interrupt", "unprintable")]
    for _ in range(8):
        made.append(("disk", "full", {"kilobytes": 4 * chance.randrange(20, 80)}))
    for _ in range(56):
        harm = chance.choices(DAMAGE, k=chance.choice((1, 1, 2, 3)))
        made.append(("files", ", ".join(harm), {"seed": chance.randrange(1000)}))
    while len(made) < count:
        target = chance.choice(("driver", "driver", "driver", "run", "run", "supervisor", "grandchild", "both"))
        number = signal.SIGKILL if target == "both" else chance.choice(SIGNALS)
        details = {"signal": number.name, "after": round(chance.uniform(0.2, 1.6), 2)}
        if target == "driver" and len(made) % 4 == 0:
            details |= {"real": "new interpreter", "after": round(chance.uniform(3.0, 8.0), 2)}
        made.append(("kill", target, details))
    return [Fault(i, *each) for i, each in enumerate(made)]


ALL = faults()
QUICK = {
    ("user", "oserror"), ("user", "daemon"), ("trial", "exit0"), ("import", "exit0"), ("disk", "full"),
    ("kill", "both"), ("files", "cut metrics.jsonl"),
}  # fmt: skip


def selected() -> list:
    """Each of ``QUICK`` once in the ordinary suite; the others are slow."""
    due, chosen = set(QUICK), []
    for fault in ALL:
        key = (fault.kind, fault.what)
        chosen.append(pytest.param(fault, id=str(fault), marks=[] if key in due else pytest.mark.slow))
        due.discard(key)
    return chosen


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    found = Host(tmp_path_factory.mktemp("host"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def finished(host, tmp_path_factory):
    """A folder whose sound runs have all ended."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "odd.py").write_text(PROBLEM)
    driver = host.driver(arguments(folder), folder)
    assert driver.wait() == 0, driver.said()
    assert len(valid(folder)) == 4
    return folder


def arguments(folder: Path, *faults: str, place: str = "loss", timeout: float = 60.0) -> list[str]:
    """A comparison of two studies, each a tuning run and a fresh one, without fault and with some."""
    options = ["--methods", "own", "--scale", "1", "--lr", "0.1", "--studies", "2", "--no-cost", "--jobs", "2"]
    problem = ["--fault", "none", *faults, "--place", place, "--timeout", str(timeout)]
    return ["compare", str(folder / "odd.py"), *options, *problem, "--out", str(folder / "runs")]


def valid(folder: Path) -> dict[str, tuple[bytes, str]]:
    """The records that can be read: what is in their files."""
    found = {}
    for record in read_all([folder / "runs"])[0]:
        rows = record.path / "metrics.jsonl"
        found[record.path.name] = ((record.path / "run.json").read_bytes(), rows.read_text() if rows.is_file() else "")
    return found


def test_there_are_two_hundred_faults():
    assert len(ALL) == 200
    assert {(fault.kind, fault.what) for fault in ALL} >= QUICK
    assert set(Counter(f.kind for f in ALL)) == {"user", "trial", "import", "disk", "files", "kill"}


@pytest.mark.parametrize("fault", selected())
def test_a_fault_loses_nothing_and_the_same_command_does_the_rest(fault, host, finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before = valid(tmp_path)
    with contextlib.ExitStack() as later:
        again, spoilt = INJECT[fault.kind](fault, host, tmp_path, later)
        kept = {name: files for name, files in valid(tmp_path).items() if name not in spoilt}
        assert {name: kept.get(name) for name in before if name not in spoilt} == {
            name: files for name, files in before.items() if name not in spoilt
        }, "a record that was there has changed"
        complete(again, host, tmp_path, kept, spoilt)
    assert not host.left_over(), "a process is left over"


def complete(command: list[str], host: Host, folder: Path, kept: dict, spoilt: set[str]) -> None:
    """Run a command again: all is done then, and reported."""
    driver = host.driver(command, folder)
    code, said = driver.wait(), driver.said()
    after, records = valid(folder), read_all([folder / "runs"])[0]
    statuses = Counter(record.status for record in records)
    assert code == (3 if any(statuses[status] for status in BROKEN) else 0), said
    assert "Traceback" not in said, said
    assert int(re.search(r"^(\d+) runs finished", said, re.MULTILINE)[1]) == len(after), "one record for each run"
    assert {name: after[name] for name in kept} == kept, "nothing that has ended was run again"
    assert (folder / "runs" / "report.html").is_file()
    assert statuses["done"] >= 4, "the sound runs"
    for record in records:
        if record.status == "done" and record.path.name not in spoilt:
            epochs = [row["epoch"] for row in record.metrics()]
            assert epochs == [0, 1, 2], "each row once"


# --- what is injected: each returns the command that is to do the rest, and the folders of runs that it has damaged ---


def misbehave(fault: Fault, host: Host, folder: Path, later: contextlib.ExitStack) -> tuple[list[str], set[str]]:
    command = arguments(folder, fault.what, place=fault.details["place"], timeout=2.5)
    driver = host.driver(command, folder)
    code, said = driver.wait(), driver.said()
    status = OUTCOMES[fault.what]
    assert code == (3 if status in BROKEN else 0), said
    assert "runs finished" in said
    found = [r for r in read_all([folder / "runs"])[0] if r.spec.fields["fault"] == fault.what]
    assert found
    for record in found:
        assert record.status == status, (record.status, record.reason, record.traceback)
        assert len(record.reason or "") <= 2000
        assert (record.path / "run.json").stat().st_size < 30_000
        assert (record.path / "output.txt").stat().st_size <= 1_000_000
        json.loads((record.path / "run.json").read_bytes().decode("utf-8"))
        assert status == "done" or record.reason.isprintable() or "\n" in record.reason
    assert not host.left_over(), "a process of a run outlives it"
    return command, set()


def tried(fault: Fault, host: Host, folder: Path, later: contextlib.ExitStack) -> tuple[list[str], set[str]]:
    start = time.monotonic()
    driver = host.driver(arguments(folder, fault.what, place=fault.details["place"], timeout=2.0), folder)
    code, said = driver.wait(), driver.said()
    assert code == 2, said
    if fault.what in ("kill group", "kill parent"):  # the supervisor, which knew where it was, is gone
        assert "odd.py ends the process, by SIGKILL" in said
    else:
        assert "ProblemError: Odd" in said
        assert fault.details["place"].removeprefix("trial ") in said, "where it was"
    assert time.monotonic() - start < 30
    assert not host.left_over()
    return arguments(folder), set()


def imported(fault: Fault, host: Host, folder: Path, later: contextlib.ExitStack) -> tuple[list[str], set[str]]:
    other = folder / "fails.py"
    other.write_text(f"{PROBLEM}\nFAULTS[{fault.what!r}]()\n")
    command = arguments(folder, timeout=2.0)
    driver = host.driver([command[0], str(other), *command[2:]], folder)
    code, said = driver.wait(), driver.said()
    assert code == 2, said
    assert "ProblemError" in said
    assert "import" in said
    assert not host.left_over()
    return arguments(folder), set()


def kill(fault: Fault, host: Host, folder: Path, later: contextlib.ExitStack) -> tuple[list[str], set[str]]:
    command = arguments(folder, "popen" if fault.what == "grandchild" else "print surrogate")
    number = signal.Signals[fault.details["signal"]]
    driver = Driver(None if "real" in fault.details else host, command, folder)
    if fault.what == "driver":
        time.sleep(fault.details["after"])
        strike(driver.pid, number)
    else:
        while not driver.ended() and not (victims := targets(fault.what, folder, driver.pid)):
            time.sleep(0.002)
        for pid in [] if driver.ended() else victims:
            strike(pid, number)
    code, said = driver.wait(), driver.said()
    if fault.what in ("driver", "both") and number == signal.SIGKILL:
        assert code in (-signal.SIGKILL, 0, 3), said
    elif fault.what == "driver" and code not in (0, 3):
        assert code == 128 + number, said
        assert "Finished runs are kept" in said
        assert "Traceback" not in said, said
        assert not host.left_over(), "a run outlives a driver that was asked to end"
    else:
        assert "runs finished" in said
        assert code == 0, f"a run that was killed once is run again\n{said}"
    return command, set()


def targets(what: str, folder: Path, driver: int) -> list[int]:
    """Processes to be struck, once they are there."""
    runs = [pid for claim in folder.glob("runs/*/claim") if (pid := signed(claim)) not in (0, driver) and parent(pid)]
    if what == "supervisor":
        return [parent(run) for run in runs[:1]]
    if what == "grandchild":
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if parent(pid) in runs][:1]
    return ([driver] if what == "both" and runs else []) + runs[:1]


def signed(claim: Path) -> int:
    with contextlib.suppress(ValueError, OSError, TypeError):
        return json.loads(claim.read_text())["pid"]
    return 0


def parent(pid: int) -> int:
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def strike(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def damage(fault: Fault, host: Host, folder: Path, later: contextlib.ExitStack) -> tuple[list[str], set[str]]:
    chance, spoilt = random.Random(fault.details["seed"]), set()
    for harm in fault.what.split(", "):
        run = chance.choice(sorted(path.parent for path in folder.glob("runs/*/run.json")))
        spoilt |= {run.name} if harmed(run, harm, chance) else set()
    return arguments(folder), spoilt


def harmed(run: Path, harm: str, chance: random.Random) -> bool:
    """Do some harm to the folder of a run; whether the record or its rows suffer."""
    record, rows = run / "run.json", run / "metrics.jsonl"
    contents = {"garbage": chance.randbytes(300), "invalid UTF-8": b'{"schema": "\xff"}', "[]": b"[]", "empty": b""}
    if harm in contents:
        record.unlink() if record.is_file() else shutil.rmtree(record)
        record.write_bytes(contents[harm])
    elif harm.startswith("cut"):
        path = record if harm == "cut run.json" else rows
        if path.is_file():
            os.truncate(path, chance.randrange(path.stat().st_size or 1))
    elif harm == "half a character" and record.is_file():
        record.write_text('{"schema": 1, "reason": "\\ud800"}')
    elif harm == "a folder":
        record.unlink(missing_ok=True) if not record.is_dir() else record.rmdir()
        record.mkdir()
    elif harm == "no metrics.jsonl":
        rows.unlink(missing_ok=True)
    elif harm == "metrics.jsonl of zeros":
        rows.write_bytes(bytes(200))
    else:
        others(run, harm, chance)
        return False
    return True


def others(run: Path, harm: str, chance: random.Random) -> None:
    """Harm that changes no record."""
    if harm == "a temporary file":
        (run / f"run.json.{chance.randrange(9999)}").write_text('{"schema": 1,')
    elif harm == "claim of garbage":
        (run / "claim").write_bytes(chance.randbytes(40))
    elif harm == "a loop":
        with contextlib.suppress(FileExistsError):
            (run.parent / "loop").symlink_to(".")
    else:
        when = time.mktime((int(harm), 6, 1, 0, 0, 0, 0, 0, 0))
        for path in run.iterdir():
            if not path.is_symlink():
                os.utime(path, (when, when))


def fill(fault: Fault, host: Host, folder: Path, later: contextlib.ExitStack) -> tuple[list[str], set[str]]:
    """A small disk, where one may be mounted; and then a larger one."""
    runs = folder / "runs"
    gone = {path.name for path in runs.iterdir()}
    small = ["mount", "-t", "tmpfs", "-o", f"size={fault.details['kilobytes']}k", "none", str(runs)]
    if os.getuid() != 0 or subprocess.run(small, capture_output=True, check=False).returncode != 0:
        pytest.skip("no disk may be mounted here")
    later.callback(subprocess.run, ["umount", "-l", str(runs)], check=True)
    driver = host.driver(arguments(folder, "popen"), folder)
    code, said = driver.wait(), driver.said()
    assert code == 2, said
    assert "StorageError" in said
    assert "No space left" in said
    assert "--out" in said or "--html" in said, "what to do"
    subprocess.run(["mount", "-o", "remount,size=64m", str(runs)], check=True)
    return arguments(folder, "popen"), gone


INJECT = {"user": misbehave, "trial": tried, "import": imported, "kill": kill, "files": damage, "disk": fill}


def test_read_finds_a_record_only_where_one_is(finished):
    assert all(read(path.parent) is not None for path in finished.glob("runs/*/run.json"))
