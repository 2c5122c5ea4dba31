"""Runs specs, each in a process of its own, and sees that each gets a record. Imports ``process``, ``records``.

A crash, a hang or an exhausted memory costs that run alone. Any number of drivers may work on one folder.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from stiefel.compare.driver.process import RunProcess, describe_exit, start
from stiefel.compare.record.lock import RunLock
from stiefel.compare.record.records import BROKEN, Record, read
from stiefel.compare.record.run_folder import NO_STORAGE, RunFolder, writing
from stiefel.compare.worker.job import Job
from stiefel.compare.worker.main import TAIL
from stiefel.errors import RecordError, StorageError

_POLL = 0.2  # seconds between looks at a run that another driver has
_LATE = 60.0  # seconds beyond the timeout until the driver ends a process, whose own timer starts a little later


class Stop:
    """Ends all runs of this process together; cannot be sent to another process."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self._running: set[RunProcess] = set()

    def watch(self, process: RunProcess, seconds: float) -> bool:
        """Wait for a process, which a stop ends; returns whether it ended within the time."""
        # Added before the event is read: whenever a stop comes, all() finds the process or the event is seen here.
        self._running.add(process)
        try:
            if self.event.is_set():
                process.stop()
            return process.wait(seconds)
        finally:
            self._running.discard(process)

    def all(self) -> None:
        """End every run that is watched, and start no other."""
        self.event.set()
        for process in list(self._running):
            process.stop()


def execute(job: Job, again: float | None = None, stop: Stop | None = None) -> Record | None:
    """Run one job in a process of its own and return its record, whatever happens to the process.

    Args:
        job: what to run.
        again: when the record to be replaced was written; a newer one, from another driver, is returned instead.
        stop: once set, nothing is started or recorded: what was interrupted has not failed.

    Returns:
        The record, also one that another driver has written meanwhile. None where another driver is running the spec
        now, or where ``stop`` was set.
    """
    local = stop is not None  # a remote executor passes none, as it cannot be pickled
    stop = stop or Stop()
    if stop.event.is_set():
        return None
    folder = RunFolder(job.root, job.spec)
    with writing(folder.path):
        claim = RunLock.take(folder.path)
    if claim is None:
        return None
    with claim:
        # Read again under the claim: another driver may have finished the run since the caller looked.
        record = _found(folder)
        if record is not None and record.written != again:
            return record
        folder.start()  # removes the old record, so that one found later is from this run
        with writing(folder.path):
            process = start(job, claim, forked=local)
        # A process ends itself at its timeout, unless it hung before it could set its timer.
        if not stop.watch(process, job.timeout + _LATE):
            process.stop()
        record = read(folder.path)
        # A full disk says nothing about the method: no record, and the comparison ends with the error.
        if record is None and process.exitcode == NO_STORAGE:
            raise StorageError(_said(folder)[-1] or f"{folder.path} cannot be written; check space and permissions")
        if record is None and not stop.event.is_set():
            folder.finish(_post_mortem(process.exitcode, folder, job) | job.identity, {})
            record = read(folder.path)
        return record


def _found(folder: RunFolder) -> Record | None:
    """The record that is there; a corrupt one is put aside, so that nothing of it is lost."""
    try:
        return read(folder.path)
    except RecordError:
        (folder.path / "run.json").replace(folder.path / "run.json.corrupt")
        return None


def _post_mortem(exitcode: int | None, folder: RunFolder, job: Job) -> dict[str, Any]:
    lines = _said(folder)
    outcome: dict[str, Any] = {"traceback": _tail(lines), "summary": {}, "wall_seconds": None}
    # faulthandler, set up by :mod:`worker.main`, prints this line at the timeout and exits with status 1.
    if exitcode is None or any(re.match(r"Timeout \(\d+:\d\d:\d\d", line) for line in lines):
        return outcome | {"status": "timeout", "reason": f"not finished after {job.timeout:g} s (--timeout)"}
    # Most often the kernel's out-of-memory killer: :mod:`worker.main` makes this process its first choice.
    if exitcode == -signal.SIGKILL:
        return outcome | {"status": "out of memory", "reason": f"{describe_exit(exitcode)}, probably out of memory"}
    return outcome | {"status": "crashed", "reason": describe_exit(exitcode)}


