"""What a training step costs: time, memory, energy; and what it ran on. Imports only torch and, for energy, pynvml."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


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
        return [start.elapsed_time(end) / 1e3 for start, end in self._events]

    def total(self) -> float:
        """Seconds over all steps so far; synchronizes a CUDA device."""
        return sum(self.seconds())


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


def peak_resident_bytes() -> int:
    """Peak resident size of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_allocated_bytes(device: torch.device) -> int | None:
    """Peak memory allocated on a GPU by this process; None for other devices."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def gpu_cost(device: torch.device, step: Callable[[], object], *, seconds: float = 3.0) -> dict[str, Any]:
    """Peak memory and energy per step on a GPU; nulls with the reason where there is none.

    Energy is read from NVML's total-energy counter over a window of several seconds, the device exclusive.

    Returns:
        ``gpu_peak_bytes`` (allocated), ``gpu_reserved_bytes``, ``gpu_energy_joules`` per step, and ``gpu_reason``, None
        or why a field is null.
    """
    fields: dict[str, Any] = {"gpu_peak_bytes": None, "gpu_reserved_bytes": None, "gpu_energy_joules": None}
    if device.type != "cuda":
        return fields | {"gpu_reason": no_gpu_reason(device)}
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    fields["gpu_peak_bytes"] = peak_allocated_bytes(device)
    fields["gpu_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        before, count, start = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle), 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            step()
            torch.cuda.synchronize(device)
            count += 1
        joules = (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before) / 1e3
    except Exception as error:  # NVML fails in many ways, and a missing energy must not cost the run
        return fields | {"gpu_reason": f"no energy reading: {type(error).__name__}: {error}"}
    return fields | {"gpu_energy_joules": joules / count, "gpu_reason": None}


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


def cpu_name() -> str:
    """The processor's model."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


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
