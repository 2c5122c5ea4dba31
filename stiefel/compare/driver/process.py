"""Starting, watching and ending the process of one run. Imports ``worker``.

On the CPU it is forked from a server that has imported everything and has never run a parallel operation or touched
CUDA; for CUDA, for cost runs, under ``torchrun`` and in remote workers it is started fresh.
"""

from __future__ import annotations

import multiprocessing as mp
import pickle
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from typing import Any

from stiefel.compare.record.lock import RunLock
from stiefel.compare.worker import main as worker
from stiefel.compare.worker.job import Job

GRACE = 5.0
"""Seconds between asking a process to end and killing it."""


class RunProcess(ABC):
    """The process of a run."""

    _process: Any  # a multiprocessing.Process or a subprocess.Popen

    @abstractmethod
    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it has ended, at most so long; whether it has."""

    @property
    @abstractmethod
    def exitcode(self) -> int | None:
        """None while it runs; negative is the signal that killed it."""

    def stop(self) -> None:
        """Terminate it, and kill it if it has not ended after ``GRACE`` seconds."""
        # SIGTERM first: torchrun ends its workers on it, and could not on SIGKILL.
        self._process.terminate()
        if not self.wait(GRACE):
            self._process.kill()
            self.wait()


def start(job: Job, claim: RunLock, *, forked: bool) -> RunProcess:
    """Start the process of a job, which shares its claim.

    Args:
        job: what to run.
        claim: held by this process.
        forked: whether a server in this process may be forked; cost runs and those on other devices never are.
    """
    return Forked(job, claim) if forked and can_fork(job) else Fresh(job, claim)


def can_fork(job: Job) -> bool:
    """Whether a run may be forked from the preloaded server."""
    return job.spec.device == "cpu" and job.spec.kind != "cost" and job.processes == 1


class Forked(RunProcess):
    """A copy of the preloaded server."""

    def __init__(self, job: Job, claim: RunLock) -> None:
        # Pickling the claim duplicates its open file into the child, which then holds the lock too.
        self._process = _context().Process(target=worker.main, args=(job, claim), name=job.spec.hash)
        self._process.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait at most so long; whether it has ended."""
        self._process.join(seconds)
        return self._process.exitcode is not None

    @property
    def exitcode(self) -> int | None:
        """None while it runs."""
        return self._process.exitcode


class Fresh(RunProcess):
    """A new interpreter, or several under ``torchrun``."""

    def __init__(self, job: Job, claim: RunLock) -> None:
        path = job.root / job.spec.hash / "job.pickle"
        path.write_bytes(pickle.dumps(job))
        module = ["-m", "stiefel.compare.worker.main", str(path)]
        if job.processes > 1:
            module = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.processes}", *module]
        # For what Python or torchrun print before the worker redirects its output to the same file.
        with (path.parent / "output.txt").open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, *module],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(claim.descriptor,),  # keeps the run claimed if this process dies before it
                start_new_session=True,  # out of reach of the terminal's Ctrl-C
            )
        self._path = path

    def wait(self, seconds: float | None = None) -> bool:
        """Wait at most so long; whether it has ended."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        self._path.unlink(missing_ok=True)
        return True

    @property
    def exitcode(self) -> int | None:
        """None while it runs."""
        return self._process.returncode


def start_server() -> None:
    """Start the server that CPU runs are forked from, so that its imports overlap with the driver's own."""
    from multiprocessing import forkserver

    _context()  # names the modules to preload, which has no effect on a server that runs already
    forkserver.ensure_running()


def _context() -> Any:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["stiefel.compare.worker.preload"])
    return context


def describe_exit(code: int | None) -> str:
    """How a process without a record ended, in words."""
    if code is not None and code < 0:
        return f"the process was killed by {signal.Signals(-code).name}"
    return f"the process exited with code {code} before it wrote a record"