def _tail(lines: list[str]) -> list[str]:
    """The last lines of a process that died; of Python's dump of its threads, the stack of the one that crashed."""
    # After a crash one thread is "Current thread". After a timeout none is, and the main thread comes last.
    dumps = [i for i, line in enumerate(lines) if line.startswith(("Current thread", "Thread 0x"))]
    crashed = [i for i in dumps if lines[i].startswith("Current thread")] or dumps
    return lines[crashed[-1] :][:TAIL] if crashed else lines[-TAIL:]


def _said(folder: RunFolder) -> list[str]:
    """The lines that a run's process printed."""
    return (folder.path / "output.txt").read_text(errors="replace").splitlines() or [""]


def run_all(
    jobs: Iterable[Job], executor: Executor, on_done: Callable[[Record], None], *, retry_failed: bool = False
) -> list[Record]:
    """Run what has no record yet and return all records, in the order of the jobs.

    Args:
        jobs: what to run.
        executor: where: one of :mod:`stiefel.compare.driver.executors`.
        on_done: called with each record, also those found on disk, as it becomes available.
        retry_failed: run again what ended in an error, a crash, a timeout or for want of memory.

    Raises:
        StorageError: the folder of the records cannot be written.
    """
    jobs = list(jobs)
    missing: list[tuple[Job, float | None]] = []
    records: dict[str, Record] = {}

    def note(record: Record) -> None:
        records[record.spec.hash] = record
        on_done(record)

    for job in jobs:
        record = _known(job)
        if record is None or (retry_failed and record.status in BROKEN):
            # The time tells the record to be replaced from one that another driver writes in the meantime.
            missing.append((job, record.written if record else None))
        else:
            note(record)
    try:
        _run_missing(missing, executor, note)
    except BaseException:  # Ctrl-C too: without this, leaving the executor would wait for the runs in progress
        executor.shutdown(wait=False, cancel_futures=True)
        raise
    return [records[job.spec.hash] for job in jobs]


def _run_missing(
    missing: list[tuple[Job, float | None]], executor: Executor, on_done: Callable[[Record], None]
) -> None:
    ended: _Ended = queue.SimpleQueue()  # its put() is reentrant: a signal handler may call it at any point
    with _interrupts(partial(ended.put, None)):
        while missing:
            futures = {executor.submit(execute, *task): task for task in missing}
            missing = []
            for future in futures:
                future.add_done_callback(ended.put)
            for _ in futures:
                future = _next(ended)
                record = future.result()  # raises what execute() raised, StorageError for instance
                if record is None:
                    missing.append(futures[future])  # another driver has it: look again when the rest is done
                else:
                    on_done(record)
            if missing:
                time.sleep(_POLL)
    if not ended.empty():  # a Ctrl-C as the last one ended
        raise KeyboardInterrupt


_Ended: TypeAlias = "queue.SimpleQueue[Future[Record | None] | None]"
"""Futures that have ended, and None for a Ctrl-C.

Python raises a KeyboardInterrupt wherever the main thread is: while it takes a lock, which may fail with an error of
another kind, or while it reports a record. A queue delivers it between two records instead.
"""


def _next(ended: _Ended) -> Future[Record | None]:
    future = ended.get()
    if future is None:
        raise KeyboardInterrupt
    return future


@contextlib.contextmanager
def _interrupts(call: Callable[[], object]) -> Iterator[None]:
    """Ctrl-C calls a function instead of raising, unless another handler is set or it is ignored."""
    # Only the main thread may set a signal handler; in any other, Ctrl-C is left alone.
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: call())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _known(job: Job) -> Record | None:
    try:
        return read(job.root / job.spec.hash)
    except RecordError as error:
        print(f"stiefel: {error}", file=sys.stderr)  # execute() puts the record aside and runs the spec again
        return None


def elapsed(start: float) -> str:
    """Time since ``start`` as minutes and seconds."""
    return duration(time.monotonic() - start)


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def available_cores() -> int:
    """Cores this process may use."""
    # The affinity respects taskset, Slurm and cpusets; cpu_count() counts the whole machine.
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def writable(folder: Path) -> None:
    """Raise where a folder of records cannot be made or written.

    Raises:
        StorageError: with the reason.
    """
    probe = folder / f".probe-{os.getpid()}"  # another driver may try the same folder
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("probe")
        probe.unlink()
