"""When to measure and write: densely at first, then within a share of training time. Imports the standard library."""

from __future__ import annotations

import math
from collections.abc import Collection, Set
from enum import Enum

SHARE = 0.006
"""Most that monitoring takes of the training time: half for rows that are measured, half for the others.

It leaves room below 1 % for a cost that a monitor cannot time: the caches that it has evicted. On two busy cores that
was 0.2 to 0.9 % of steps of 17 ms, measured against the same loop without a monitor. What every step takes, 5 to 10 µs
of a loop on a CPU, is counted in the second half, and leads beyond 1 % where steps are shorter than some 1.5 ms.
"""

REFRESH = 0.05
"""Seconds between two looks at what has arrived from the device, and between two states of the live line."""

MOST_WAITING = 1_000
"""Steps after which durations are taken from the clock, and numbers from a device, though no row is due."""


class TimeShare:
    """Keeps overhead below a fixed share of the training time."""

    def __init__(self, share: float) -> None:
        self.share, self.start, self.before, self.spent, self.expected = share, 0.0, 0.0, 0.0, 0.0

    def allows(self, trained: float) -> bool:
        """Whether one more like the last few still fits, after ``trained`` seconds of training."""
        return trained >= self.next

    @property
    def next(self) -> float:
        """Seconds of training from which on one more fits."""
        return self.start + (self.spent + self.expected) / self.share

    @property
    def total(self) -> float:
        """Seconds spent, those before the last :meth:`restart` too."""
        return self.before + self.spent

    def spend(self, seconds: float) -> None:
        """Account for one measurement or row."""
        self.spent += seconds
        # The cost of the next: a running mean in which each older cost counts half as much.
        self.expected = (self.expected + seconds) / 2 if self.expected else seconds

    def restart(self, trained: float) -> None:
        """Start a new account at ``trained`` seconds of training, in which nothing has been spent."""
        self.start, self.before, self.spent = trained, self.total, 0.0


