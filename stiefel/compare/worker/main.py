"""What the process of one run does, from its start to its record. Imports ``quality`` and ``cost``, lazily.

python -m stiefel.compare.worker.main JOB REPORT CLAIM      a job as JSON, and two file descriptors of its driver's
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import signal
import sys
import time
import traceback
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from stiefel.compare.record.lock import RunLock
from stiefel.compare.record.records import BROKEN
from stiefel.compare.record.run_folder import RunFolder
from stiefel.compare.worker.job import Job
from stiefel.compare.worker.supervise import Say, supervise
from stiefel.errors import StorageError

TAIL = 12
"""Lines of a traceback, or of what a process printed last, that a record keeps."""
LATE = 60.0
"""Seconds after its timeout, which counts from its imports, until a process is ended from outside."""


def main(text: str, report: Connection, claim: RunLock | None = None) -> None:
    """Supervise a run: it writes its record; how it ended goes to the driver. Holds the claim until both have ended."""
    job = Job.from_json(text)
    output = RunFolder(job.root, job.spec).path / "output.txt"
    work = partial(_run, job, claim) if job.processes == 1 else partial(_torchrun, job, text)
    supervise(work, output=output, report=report, seconds=job.timeout + LATE)


def _torchrun(job: Job, text: str, _: Say) -> None:
    command = ["torch.distributed.run", "--standalone", f"--nproc-per-node={job.processes}"]
    os.execv(sys.executable, [sys.executable, "-m", *command, "-m", "stiefel.compare.worker.main", text])


def _run(job: Job, claim: RunLock | None, say: Say) -> None:
    """Run a job and write its record.

    Where the folder cannot be written the run has not failed: it gets no record, and the driver is told why.
    """
    folder = RunFolder(job.root, job.spec)
    try:
        outcome, environment = _measured(job, claim, folder)
        if int(os.environ.get("RANK", 0)) == 0:  # under torchrun every process gets here, and one writes
            folder.finish(outcome | job.identity, environment)
        elif outcome["status"] in BROKEN:  # torchrun then ends the others, which may wait for this one
            sys.exit("\n".join(outcome["traceback"]))
    except StorageError as error:
        say(storage=str(error)[:2000])
        raise


def _measured(job: Job, claim: RunLock | None, folder: RunFolder) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a record says of the run and of where it ran."""
    start = time.monotonic()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    # At the timeout the process dumps its stacks and exits: from a C thread, which needs neither driver nor GIL.
    faulthandler.enable()  # SIGSEGV and the like print the stacks too
    faulthandler.dump_traceback_later(job.timeout, exit=True)
    confine(job.memory, job.visible)
    if claim is not None:
        claim.sign()

    # After the timer is set and the GPU chosen: in a new interpreter torch is imported only now, which takes seconds.
    import torch

    from stiefel.measure.cost.environment import environment

    torch.set_num_threads(job.threads)
    gc.freeze()  # collections skip what was imported, and stay short
    outcome = _outcome(job, folder)
    faulthandler.cancel_dump_traceback_later()  # the run has its result: writing it is no longer limited
    outcome["wall_seconds"] = time.monotonic() - start
    return outcome, environment(torch.device(job.spec.device))


def _outcome(job: Job, folder: RunFolder) -> dict[str, Any]:
    from stiefel.compare.problem.load import load_problem
    from stiefel.compare.worker.cost import run_cost
    from stiefel.compare.worker.quality import run_quality

    try:
        problem = load_problem(job.file)(**job.settings)
        return {"quality": run_quality, "cost": run_cost}[job.spec.kind](problem, job.spec, folder)
    except StorageError:  # for main(): not an error of the run
        raise
    except BaseException as error:  # also sys.exit(): whatever the user's code raises is an error of this run alone
        status = "out of memory" if _is_memory(error) else "error"
        return {"status": status, "reason": named(error), "traceback": _stack(error), "summary": {}}


def named(error: BaseException) -> str:
    """An error's kind and message; one whose message fails too has its kind."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception as other:
        return f"{type(error).__name__}, whose message fails with {type(other).__name__}"


def _stack(error: BaseException) -> list[str]:
    """The last lines of a traceback."""
    return "".join(traceback.format_exception(error)).splitlines()[-TAIL:]


def confine(memory: int | None, visible: str | None = None) -> None:
    """Confine this process to a GPU and a memory; where memory runs out, the kernel is to end it, not the driver."""
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible  # before anything initializes CUDA
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # the maximum: the kernel's first choice
    if memory is not None:
        import resource

        # Counts memory that is writable (heap and private mappings), not reserved addresses as RLIMIT_AS does.
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))


def _is_memory(error: BaseException) -> bool:
    """Whether an error says that memory, the host's or a GPU's, is exhausted."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # On the CPU torch raises a plain RuntimeError, which only its text tells apart.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


if __name__ == "__main__":
    job_text, *descriptors = sys.argv[1:]
    if descriptors:
        reports, held = map(int, descriptors)
        main(job_text, Connection(reports, readable=False), RunLock(held))
    else:  # one of the processes under torchrun, whose supervisor is above that
        _run(Job.from_json(job_text), None, lambda **facts: None)
