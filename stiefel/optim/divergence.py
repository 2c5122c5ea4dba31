"""Errors for NaN and infinite steps that do not make the host wait for a device. Imports torch and the errors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stiefel.errors import DivergenceError


@dataclass(frozen=True, eq=False)
class _Flag:
    """A flag on its way from a device, true if all values are finite, and the error message for a false one."""

    value: Tensor
    arrived: torch.Event
    message: Callable[[], str]


class _Flags(threading.local):
    def __init__(self) -> None:
        self.pending: list[_Flag] = []


# One list per thread, so that an error is raised in the thread whose training diverged.
_flags = _Flags()


def raise_later(finite: Tensor, message: Callable[[], str]) -> None:
    """Register a flag for :func:`raise_pending`, which raises a :class:`DivergenceError` if the flag is false.

    Reading a flag at once would make the host wait for all work queued on the device. It is copied asynchronously and
    read before the next step, or one of those after it; the message is made only if it is false.
    """
    if finite.is_meta:
        return  # without values
    # Pinned, because a copy to pageable memory would make the host wait after all.
    value = torch.empty((), dtype=torch.bool, pin_memory=True)
    value.copy_(finite, non_blocking=True)
    arrived = torch.Event(finite.device)
    arrived.record(torch.accelerator.current_stream(finite.device))
    _flags.pending.append(_Flag(value, arrived, message))


def raise_pending() -> None:
    """Raise for the flags that have arrived and are false.

    Raises:
        DivergenceError: with the message of the first of them.
    """
    # query() does not wait: a copy that is still under way is left for a later step.
    arrived = [flag for flag in _flags.pending if flag.arrived.query()]
    _flags.pending = [flag for flag in _flags.pending if flag not in arrived]
    for flag in arrived:
        if not flag.value:
            _flags.pending = []  # one error is enough
            raise DivergenceError(flag.message())
