"""Starting, watching and ending the process of one run or trial: its supervisor. Imports ``worker``.

On the CPU it is forked from a server that has imported everything and has never run a parallel operation or touched
CUDA; for CUDA, for cost runs, under ``torchrun`` and in remote workers it is started fresh.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing as mp
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from stiefel.compare.record.lock import RunLock
from stiefel.compare.worker import main as worker
from stiefel.compare.worker import trial
from stiefel.compare.worker.job import Job
from stiefel.compare.worker.supervise import GRACE

_QUIET = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads that wait sleep, so that several runs on a machine do not take each other's cores; the user's value holds.

A cost run is alone on the machine, and takes what the user's own training takes: there a thread that sleeps costs time.
"""


class RunProcess:
    """The process of a run, known by what its supervisor reports.

    Args:
        process: of :mod:`multiprocessing` or :mod:`subprocess`.
        report: where the supervisor's report comes.
        reap: waits at most so many seconds for a process that has reported.
    """

    def __init__(self, process: Any, report: Connection, reap: Callable[[float], object]) -> None:
        self._process, self._report, self._reap = process, report, reap
        self._reading = threading.Lock()  # the thread that watches it, and the one that stops all
        self.outcome: dict[str, Any] | None = None
        """What its supervisor reports (:func:`stiefel.compare.worker.supervise.supervise`); None while it runs."""

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it has ended, at most so long; whether it has."""
        if self.outcome is None and self._report.poll(seconds):
            with self._reading:
                if self.outcome is None:
                    self.outcome = self._read()
        return self.outcome is not None

    @property
    def exitcode(self) -> int | None:
        """None while it runs; negative is the signal that killed it."""
        return None if self.outcome is None else self.outcome["exit"]

    def _read(self) -> dict[str, Any]:
        try:
            outcome = json.loads(self._report.recv_bytes())
        except (EOFError, OSError):  # it has died, and its run with it; what else it had started is left in its group
            self._kill()
            outcome = {}
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._reap(GRACE)
        return {"exit": self._code(), **outcome}

    def _code(self) -> int:
        """The exit status of the supervisor: where it has not reported, it was killed, or has not come to its work."""
        found = self._process.exitcode if isinstance(self._process, BaseProcess) else self._process.returncode
        return -signal.SIGKILL if found in (None, 255) else found  # 255: the server that knew it is gone

    def terminate(self) -> None:
        """Ask it to end, which it does within ``GRACE`` seconds, with all that it has started."""
        if self.outcome is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGTERM)

    def stop(self) -> None:
        """Ask it to end, and kill it where it does not."""
        self.terminate()
        if not self.wait(GRACE + 3):
            self._kill()
            self.wait()

    def _kill(self) -> None:
        for kill in (os.killpg, os.kill):  # before it leads a group, there is none of its number
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(self._process.pid, signal.SIGKILL)


def start(job: Job, claim: RunLock, *, forked: bool) -> RunProcess:
    """Start the process of a job, which shares its claim.

    Args:
        job: what to run.
        claim: held by this process.
        forked: whether a server in this process may be forked; cost runs and those on other devices never are.
    """
    if forked and can_fork(job):
        return _forked(worker.main, job.to_json(), claim, name=job.spec.hash)
    return _fresh(job, claim)


def start_trial(task: str, output: str) -> RunProcess:
    """Start the trial of a problem, a task of :mod:`stiefel.compare.worker.trial`."""
    return _forked(trial.main, task, output, name="trial")


def can_fork(job: Job) -> bool:
    """Whether a run may be forked from the preloaded server."""
    return job.spec.device == "cpu" and job.spec.kind != "cost" and job.processes == 1


def _forked(target: Callable[..., None], text: str, *more: Any, name: str) -> RunProcess:
    """A copy of the preloaded server, which is started again where it has been killed."""
    for again in (True, False):
        reader, writer = mp.Pipe(duplex=False)
        process = _context().Process(target=target, args=(text, writer, *more), name=name)
        try:
            process.start()
            return RunProcess(process, reader, process.join)
        except (OSError, EOFError):
            if not again:
                raise
        finally:
            writer.close()
    raise AssertionError


def _fresh(job: Job, claim: RunLock) -> RunProcess:
    """A new interpreter."""
    reader, writer = mp.Pipe(duplex=False)
    # For what Python prints before the supervisor writes to the same file.
    with writer, (job.root / job.spec.hash / "output.txt").open("w") as output:
        descriptors = (writer.fileno(), claim.descriptor)
        process = subprocess.Popen(
            [sys.executable, "-m", "stiefel.compare.worker.main", job.to_json(), *map(str, descriptors)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=os.environ if job.spec.kind == "cost" else _QUIET | os.environ,
            pass_fds=descriptors,  # the claim keeps the run claimed if this process dies before it
            start_new_session=True,  # out of reach of the terminal's Ctrl-C
        )
    return RunProcess(process, reader, process.wait)


def start_server() -> None:
    """Start the server that CPU runs are forked from, so that its imports overlap with the driver's own."""
    from multiprocessing import forkserver

    _context()  # names the modules to preload, which has no effect on a server that runs already
    added = {name: value for name, value in _QUIET.items() if name not in os.environ}
    os.environ.update(added)
    try:
        forkserver.ensure_running()
    finally:  # the driver's own other children, cost runs among them, do not inherit it
        for name in added:
            del os.environ[name]


def _context() -> Any:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["stiefel.compare.worker.preload"])
    return context
