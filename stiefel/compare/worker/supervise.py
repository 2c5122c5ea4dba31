"""The supervisor of a run, its parent: nothing that the run starts outlives it. Imports ``output`` and ``copies``.

Both are in a session of their own. On Linux what a run leaves behind becomes the supervisor's child, also what has left
that session, and is ended with it; and a run dies with its supervisor. Elsewhere the process group is ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from stiefel.compare.record.run_folder import leave_if_copied
from stiefel.compare.worker.copies import end_copies
from stiefel.compare.worker.output import Output

GRACE = 5.0
"""Seconds between asking a run to end and killing it."""
_REST = 0.5  # the same for what a run leaves behind, which has no result to write
_GIVE_UP = 10.0  # seconds after which processes that even SIGKILL does not end, as in a dead file system, are left
_LOOK = 0.5  # seconds between looks where nothing happens
_PARENT_DEATH, _SUBREAPER = 1, 36  # of prctl

Say: TypeAlias = Callable[..., None]
"""What a run tells its driver beside its record: facts by name, the last of each counts."""


def supervise(work: Callable[[Say], None], *, output: Path, report: Connection, seconds: float) -> NoReturn:
    """Do some work in a child process, send a report of how it ended, and end this process.

    The report is an object of JSON: ``exit`` (negative is a signal), ``late`` where it was ended after ``seconds``,
    ``peak`` (bytes resident), and what the work has said.

    Args:
        work: called in the child.
        output: file for what it prints, of bounded size.
        report: where the driver reads the report.
        seconds: after which the work is killed.
    """
    outcome: dict[str, Any] = {"exit": 1}
    try:
        with contextlib.suppress(PermissionError):  # it leads a session already
            os.setsid()
        _prctl(_SUBREAPER, 1)
        outcome = _Supervisor(work, Output(output), report).watch(seconds)
    except Exception:
        outcome["fault"] = traceback.format_exc()[-2000:]
    finally:
        with contextlib.suppress(OSError):  # the driver is gone
            report.send_bytes(json.dumps(outcome).encode())
        if sys.platform != "linux":
            os.killpg(0, signal.SIGKILL)
        os._exit(0)


class _Supervisor:
    def __init__(self, work: Callable[[Say], None], output: Output, report: Connection) -> None:
        self.output, self.said = output, b""
        self.exit: int | None = None
        self.peak, self.asked = 0, False
        self.wake, wake = os.pipe()
        self.printed, printed = os.pipe()
        self.told, told = os.pipe()
        self.open = {self.printed, self.told}
        for descriptor in (self.wake, wake, *self.open):
            os.set_blocking(descriptor, False)
        # A signal that arrives at any moment writes a byte, and so ends the wait.
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._ask)
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # the driver's to handle
        supervisor = os.getpid()
        self.run = os.fork()
        if self.run == 0:
            for descriptor in (self.wake, *self.open):
                os.close(descriptor)
            report.close()
            _child(work, supervisor, printed, told)
        os.close(printed)
        os.close(told)

    def _ask(self, *_: object) -> None:
        self.asked = True

    def watch(self, seconds: float) -> dict[str, Any]:
        """Wait for the run, end what it leaves, and say how it ended."""
        deadline, kill, late = time.monotonic() + seconds, None, False
        while self._reap() and self.exit is None:
            self._listen(_LOOK)
            now = time.monotonic()
            if now > deadline or (kill is not None and now > kill):
                late = late or kill is None
                os.kill(self.run, signal.SIGKILL)
            elif self.asked and kill is None:
                os.kill(self.run, signal.SIGTERM)
                kill = now + GRACE
        self._end_rest()
        self._listen(0)
        self.output.close()
        facts = {key: value for line in self.said.splitlines() for key, value in json.loads(line).items()}
        return {**facts, "exit": self.exit, "late": late, "peak": self.peak}

    def _reap(self) -> bool:
        """Take note of children that have ended; whether any is left."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
                if pid == self.run:
                    self.exit = os.waitstatus_to_exitcode(status)
                    self.peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
                if pid == 0:
                    return True
        return False

    def _listen(self, seconds: float) -> None:
        """Read what has been printed and said, at most so long."""
        ready, _, _ = select.select([self.wake, *self.open], [], [], seconds)
        if self.wake in ready:
            os.read(self.wake, 4096)
        for descriptor in self.open.intersection(ready):
            for data in _chunks(descriptor):
                if not data:
                    self.open.discard(descriptor)
                elif descriptor == self.printed:
                    self.output.feed(data)
                else:
                    self.said += data
        self.output.flush()

    def _end_rest(self) -> None:
        """End what the run has started and left: first asked, then killed."""
        begun, asked = time.monotonic(), set[int]()
        while self._reap() and (spent := time.monotonic() - begun) < _GIVE_UP:
            for pid in _children(os.getpid()):
                if pid not in asked or spent > _REST:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL if spent > _REST else signal.SIGTERM)
                    asked.add(pid)
            self._listen(0.01)


def _chunks(descriptor: int, most: int = 64) -> Iterator[bytes]:
    """What a pipe holds now, empty at its end; bounded, as a process may print faster than this one reads."""
    with contextlib.suppress(BlockingIOError):
        for _ in range(most):
            data = os.read(descriptor, 1 << 16)
            yield data
            if not data:
                return


def _child(work: Callable[[Say], None], supervisor: int, printed: int, told: int) -> NoReturn:
    """The run itself: its output goes to the supervisor, its exit status is the work's."""
    own, code = os.getpid(), 1

    def say(**facts: Any) -> None:
        leave_if_copied(own)
        os.write(told, json.dumps(facts).encode() + b"\n")

    try:
        _prctl(_PARENT_DEATH, signal.SIGKILL)
        if os.getppid() != supervisor:  # it died before the line above
            os._exit(1)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        for descriptor in (1, 2):
            os.dup2(printed, descriptor)
        os.close(printed)
        # What cannot be encoded is no fault of a run; of one that crashes, the last lines are wanted.
        way: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace", "buffering": 1, "closefd": False}
        sys.stdout, sys.stderr = open(1, "w", **way), open(2, "w", **way)  # noqa: SIM115
        end_copies()
        work(say)
        code = 0
    except BaseException:
        if os.getpid() == own:
            traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _children(parent: int) -> list[int]:
    """The processes whose parent is this one."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            if int(stat.read_text(errors="replace").rpartition(")")[2].split()[1]) == parent:
                found.append(int(stat.parent.name))
    return found


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), 0, 0, 0)
