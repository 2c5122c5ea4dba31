"""Where runs go: this machine, or another engine behind :class:`concurrent.futures.Executor`. Imports ``runner``.

Each engine is an extra of its own (``stiefel[dask]``, ``stiefel[ray]``, ``stiefel[submitit]``). It runs
each call in one of its workers, which starts the run's process there; records go to the folder that all machines share.
"""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stiefel.compare.driver.runner import Stop
from stiefel.compare.worker.job import Job
from stiefel.errors import OptionError, nearest_names

Call = Callable[..., Any]


class Remote(Executor):
    """Hands each call to an engine, and waits for it in a thread here.

    Args:
        jobs: calls at a time.
        call: runs a function with its arguments in the engine and returns what it returns.
        close: ends the engine, and what it is running; may be called twice.
    """

    def __init__(self, jobs: int, call: Call, close: Callable[[], object] = lambda: None) -> None:
        self._threads = ThreadPoolExecutor(jobs)
        self._call, self._close = call, close

    def submit(self, fn: Call, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Schedule a call."""
        return self._threads.submit(self._call, fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Close the engine: at once where calls are to be cancelled, else when they have ended."""
        # First the engine: a thread that waits for it cannot be cancelled, but returns when the engine ends the call.
        if cancel_futures:
            self._close()
        self._threads.shutdown(wait=wait, cancel_futures=cancel_futures)
        self._close()


class Local(ThreadPoolExecutor):
    """Processes on this machine, each watched by a thread; cancelling a run ends its process.

    Args:
        jobs: runs at a time.
        devices: the device of each slot, used by one run at a time; None for any.
    """

    def __init__(self, jobs: int, devices: Iterable[str | None] = ()) -> None:
        super().__init__(jobs)
        self._stop = Stop()
        # Last in, first out: cost runs go one by one, so that all of them are timed on the same device.
        self._free: queue.LifoQueue[str | None] = queue.LifoQueue()
        for device in reversed(list(devices) or [None] * jobs):
            self._free.put(device)

    def submit(self, fn: Call, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Schedule a run: a function of a job, of the record that it replaces, and of what ends the run."""
        return super().submit(self._run, fn, *args, **kwargs)

    def _run(self, fn: Call, job: Job, again: float | None) -> Any:
        device = self._free.get()
        try:
            return fn(job if device is None else replace(job, visible=device), again, self._stop)
        finally:
            self._free.put(device)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Start nothing more; end what runs where calls are to be cancelled, else wait for it."""
        # The event comes first: a thread that takes up a queued call meanwhile must not start its process.
        if cancel_futures:
            self._stop.event.set()
            super().shutdown(wait=False, cancel_futures=True)
            self._stop.all()
        super().shutdown(wait=wait)


def local(jobs: int, *, threads: int, folder: Path, device: str, **options: Any) -> Executor:
    """This machine; on CUDA, one GPU for each run."""
    if options:
        raise OptionError(f"--executor local takes no options, got {', '.join(options)}; leave --executor-options out")
    return Local(jobs, gpu_slots(jobs) if device == "cuda" else ())


def gpu_slots(count: int) -> list[str]:
    """The GPU of each of ``count`` runs at a time: the visible ones in turn, as ``CUDA_VISIBLE_DEVICES`` has them."""
    import torch

    # Names, not torch's indices: with CUDA_VISIBLE_DEVICES=2,3 torch's device 0 is GPU 2, and the run must get "2".
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    names = named or [str(i) for i in range(torch.cuda.device_count())]
    return [names[i % len(names)] for i in range(count)]


def dask(jobs: int, *, threads: int, folder: Path, device: str, address: str | None = None, **options: Any) -> Executor:
    """A Dask cluster: the scheduler at ``address``, or ``jobs`` worker processes on this machine."""
    from distributed import Client

    where = {"address": address} if address else {"n_workers": jobs, "threads_per_worker": 1, "dashboard_address": None}
    client = Client(**{**where, **options})
    # A worker runs one call per thread; a cluster at ``address`` has its own number of threads, whatever ``jobs`` is.
    # pure=False: with pure=True Dask may answer a repeated call from the first result, and a retry repeats a call.
    return Remote(jobs, lambda fn, *args: client.submit(fn, *args, pure=False).result(), client.close)


def ray(jobs: int, *, threads: int, folder: Path, device: str, gpus: float = 0, **options: Any) -> Executor:
    """A Ray cluster: the one at ``address``, or one on this machine. Each run asks for its threads and GPUs."""
    import ray

    ray.init(**{"include_dashboard": False, "log_to_driver": False, **options})
    # No retries: a call whose worker died is reported to the driver, not silently run again.
    engine: Any = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=0)
    return Remote(jobs, lambda fn, *args: ray.get(engine(fn).remote(*args)), ray.shutdown)


def submitit(
    jobs: int, *, threads: int, folder: Path, device: str, cluster: str | None = None, **options: Any
) -> Executor:
    """Slurm, or ``cluster="local"``, one job a run; the options are those of submitit's ``update_parameters``."""
    import submitit

    engine = submitit.AutoExecutor(folder=folder / "submitit", cluster=cluster)
    engine.update_parameters(cpus_per_task=threads, **options)
    submitted: list[Any] = []  # Slurm jobs outlive this process unless they are cancelled

    def call(fn: Call, *args: Any) -> Any:
        job = engine.submit(fn, *args)
        submitted.append(job)
        return job.result()

    def cancel() -> None:
        for job in submitted:
            if not job.done():
                job.cancel()

    return Remote(jobs, call, cancel)


@dataclass(frozen=True)
class Engine:
    """An engine by name: what makes its executor, and whether its runs are processes of this machine."""

    make: Callable[..., Executor]
    here: bool = False


EXECUTORS = {"local": Engine(local, here=True), "submitit": Engine(submitit), "dask": Engine(dask), "ray": Engine(ray)}


def engine(name: str) -> Engine:
    """An engine.

    Raises:
        OptionError: unknown name.
    """
    if name not in EXECUTORS:
        raise OptionError(f"--executor {name}: no such executor; {nearest_names(name, EXECUTORS)}")
    return EXECUTORS[name]


def make(
    name: str, jobs: int, *, threads: int, folder: Path, device: str = "cpu", options: dict[str, Any] | None = None
) -> Executor:
    """An executor by name.

    Args:
        name: one of :data:`EXECUTORS`.
        jobs: runs at a time.
        threads: of each run.
        folder: of the records; an engine may keep its logs there.
        device: what the runs compute on.
        options: of the engine.

    Raises:
        OptionError: unknown name, an engine that is not installed or does not start, or options that it does not take.
    """
    found = engine(name)
    try:
        return found.make(jobs, threads=threads, folder=folder.resolve(), device=device, **(options or {}))
    except OptionError:
        raise
    except ModuleNotFoundError as error:
        raise OptionError(f"--executor {name} is not installed: pip install 'stiefel[{name}]' ({error})") from error
    except Exception as error:
        raise OptionError(f"--executor {name} failed to start ({type(error).__name__}: {error})") from error
