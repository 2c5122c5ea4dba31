"""Devices other than the CPU, whatever their kind: events, waits, memory, names. Imports torch, errors."""

from __future__ import annotations

from typing import Any

import torch

from stiefel.errors import OptionError


def is_accelerator(device: torch.device) -> bool:
    """Whether work is queued on a device while the host goes on."""
    return device.type not in ("cpu", "meta")


def device_of(name: str, *, here: bool = True) -> torch.device:
    """A device by its name, ``"auto"`` for this machine's accelerator, or the CPU where it has none.

    Args:
        name: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"xpu"``, ``"mps"``, …
        here: whether it has to be on this machine.

    Raises:
        OptionError: torch knows no such device, or this machine has none.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        there = not is_accelerator(device) or torch.get_device_module(device).is_available()
    except (RuntimeError, AttributeError) as error:
        raise OptionError(f"--device {name}: torch knows no such device; use cpu, cuda, xpu, mps, or auto") from error
    if device.type == "meta" or (here and not there):
        raise OptionError(f"--device {name}: there is no such device on this machine; use --device cpu, or auto")
    return device


def count_of(device: torch.device) -> int:
    """How many devices of a kind this machine has."""
    return int(torch.get_device_module(device).device_count())


def recorded(device: torch.device, *, timing: bool = False) -> torch.Event:
    """An event that the device reaches when it has done what is queued now."""
    event = torch.Event(device, enable_timing=timing)
    event.record(torch.accelerator.current_stream(device))
    return event


def synchronize(device: torch.device) -> None:
    """Wait for all that is queued on a device."""
    torch.accelerator.synchronize(device)


def memory(device: torch.device, what: str) -> int | None:
    """``"max_memory_allocated"`` or ``"max_memory_reserved"`` of this process, in bytes; None where it is not known."""
    return _asked(device, what)


def reset_peaks(device: torch.device) -> None:
    """Let the peaks begin anew."""
    _asked(device, "reset_peak_memory_stats")


def name_of(device: torch.device) -> str | None:
    """What the device is called; None for a CPU."""
    if not is_accelerator(device):
        return None
    return _asked(device, "get_device_name") or device.type


def _asked(device: torch.device, function: str) -> Any:
    if not is_accelerator(device):
        return None
    # Not every backend has every function, and some raise where they have it.
    found = getattr(torch.get_device_module(device), function, None)
    try:
        return None if found is None else found(device)
    except (RuntimeError, NotImplementedError, AssertionError):
        return None
