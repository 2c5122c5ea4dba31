"""Runs specs, each in a process of its own, and writes their records. Imports ``run``, ``records`` and below.

On the CPU a process is forked from a server that has imported everything and has never run a parallel operation or
touched CUDA; for CUDA and for cost runs it is started fresh. A crash, a hang or an out-of-memory costs that run alone.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stiefel.compare.records import Record, RunFolder, read
from stiefel.compare.spec import RunSpec

_GRACE = 5.0  # seconds between asking a process to end and killing it


@dataclass(frozen=True)
class Job:
    """A spec and what a process needs to run it."""

    spec: RunSpec
    file: str
    settings: dict[str, Any]
    root: Path
    threads: int
    timeout: float


def execute(job: Job, stopping: threading.Event | None = None) -> Record | None:
    """Run one job in a process of its own and return its record, whatever happens to the process.

    Once ``stopping`` is set nothing is started or recorded any more, and None is returned: what was interrupted has not
    failed, and a later call runs it again.
    """
    if stopping is not None and stopping.is_set():
        return None
    fresh = job.spec.device != "cpu" or job.spec.kind == "cost"
    context: Any = mp.get_context("spawn") if fresh else _server()
    process = context.Process(target=_child, args=(job,), name=job.spec.hash, daemon=True)
    folder = RunFolder(job.root, job.spec)
    folder.start()
    process.start()
    process.join(job.timeout)
    late = process.is_alive()
    if late:
        _end(process)
    record = None if late else read(folder.path)
    if record is None and stopping is not None and stopping.is_set():
        return None
    if record is None:
        folder.finish(_post_mortem(process.exitcode, late, job.timeout), {})
        record = read(folder.path)
    assert record is not None
    return record


def _end(process: Any) -> None:
    process.terminate()
    process.join(_GRACE)
    if process.is_alive():
        process.kill()
        process.join()


def _post_mortem(exitcode: int | None, late: bool, timeout: float) -> dict[str, Any]:
    if late:
        return {"status": "timeout", "reason": f"not finished after {timeout:g} s", "summary": {}}
    if exitcode is not None and exitcode < 0:
        what = f"the process was killed by {signal.Signals(-exitcode).name}"
        hint = " (out of memory?)" if exitcode == -signal.SIGKILL else ""
        return {"status": "error", "reason": what + hint, "summary": {}}
    return {"status": "error", "reason": f"the process ended with code {exitcode} and no record", "summary": {}}


def _child(job: Job) -> None:
    """What the run's process does. Imports here, where a fresh process has to pay for them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    import torch

    torch.set_num_threads(job.threads)
    from stiefel.compare.problem import load_problem
    from stiefel.compare.run import KINDS
    from stiefel.measure.cost import environment

    folder = RunFolder(job.root, job.spec)
    try:
        problem = load_problem(job.file)(**job.settings)
        outcome = KINDS[job.spec.kind](problem, job.spec, folder)
    except Exception as error:
        tail = traceback.format_exc().splitlines()[-12:]
        outcome = {"status": "error", "reason": f"{type(error).__name__}: {error}", "traceback": tail, "summary": {}}
    folder.finish(outcome, environment(torch.device(job.spec.device)))


def run_all(
    jobs: Iterable[Job], workers: int, on_done: Callable[[Record], None], *, retry_failed: bool = False
) -> list[Record]:
    """Run what has no record yet and return all records, in the order of the jobs.

    Args:
        jobs: what to run.
        workers: how many processes at a time.
        on_done: called with each record, also those found on disk, as it becomes available.
        retry_failed: run again what ended in an error or a timeout.
    """
    jobs = list(jobs)
    records: dict[str, Record] = {}
    missing = []
    for job in jobs:
        record = read(job.root / job.spec.hash)
        if record is None or (retry_failed and record.status in ("error", "timeout")):
            missing.append(job)
        else:
            records[job.spec.hash] = record
            on_done(record)
    executor: Executor
    stopping = threading.Event()
    with ThreadPoolExecutor(workers) as executor:
        futures = [executor.submit(execute, job, stopping) for job in missing]
        try:
            for future in as_completed(futures):
                record = future.result()
                assert record is not None, "only stopping leaves a run without a record"
                records[record.spec.hash] = record
                on_done(record)
        except BaseException:
            stopping.set()
            executor.shutdown(wait=False, cancel_futures=True)
            for process in mp.active_children():
                _end(process)
            raise
    return [records[job.spec.hash] for job in jobs]


def start_server() -> None:
    """Start the server that CPU runs are forked from, so that its imports overlap with the driver's own."""
    from multiprocessing import forkserver

    _server()
    forkserver.ensure_running()


def _server() -> Any:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["stiefel.compare.preload"])
    return context


def elapsed(start: float) -> str:
    """Time since ``start`` as minutes and seconds."""
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
