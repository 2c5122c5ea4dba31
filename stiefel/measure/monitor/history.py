"""Every number that a training loop logs, and bounded sequences. Imports ``display``'s names, ``linalg``, errors."""

from __future__ import annotations

import math
import numbers
from array import array
from collections import defaultdict
from collections.abc import Iterable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from stiefel.errors import OptionError
from stiefel.linalg import may_wait
from stiefel.measure.cost.accelerator import recorded
from stiefel.measure.monitor.display import RESERVED


class EvenSample:
    """At most ``limit`` entries of a sequence of any length, evenly spread: once full, every other one is dropped."""

    def __init__(self, limit: int) -> None:
        self.limit, self.stride, self.seen = limit, 1, 0
        self.entries: list[Any] = []

    def add(self, entry: Any) -> None:
        """Append an entry, or leave it out."""
        if self.seen % self.stride == 0:
            self.entries.append(entry)
            # What is kept stays at multiples of the stride, so it is evenly spread.
            if len(self.entries) > self.limit:
                self.entries, self.stride = self.entries[::2], 2 * self.stride
        self.seen += 1


class Series:
    """Numbers with their steps, 16 bytes each, thinned as by :class:`EvenSample`, and the newest as it came."""

    def __init__(self, limit: int) -> None:
        self.limit, self.stride, self.seen = limit, 1, 0
        self.steps, self.values = array("q"), array("d")
        self.step, self.newest = -1, math.nan

    def add(self, step: int, number: float) -> None:
        """Append a number, or leave it out."""
        self.step, self.newest = step, number
        if self.seen % self.stride == 0:
            self.steps.append(step)
            self.values.append(number)
            if len(self.steps) > self.limit:
                self.steps, self.values, self.stride = self.steps[::2], self.values[::2], 2 * self.stride
        self.seen += 1


def check(names: Iterable[str]) -> None:
    """Raise an OptionError for a name that is one of the monitor's own."""
    for name in names:
        if name in RESERVED:
            raise OptionError(f"{name!r} is a name of the monitor's own; log it under another, for example 'my_{name}'")


def taken(values: dict[str, Any]) -> dict[str, Any]:
    """Replace values by their current numbers, in place; those on a GPU are copied there, so that no host waits.

    Raises:
        OptionError: a value is not a single real number.
    """
    for name, value in values.items():
        # The common case first: this runs in every step.
        if value.__class__ is not float:
            values[name] = _taken(name, value)
    return values


def _taken(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.numel() == 1 and not value.is_complex():
            return value.item() if may_wait(value) else value.detach().clone()
        came = f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    elif isinstance(value, (int, float)):
        return value
    elif isinstance(value, numbers.Real):
        # A number of numpy, or a fraction.
        return value.item() if hasattr(value, "item") else float(value)
    else:
        came = type(value).__name__
    raise OptionError(f"{name}={came} cannot be logged; give a single real number, for example {name}.mean()")


class Transfer:
    """Numbers of one kind on their way from a GPU, and the names and steps that they belong to."""

    def __init__(self, entries: list[tuple[str, int, Tensor]]) -> None:
        self.entries = [(name, step) for name, step, _ in entries]
        there = torch.stack([value.reshape(()) for *_, value in entries])
        # Pinned, because a copy to pageable memory would make the host wait.
        self._here = torch.empty(there.shape, dtype=there.dtype, pin_memory=True).copy_(there, non_blocking=True)
        self._ready = recorded(there.device)  # reached once the copy, queued before it on this stream, is done

    @property
    def arrived(self) -> bool:
        """Whether the numbers are here, without waiting for them."""
        return self._ready.query()

    def numbers(self) -> list[Any]:
        """The numbers that have arrived."""
        return self._here.tolist()


class History:
    """Every number that was logged, by name, with its step; of more than ``limit`` of a name an evenly spread part.

    A number on a GPU is copied there, and transferred with many others later, so that the host does not wait for it.
    """

    def __init__(self, limit: int = 1_000_000) -> None:
        self._recent: list[tuple[int, dict[str, Any]]] = []  # sorted by name later: a step does as little as it can
        self._waiting: list[tuple[str, int, Tensor]] = []
        self._series: dict[str, Series] = defaultdict(lambda: Series(limit))
        self._far: dict[str, int] = {}  # the step at which a name was logged last from a GPU

    def add(self, step: int, values: dict[str, Any]) -> None:
        """Keep the numbers of a step, as :func:`taken` returns them, in that very dict."""
        self._recent.append((step, values))

    def _sort(self) -> None:
        recent, self._recent = self._recent, []
        for step, values in recent:
            for name, value in values.items():
                if isinstance(value, Tensor):
                    self._waiting.append((name, step, value))
                    self._far[name] = step
                else:
                    self._series[name].add(step, value)

    def names(self, step: int) -> list[str]:
        """Names logged at a step, which must be the last one."""
        self._sort()
        far = [name for name, at in self._far.items() if at == step]
        return far + [name for name, series in self._series.items() if series.step == step and name not in far]

    def numbers(self, step: int, names: Iterable[str]) -> dict[str, Any]:
        """The newest numbers of these names, where they are of this step and on the host."""
        self._sort()
        found = {name: self._series[name] for name in names if name in self._series}
        return {name: series.newest for name, series in found.items() if series.step == step}

    @property
    def waiting(self) -> int:
        """How many numbers wait on a GPU."""
        self._sort()
        return len(self._waiting)

    def send(self) -> list[Transfer]:
        """Start transferring the numbers that wait on a GPU."""
        self._sort()
        # One transfer for each device and dtype, since stacked tensors share both.
        kinds: dict[Any, list[tuple[str, int, Tensor]]] = {}
        for entry in self._waiting:
            kinds.setdefault((entry[2].device, entry[2].dtype), []).append(entry)
        self._waiting = []
        return [Transfer(entries) for entries in kinds.values()]

    def receive(self, transfers: Iterable[Transfer], step: int | None) -> dict[str, Any]:
        """Keep numbers that have arrived; returns those of one step, by name."""
        found = {}
        for transfer in transfers:
            for (name, at), number in zip(transfer.entries, transfer.numbers(), strict=True):
                self._series[name].add(at, number)
                if at == step:
                    found[name] = number
        return found

    def series(self) -> dict[str, list[tuple[int, float]]]:
        """By name, the steps and numbers that are on the host, in the order of steps."""
        self._sort()
        # A name logged sometimes from a GPU and sometimes from the host arrives out of order.
        return {
            name: sorted(zip(series.steps, series.values, strict=True), key=itemgetter(0))
            for name, series in self._series.items()
        }
