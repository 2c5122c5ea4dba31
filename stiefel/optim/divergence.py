"""Telling of NaN and infinite steps without making the host wait for a device. Imports torch and the errors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stiefel.errors import DivergenceError


@dataclass(frozen=True, eq=False)
class _Flag:
    """A flag on its way from a device, true where all is well, and what to say where it is not."""

    value: Tensor
    arrived: torch.cuda.Event
    message: Callable[[], str]


class _Flags(threading.local):
    def __init__(self) -> None:
        self.pending: list[_Flag] = []


_flags = _Flags()


def raise_later(finite: Tensor, message: Callable[[], str]) -> None:
    """Have :func:`raise_pending` raise a :class:`DivergenceError` with that message, made then, if the flag is false.

    Reading a flag at once would make the host wait for everything that the device still has to do. It is copied while
    both go on, and looked at before the next step, or one of those after it.
    """
    value = torch.empty((), dtype=torch.bool, pin_memory=True)
    value.copy_(finite, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(finite.device))
    _flags.pending.append(_Flag(value, arrived, message))


def raise_pending() -> None:
    """Raise for the flags that have arrived and are false.

    Raises:
        DivergenceError: with the message of the first of them.
    """
    arrived = [flag for flag in _flags.pending if flag.arrived.query()]
    _flags.pending = [flag for flag in _flags.pending if flag not in arrived]
    for flag in arrived:
        if not flag.value:
            _flags.pending = []
            raise DivergenceError(flag.message())
