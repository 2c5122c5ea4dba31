"""What a measurement ran on: code, libraries, hardware, threads. Imports ``accelerator``."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

from stiefel.measure.cost.accelerator import is_accelerator, name_of


def no_gpu_reason(device: torch.device) -> str:
    """Why GPU fields are null for a run on ``device``."""
    if is_accelerator(device):
        return f"memory is not told by torch, or energy not by NVML, of {device.type} devices"
    if not torch.cuda.is_available():
        return "no CUDA device: torch.cuda.is_available() is False on this machine"
    return f"the run was on {device.type}, not on this machine's GPU; choose the device cuda to measure it"


def environment(device: torch.device) -> dict[str, Any]:
    """What a record needs to say about where it ran: code, libraries, hardware, threads."""
    gpu = name_of(device)
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
    # The file is Linux's, where platform.processor() is often empty.
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
        # Fails in a checkout that is not of this code, such as the user's own.
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], **how)
        # No tags: always the hash, so that records of one commit agree.
        describe = [*git, "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        return subprocess.run(describe, **how).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
