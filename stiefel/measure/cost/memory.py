"""How much memory a process has needed. Imports torch alone."""

from __future__ import annotations

import sys

import torch

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
    """Peak memory allocated on a GPU by this process; None for other devices."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def peak_reserved_bytes(device: torch.device) -> int | None:
    """Peak memory that torch reserved on a GPU for this process, and that must fit there; None for other devices."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
