"""How much memory a process has needed. Imports ``accelerator``."""

from __future__ import annotations

import sys

import torch

from stiefel.measure.cost.accelerator import memory

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def peak_resident_bytes() -> int | None:
    """Peak resident size of this process so far; None on Windows."""
    if resource is None:
        return None
    # ru_maxrss is in bytes on macOS, in KiB elsewhere.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_allocated_bytes(device: torch.device) -> int | None:
    """Peak memory allocated on a GPU by this process; None where torch does not say."""
    return memory(device, "max_memory_allocated")


def peak_reserved_bytes(device: torch.device) -> int | None:
    """Peak memory that torch reserved there for this process, and that must fit; None where torch does not say."""
    return memory(device, "max_memory_reserved")
