"""Where runs go: this machine, or another engine behind :class:`concurrent.futures.Executor`. Imports the errors.

Each engine is an extra of its own (``stiefel[dask]``, ``stiefel[ray]``, ``stiefel[submitit]``). A call that it gets
runs in one of its workers, which starts the run's process there; records land in the folder that all machines share.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
        """Let the engine go, at once where calls are to be cancelled, else when they have ended."""
        if cancel_futures:
            self._close()
        self._threads.shutdown(wait=wait, cancel_futures=cancel_futures)
        self._close()


def local(jobs: int, **options: Any) -> Executor:
    """Processes on this machine, watched by threads."""
    if options:
        raise OptionError(f"--executor local takes no options, got {', '.join(options)}")
    return ThreadPoolExecutor(jobs)


def dask(jobs: int, *, threads: int, folder: Path, address: str | None = None, **options: Any) -> Executor:
    """A Dask cluster: the scheduler at ``address``, or ``jobs`` worker processes on this machine."""
    from distributed import Client

    where = {"address": address} if address else {"n_workers": jobs, "threads_per_worker": 1, "dashboard_address": None}
    client = Client(**{**where, **options})
    # A worker of a larger cluster runs one call a thread: its owner decides how many threads it has.
    return Remote(jobs, lambda fn, *args: client.submit(fn, *args, pure=False).result(), client.close)


def ray(jobs: int, *, threads: int, folder: Path, gpus: float = 0, **options: Any) -> Executor:
    """A Ray cluster: the one at ``address``, or one on this machine. Each run asks for its threads and GPUs."""
    import ray

    ray.init(**{"include_dashboard": False, "log_to_driver": False, **options})
    engine: Any = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=0)
    return Remote(jobs, lambda fn, *args: ray.get(engine(fn).remote(*args)), ray.shutdown)


def submitit(jobs: int, *, threads: int, folder: Path, cluster: str | None = None, **options: Any) -> Executor:
    """Slurm, or ``cluster="local"``, one job a run; the options are those of submitit's ``update_parameters``."""
    import submitit

    engine = submitit.AutoExecutor(folder=folder / "submitit", cluster=cluster)
    engine.update_parameters(cpus_per_task=threads, **options)
    submitted: list[Any] = []

    def call(fn: Call, *args: Any) -> Any:
        job = engine.submit(fn, *args)
        submitted.append(job)
        return job.result()

    def cancel() -> None:
        for job in submitted:
            if not job.done():
                job.cancel()

    return Remote(jobs, call, cancel)


EXECUTORS: dict[str, Callable[..., Executor]] = {"local": local, "submitit": submitit, "dask": dask, "ray": ray}


def make(name: str, jobs: int, threads: int, folder: Path, options: dict[str, Any]) -> Executor:
    """An executor by name.

    Args:
        name: one of :data:`EXECUTORS`.
        jobs: runs at a time.
        threads: of each run.
        folder: of the records; an engine may keep its logs there.
        options: of the engine.

    Raises:
        OptionError: unknown name, an engine that is not installed or does not start, or options that it does not take.
    """
    if name not in EXECUTORS:
        raise OptionError(f"--executor {name}: {nearest_names(name, EXECUTORS)}")
    if name == "local":
        return local(jobs, **options)
    try:
        return EXECUTORS[name](jobs, threads=threads, folder=folder.resolve(), **options)
    except ModuleNotFoundError as error:
        raise OptionError(f"--executor {name} needs its extra: pip install 'stiefel[{name}]' ({error})") from error
    except Exception as error:
        raise OptionError(f"--executor {name} does not start: {type(error).__name__}: {error}") from error
