"""What a training step costs: time, memory, energy, FLOPs; and what it ran on.

Imports ``flops``, torch and, for energy, pynvml.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from stiefel.errors import UncountedOperatorError
from stiefel.measure.flops import count

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample, in the sample's unit, and its size."""

    median: float
    q1: float
    q3: float
    n: int

    @classmethod
    def of(cls, sample: list[float]) -> Spread:
        """Summarize a sample of at least one number."""
        q = torch.tensor(sample, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
        return cls(median=q[1].item(), q1=q[0].item(), q3=q[2].item(), n=len(sample))


class StepClock:
    """Times steps on a device: an event pair per step on CUDA, read once at the end; ``perf_counter`` on the CPU.

    with clock:
        one_step()
    seconds = clock.seconds()
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cpu: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> StepClock:
        if self.device.type == "cuda":
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record(torch.cuda.current_stream(self.device))
            self._events.append(pair)
        else:
            self._cpu.append(-time.perf_counter())
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            self._events[-1][1].record(torch.cuda.current_stream(self.device))
        else:
            self._cpu[-1] += time.perf_counter()

    def seconds(self) -> list[float]:
        """Duration of each step so far."""
        if self.device.type != "cuda":
            return list(self._cpu)
        torch.cuda.synchronize(self.device)
        return [_elapsed(pair) for pair in self._events]

    def total(self) -> float:
        """Seconds over all steps so far; synchronizes a CUDA device."""
        return sum(self.seconds())

    def drain(self, *, wait: bool = False) -> list[float]:
        """Durations of the steps that have ended on the device, oldest first, which the clock then forgets.

        Args:
            wait: for the device, so that no step is left.
        """
        if self.device.type != "cuda":
            ended, self._cpu = self._cpu, []
            return ended
        if wait:
            torch.cuda.synchronize(self.device)
        ready = 0
        while ready < len(self._events) and self._events[ready][1].query():
            ready += 1
        ended, self._events = [_elapsed(pair) for pair in self._events[:ready]], self._events[ready:]
        return ended

    def last(self) -> float:
        """Duration of the last step, on the CPU."""
        return self._cpu[-1]

    def discard(self) -> None:
        """Forget the last step."""
        (self._events if self.device.type == "cuda" else self._cpu).pop()


def _elapsed(pair: tuple[torch.cuda.Event, torch.cuda.Event]) -> float:
    return pair[0].elapsed_time(pair[1]) / 1e3


def interleaved(
    steps: Mapping[str, Callable[[], object]], device: torch.device, *, warmup: int, repeats: int
) -> dict[str, Spread]:
    """Time several kinds of step in turn, so that what disturbs the machine disturbs all alike.

    Args:
        steps: what to time, by name.
        device: where they run.
        warmup: untimed rounds.
        repeats: timed rounds.

    Returns:
        Seconds of each, by name.
    """
    clocks = {name: StepClock(device) for name in steps}
    for _ in range(warmup):
        for step in steps.values():
            step()
    for _ in range(repeats):
        for name, step in steps.items():
            with clocks[name]:
                step()
    return {name: Spread.of(clock.seconds()) for name, clock in clocks.items()}


def peak_resident_bytes() -> int | None:
    """Peak resident size of this process so far; None on Windows."""
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_allocated_bytes(device: torch.device) -> int | None:
    """Peak memory allocated on a GPU by this process; None for other devices."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def peak_reserved_bytes(device: torch.device) -> int | None:
    """Peak memory that torch reserved on a GPU for this process, what must fit; None for other devices."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


class EnergyMeter:
    """Energy that a GPU has used since the meter was made, from the counter of the whole board (NVML, in mJ).

    It counts what the board uses idle, and for other processes: the device must be exclusive, and the window several
    seconds, for the counter advances in steps of some 0.1 s.

    ``reason`` is None, or why there is no reading.
    """

    def __init__(self, device: torch.device) -> None:
        self.reason: str | None = no_gpu_reason(device) if device.type != "cuda" else None
        self._read: Callable[[], int] | None = None
        if self.reason is None:
            try:
                self._read = _energy_counter(device)
                self._start = self._read()
            except Exception as error:  # NVML fails in many ways, and a missing energy must not cost the run
                self._fail(error)

    def joules(self) -> float | None:
        """Joules since the start; None where there is no reading. On a GPU, of the work that has ended."""
        if self._read is None:
            return None
        try:
            return (self._read() - self._start) / 1e3
        except Exception as error:
            self._fail(error)
            return None

    def _fail(self, error: Exception) -> None:
        self._read, self.reason = None, f"no energy reading: {type(error).__name__}: {error}"


def _energy_counter(device: torch.device) -> Callable[[], int]:
    import pynvml

    pynvml.nvmlInit()
    # By UUID: NVML's numbers are those of the machine, torch's those that CUDA_VISIBLE_DEVICES leaves.
    handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)


def gpu_cost(device: torch.device, step: Callable[[], object], *, seconds: float = 3.0) -> dict[str, Any]:
    """Peak memory and energy per step on a GPU; nulls with the reason where there is none.

    Args:
        device: where the step runs, the device exclusive.
        step: the training step.
        seconds: window over which the energy is read.

    Returns:
        ``gpu_peak_bytes`` (allocated), ``gpu_reserved_bytes``, ``gpu_energy_joules`` per step, and ``gpu_reason``, None
        or why a field is null.
    """
    fields: dict[str, Any] = {"gpu_peak_bytes": None, "gpu_reserved_bytes": None, "gpu_energy_joules": None}
    if device.type != "cuda":
        return fields | {"gpu_reason": no_gpu_reason(device)}
    step()  # state of the optimizer and workspaces are there from now on
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    fields["gpu_peak_bytes"] = peak_allocated_bytes(device)
    fields["gpu_reserved_bytes"] = peak_reserved_bytes(device)
    meter, steps, start = EnergyMeter(device), 0, time.perf_counter()
    while meter.reason is None and time.perf_counter() - start < seconds:
        step()
        torch.cuda.synchronize(device)
        steps += 1
    joules = meter.joules()
    return fields | {
        "gpu_energy_joules": joules / steps if joules is not None and steps else None,
        "gpu_reason": meter.reason,
    }


def computed(step: Callable[[], object]) -> dict[str, Any]:
    """What a step computes, for a record; nulls with the reason where an operator cannot be counted.

    Returns:
        ``matmul_flops``, ``factorization_flops``, ``operators`` (:func:`stiefel.measure.flops.count`), and
        ``flops_reason``, None or why the others are null.
    """
    try:
        found = count(step)
    except UncountedOperatorError as error:
        return {"matmul_flops": None, "factorization_flops": None, "operators": None, "flops_reason": str(error)}
    return {
        "matmul_flops": found.matmul_flops,
        "factorization_flops": found.factorization_flops,
        "operators": found.operators,
        "flops_reason": None,
    }


def step_cost(
    step: Callable[[], object], device: torch.device, *, warmup: int = 20, repeats: int = 20, seconds: float = 3.0
) -> dict[str, Any]:
    """All that one kind of step costs, as plain data for a record: time, memory, energy, FLOPs, operators.

    The step runs ``warmup + repeats`` times and once to be counted; on a GPU, ``seconds`` more for its energy. A ratio
    to another kind of step is better taken by :func:`interleaved`.

    Args:
        step: the training step.
        device: where it runs.
        warmup: untimed steps.
        repeats: timed steps; 0 leaves ``seconds_per_step`` out.
        seconds: window over which a GPU's energy is read.

    Returns:
        ``seconds_per_step`` (median, q1, q3, n), the fields of :func:`computed` and of :func:`gpu_cost`, and
        ``peak_resident_bytes`` of this process so far.
    """
    timed = interleaved({"step": step}, device, warmup=warmup, repeats=repeats) if repeats else {}
    return {
        **({"seconds_per_step": asdict(timed["step"])} if timed else {}),
        **computed(step),
        **gpu_cost(device, step, seconds=seconds),
        "peak_resident_bytes": peak_resident_bytes(),
    }


def no_gpu_reason(device: torch.device) -> str:
    """Why GPU fields are null for a run on ``device``."""
    if not torch.cuda.is_available():
        return "no CUDA device: torch.cuda.is_available() is False on this machine"
    return f"the run was asked for on {device.type}, not on the GPU of this machine"


def environment(device: torch.device) -> dict[str, Any]:
    """What a record needs to say about where it ran: code, libraries, hardware, threads."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "stiefel": _version("stiefel"),
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "geoopt", "numpy", "scipy")},
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "gpu": gpu,
        "gpu_reason": None if gpu else no_gpu_reason(device),
    }


@cache
def cpu_name() -> str:
    """The processor's model."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def _commit() -> str | None:
    """The commit of the code that runs, with ``+`` where the tree has changes; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    how: dict[str, Any] = {"capture_output": True, "text": True, "check": True, "timeout": 5}
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], **how)  # not the user's own checkout
        describe = [*git, "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        return subprocess.run(describe, **how).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def as_dict(spreads: dict[str, Spread]) -> dict[str, dict[str, float]]:
    """Spreads as plain data, for a record."""
    return {name: asdict(spread) for name, spread in spreads.items()}
