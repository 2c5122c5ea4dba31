"""What the process of one run does, from its start to its record. Imports ``quality`` and ``cost``, lazily.

python -m stiefel.compare.worker.main JOB      a job as :mod:`stiefel.compare.driver.process` has pickled it
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import pickle
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from stiefel.compare.record.lock import RunLock
from stiefel.compare.record.run_folder import NO_STORAGE, RunFolder, writing
from stiefel.compare.worker.job import Job
from stiefel.errors import StorageError

TAIL = 12
"""Lines of a traceback, or of what a process printed last, that a record keeps."""


def main(job: Job, claim: RunLock | None = None) -> None:
    """Run a job and write its record; holds the claim until the process ends.

    Where the folder cannot be written the run has not failed: it gets no record; the exit status says why.
    """
    try:
        with writing(job.root):
            _run(job, claim)
    except StorageError as error:
        print(error, file=sys.stderr)
        sys.exit(NO_STORAGE)


def _run(job: Job, claim: RunLock | None) -> None:
    start = time.monotonic()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    folder = RunFolder(job.root, job.spec)
    _divert_output(folder.path / "output.txt")
    # At the timeout the process dumps its stacks and exits: from a C thread, which needs neither driver nor GIL.
    faulthandler.dump_traceback_later(job.timeout, exit=True)
    _restrict(job)
    # None in a new interpreter: it inherits the locked file, and the driver's signature stays.
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
    if int(os.environ.get("RANK", 0)) == 0:  # under torchrun every process gets here, and one writes
        folder.finish(outcome | job.identity, environment(torch.device(job.spec.device)))


def _outcome(job: Job, folder: RunFolder) -> dict[str, Any]:
    from stiefel.compare.problem.load import load_problem
    from stiefel.compare.worker.cost import run_cost
    from stiefel.compare.worker.quality import run_quality

    try:
        problem = load_problem(job.file)(**job.settings)
        return {"quality": run_quality, "cost": run_cost}[job.spec.kind](problem, job.spec, folder)
    except StorageError:  # for main(): not an error of the run
        raise
    except Exception as error:
        status = "out of memory" if _is_memory(error) else "error"
        tail = traceback.format_exc().splitlines()[-TAIL:]
        return {"status": status, "reason": f"{type(error).__name__}: {error}", "traceback": tail, "summary": {}}


def _divert_output(path: Path) -> None:
    """Send what the run prints, and what a crash prints, to a file of its folder."""
    # Append: the processes of torchrun share the file. Redirect descriptors, not sys.stdout: C code writes to them.
    with path.open("a") as stream:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    faulthandler.enable()  # SIGSEGV and the like print the stacks to stderr, now this file


def _restrict(job: Job) -> None:
    """Confine the process to its GPU and its memory; where memory runs out, the kernel is to end it, not the driver."""
    if job.visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = job.visible  # before anything initializes CUDA
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # the maximum: the kernel's first choice
    if job.memory is not None:
        import resource

        # Counts memory that is writable (heap and private mappings), not reserved addresses as RLIMIT_AS does.
        resource.setrlimit(resource.RLIMIT_DATA, (job.memory, job.memory))


def _is_memory(error: BaseException) -> bool:
    """Whether an error says that memory, the host's or a GPU's, is exhausted."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # On the CPU torch raises a plain RuntimeError, which only its text tells apart.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


if __name__ == "__main__":
    main(pickle.loads(Path(sys.argv[1]).read_bytes()))