class Opening:
    """Allows 20 measurements or more in the first second of training, the denser the earlier, whatever they cost.

    So a training of a tenth of a second is seen to move as well. Where steps are long, each step is measured.
    """

    SECONDS, MEASUREMENTS = 1.0, 20

    def __init__(self) -> None:
        self.taken, self.first, self.due, self.due_step = 0, 0, 0.0, 0

    def allows(self, trained: float, step: int) -> bool:
        """Whether a measurement is due, at this step, after ``trained`` seconds of training."""
        return trained >= self.due or step >= self.due_step

    def take(self, trained: float, step: int) -> None:
        """Account for one measurement."""
        self.first = self.first or step
        self.taken += 1
        # Half of an even spacing of those left: a measurement waits for the end of a step, which may double it.
        left = max(1, self.MEASUREMENTS + 1 - self.taken)
        self.due = trained + (self.SECONDS - trained) / left / 2
        self.due_step = step + max(1, (step - self.first) // 4)


class Due(Enum):
    """What a step is due: nothing, a row, a row with a name that the step before did not have, a measured row."""

    NOTHING, ROW, NEW, MEASURED = range(4)


class Cadence:
    """Decides what is due at a step.

    Args:
        every: measure each so many steps, or None for what the share allows.
        step: steps taken before.
        by_clock: whether something may be due whatever the step: a live line, or what has arrived from a device.
    """

    def __init__(self, every: int | None, step: int, *, by_clock: bool) -> None:
        self.every, self._by_clock = every, by_clock
        self.trained = 0.0  # seconds in steps whose durations have arrived
        self.measuring, self.writing = TimeShare(SHARE / 2), TimeShare(SHARE / 2)
        self.opening = Opening() if every is None else None  # until it is over
        self.measured_at: int | None = None
        self.shown = 0.0  # when the live line was last shown
        self._names: frozenset[str] = frozenset()  # of the numbers of the last step
        self._names_step = step
        self._names_at: dict[str, int] = {}  # the last step with each name, those of _names left out
        self._due_trained = self._due_step = self._due_clock = 0.0

    # --- what is due ---

    def idle(self, step: int, now: float, names: Set[str]) -> bool:
        """Whether nothing is due; a step at which nothing is costs no more than these comparisons."""
        return (
            self.trained < self._due_trained
            and step < self._due_step
            and now < self._due_clock
            and names == self._names
        )

    def due(self, step: int, names: Collection[str], *, looked: bool, ahead: bool) -> Due:
        """What is due at a step that logs these names, which are noted.

        Args:
            step: the one just taken.
            names: of its numbers.
            looked: whether the step was probed, and so has to be measured.
            ahead: whether steps to probe are chosen before they begin: then no other is measured, unless by ``every``.
        """
        measure = looked or (self.measures(step) and (self.every is not None or not ahead))
        new = self._has_new(step, names)
        if measure:
            return Due.MEASURED
        if new:
            return Due.NEW
        return Due.ROW if self.every is None and self.writing.allows(self.trained) else Due.NOTHING

    def measures(self, step: int) -> bool:
        """Whether a step is to be measured."""
        if self.measured_at is None:
            return True
        if step == self.measured_at:
            return False
        if self.every:
            return step % self.every == 0
        dense = self.opening is not None and self.opening.allows(self.trained, step)
        return dense or self.measuring.allows(self.trained)

    def looks(self, step: int) -> bool:
        """Whether to probe the next step, which then is not timed: never two in a row, unless ``every`` asks for it."""
        return self.measures(step + 1) and (self.every is not None or self.measured_at != step)

    def shows(self, now: float) -> bool:
        """Whether the live line is due."""
        return now >= self.shown + REFRESH and (self.every is not None or self.writing.allows(self.trained))

    def sends(self, waiting: int) -> bool:
        """Whether enough numbers wait on a device to be transferred although no row needs them."""
        return waiting >= MOST_WAITING

    def plan(self, step: int, now: float) -> None:
        """Determine until when nothing is due."""
        if self.opening is not None and self.trained >= Opening.SECONDS:
            self.opening = None
            self.measuring.restart(self.trained)
            self.writing.restart(self.trained)
        self._due_step = step + MOST_WAITING
        if self.every is None:
            self._due_trained = min(self.measuring.next, self.writing.next)
        else:
            self._due_trained = math.inf
            self._due_step = min(self._due_step, (step // self.every + 1) * self.every)
        self._due_clock = now + REFRESH if self._by_clock else math.inf
        if self.opening is not None:
            self._due_clock = now  # each step is checked

    def _has_new(self, step: int, names: Collection[str]) -> bool:
        self._names_at |= dict.fromkeys(self._names, self._names_step)
        self._names, self._names_step = frozenset(names), step
        # New is a name that was not logged at the step before, such as a metric of every epoch.
        return any(self._names_at.get(name, -1) < step - 1 for name in names)

    # --- what was done ---

    def idled(self, step: int, seconds: float) -> None:
        """Account for a step at which nothing was due."""
        self._names_step = step  # idle() has compared the names
        self.writing.spent += seconds

    def measured(self, step: int) -> None:
        """Note which step was measured last."""
        self.measured_at = step
        if self.opening is not None:
            self.opening.take(self.trained, step)

    def spend(self, due: Due, seconds: float) -> None:
        """Account for a row."""
        (self.measuring if due is Due.MEASURED else self.writing).spend(seconds)

    def looked(self, seconds: float, usual: float) -> None:
        """Account for a step that was probed: its time minus the usual step time is the probe's cost."""
        self.measuring.spend(max(0.0, seconds - usual))
        self.trained += min(seconds, usual)

    @property
    def spent(self) -> float:
        """Seconds that measuring and writing have taken so far."""
        return self.measuring.total + self.writing.total

    @property
    def overhead(self) -> float:
        """The seconds spent as a share of the time in steps; 0 before the first."""
        return self.spent / self.trained if self.trained else 0.0

    @property
    def later_overhead(self) -> float | None:
        """The same after the first second; None in it, and with ``every``."""
        start = self.measuring.start
        later = self.trained - start
        return (self.measuring.spent + self.writing.spent) / later if start and later else None
