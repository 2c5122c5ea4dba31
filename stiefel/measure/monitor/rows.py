"""Rows of a monitor, kept and on their way to sinks, and how long steps took. Imports ``history`` and ``sinks``."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from stiefel.measure.monitor.history import EvenSample, History, Transfer
from stiefel.measure.monitor.sinks import Row, Sink

FLUSH = 1.0
"""At most so many seconds of rows are lost if the process is killed; marked rows are flushed at once."""


@dataclass
class Pending:
    """Numbers on their way from the device, and the row, if any, that waits for them."""

    transfers: list[Transfer]
    row: Row = field(default_factory=dict)
    names: tuple[str, ...] = ()
    marked: bool = False


class Durations:
    """Seconds that steps took, in order, as far as they have arrived; an even sample of many."""

    def __init__(self, step: int) -> None:
        self.told = step  # the last step whose duration is known
        self.looked: set[int] = set()  # steps that were probed, and so not timed
        self._sample = EvenSample(5_000)
        self._recent: dict[int, float] = {}  # what a row may still ask for

    def add(self, seconds: float) -> bool:
        """Take the duration of the next step; returns whether it is kept, as it is unless the step was probed."""
        self.told += 1
        if self.told in self.looked:
            self.looked.remove(self.told)
            return False
        self._recent[self.told] = seconds
        self._sample.add((self.told, seconds))
        return True

    def of(self, step: int) -> float | None:
        """Seconds of a step, for its row; None if it was not timed."""
        return self._recent.get(step)

    def forget(self, step: int) -> None:
        """Forget, for rows, all steps but this one."""
        self._recent = {kept: seconds for kept, seconds in self._recent.items() if kept == step}

    @property
    def entries(self) -> list[tuple[int, float]]:
        """Steps and their seconds."""
        return self._sample.entries

    @property
    def usual(self) -> float | None:
        """The median of the last few; None of none."""
        recent = sorted(seconds for _, seconds in self._sample.entries[-50:])
        return recent[len(recent) // 2] if recent else None


class Rows:
    """Rows that wait for the device in order, go to the sinks, and are kept: of many an even sample.

    A *marked* row is one that has to be seen: it is flushed at once, and not thinned together with the others.

    Args:
        sinks: where they go.
        step: steps taken before.
        limit: how many are kept, of marked ones and of others.
    """

    def __init__(self, sinks: Iterable[Sink], step: int, limit: int = 10_000) -> None:
        self.durations, self.history = Durations(step), History()
        self.latest: Row = {}  # the last that has arrived
        self._sinks = list(sinks)
        self._plain, self._marked = EvenSample(limit), EvenSample(limit)
        self._pending: deque[Pending] = deque()
        self._flushed = 0.0

    def begin(self, row: Row, names: Collection[str], *, marked: bool) -> Pending:
        """Add the numbers of these names at its step to a row, and start transferring those that wait on a device."""
        row |= dict.fromkeys(names)  # None until they arrive; this fixes their order in the row
        pending = Pending(self.history.send(), row, tuple(names), marked)
        row |= self.history.numbers(row["step"], names)
        return pending

    def add(self, pending: Pending) -> None:
        """Let a row wait behind the others."""
        self._pending.append(pending)

    def send(self) -> None:
        """Start transferring the numbers that wait on a device, though no row needs them."""
        self.add(Pending(self.history.send()))

    def deliver(self, step: int, *, timed: bool, wait: bool = False) -> None:
        """Keep the numbers that have arrived, and deliver the rows that are complete.

        Args:
            step: the one just taken.
            timed: whether steps are timed, so that a row waits for its step's duration.
            wait: whether to wait for the numbers.
        """
        while self._pending:
            pending = self._pending[0]
            arrived = wait or all(transfer.arrived for transfer in pending.transfers)
            # In order: a row that is not complete holds back those behind it.
            if not arrived or (pending.row and timed and self.durations.told < pending.row["step"]):
                return
            self._pending.popleft()
            numbers = self.history.receive(pending.transfers, pending.row.get("step"))
            if pending.row:
                self._complete(pending, numbers)
        self.durations.forget(step)

    def _complete(self, pending: Pending, numbers: dict[str, Any]) -> None:
        row = self.latest = pending.row
        row["seconds"] = self.durations.of(row["step"])
        # A name's newest number may be of a later step, logged from the host while this one was on its way.
        row |= self.history.numbers(row["step"], pending.names) | {n: numbers[n] for n in pending.names if n in numbers}
        kind = self._marked if pending.marked else self._plain
        kind.add((self._plain.seen + self._marked.seen, row))
        for sink in self._sinks:
            sink.write(row)
        now = time.perf_counter()
        if pending.marked or now > self._flushed + FLUSH:  # a flush costs more than the row
            self._flushed = now
            for sink in self._sinks:
                sink.flush()

    @property
    def kept(self) -> list[Row]:
        """Those that were delivered, in order."""
        return [row for _, row in sorted(self._plain.entries + self._marked.entries, key=lambda entry: entry[0])]

    def close(self) -> None:
        """Close the sinks, which open again by themselves."""
        for sink in self._sinks:
            sink.close()
