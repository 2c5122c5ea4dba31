"""Runs specs, each in a process of its own, and sees that each gets a record. Imports ``process``, ``records``.

A crash, a hang or an exhausted memory costs that run alone. Any number of drivers may work on one folder.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, TypeAlias

from stiefel.compare.driver import interruption, post_mortem
from stiefel.compare.driver.interruption import Interrupted
from stiefel.compare.driver.process import RunProcess, start
from stiefel.compare.record.lock import RunLock
from stiefel.compare.record.records import BROKEN, Record, read
from stiefel.compare.record.run_folder import RunFolder, writing
from stiefel.compare.worker.job import Job
from stiefel.compare.worker.main import LATE
from stiefel.errors import RecordError, StorageError

_POLL = 0.2  # seconds between looks at a run that another driver has


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
        running = list(self._running)
        for process in running:  # all at once: one that is deaf to the request takes seconds
            process.terminate()
        for process in running:
            process.stop()


def execute(job: Job, again: float | None = None, stop: Stop | None = None) -> Record | None:
    """Run one job in a process of its own and return its record, whatever happens to the process.

    A run that is killed from outside is run once more; the second time it is recorded.

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
        for last in (False, True):
            folder.start()  # removes the old record, so that one found later is from this run
            record, died = _once(job, folder, claim, stop, local)
            if died is None or stop.event.is_set():
                return record
            if last or died["status"] != "killed":
                folder.finish(died | job.identity, {})
                return read(folder.path)
        raise AssertionError


def _once(
    job: Job, folder: RunFolder, claim: RunLock, stop: Stop, local: bool
) -> tuple[Record | None, dict[str, Any] | None]:
    """The record of one attempt; where it left none, what is known of its end."""
    before = post_mortem.oom_kills()
    try:
        process = start(job, claim, forked=local)
    except (OSError, EOFError) as error:
        reason = f"its process could not be started: {type(error).__name__}: {error}"
        return None, {"status": "crashed", "reason": reason, "summary": {}, "wall_seconds": None}
    if not stop.watch(process, job.timeout + 2 * LATE):
        process.stop()
    outcome = process.outcome or {}
    if "storage" in outcome:  # a full disk says nothing about the method: no record, and the comparison ends
        raise StorageError(outcome["storage"])
    if (record := _read(folder)) is not None:
        return record, None
    oom = post_mortem.oom_kills() > before
    return None, post_mortem.examine(outcome, folder.path / "output.txt", job.timeout, job.memory, oom)


def _read(folder: RunFolder) -> Record | None:
    """The record that a run has left; one that its own code has spoilt counts as none."""
    try:
        return read(folder.path)
    except RecordError:
        return _found(folder)


def _found(folder: RunFolder) -> Record | None:
    """The record that is there; a corrupt one is put aside, so that nothing of it is lost."""
    try:
        return read(folder.path)
    except RecordError:
        (folder.path / "run.json").replace(folder.path / "run.json.corrupt")
        return None


def run_all(
    jobs: Iterable[Job], executor: Executor, on_done: Callable[[Record], None], *, retry_failed: bool = False
) -> list[Record]:
    """Run what has no record yet and return all records, in the order of the jobs.

    Args:
        jobs: what to run.
        executor: where: one of :mod:`stiefel.compare.driver.executors`.
        on_done: called with each record, also those found on disk, as it becomes available.
        retry_failed: run again what ended in an error, a crash, a kill, a timeout or for want of memory.

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
        with interruption.calling(lambda _: None):  # a second Ctrl-C would leave runs behind
            executor.shutdown(wait=False, cancel_futures=True)
        raise
    return [records[job.spec.hash] for job in jobs]


def _run_missing(
    missing: list[tuple[Job, float | None]], executor: Executor, on_done: Callable[[Record], None]
) -> None:
    ended: _Ended = queue.SimpleQueue()  # its put() is reentrant: a signal handler may call it at any point
    with interruption.calling(ended.put):
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
    if not ended.empty():  # an interruption as the last one ended
        _next(ended)


_Ended: TypeAlias = "queue.SimpleQueue[Future[Record | None] | Interrupted]"
"""Futures that have ended, and what interrupts the driver.

Python raises an exception of a signal wherever the main thread is: while it takes a lock, which may fail with an error
of another kind, or while it reports a record. A queue delivers it between two records instead.
"""


def _next(ended: _Ended) -> Future[Record | None]:
    found = ended.get()
    if isinstance(found, Interrupted):
        raise found
    return found


def _known(job: Job) -> Record | None:
    try:
        return read(job.root / job.spec.hash)
    except RecordError as error:
        print(f"stiefel: {error}", file=sys.stderr)  # execute() puts the record aside and runs the spec again
        return None


def available_cores() -> int:
    """Cores this process may use."""
    # The affinity respects taskset, Slurm and cpusets; cpu_count() counts the whole machine.
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def threads_for(processes: int) -> int:
    """Threads of each of so many processes at a time: their share of the cores, at most ``OMP_NUM_THREADS``."""
    share = max(1, available_cores() // processes)
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # it may give a number for each nesting level
    return min(share, int(asked)) if asked.isdigit() and int(asked) else share


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
