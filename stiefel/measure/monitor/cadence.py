"""When a monitor measures and writes: densely at first, then within a share of the training time. Imports nothing."""

from __future__ import annotations

SHARE = 0.006
"""Most that monitoring takes of the training time: half for rows that are measured, half for the others.

It leaves room below 1 % for what a monitor cannot see of itself: the caches that it has emptied. On two busy cores that
was 0.2 to 0.9 % of steps of 17 ms, measured against the same loop without a monitor. What every step takes, 5 to 10 µs
of a loop on a CPU, is counted in the second half, and leads beyond 1 % where steps are shorter than some 1.5 ms.
"""


class Budget:
    """Allows what keeps the time spent within a share of the training time."""

    def __init__(self, share: float) -> None:
        self.share, self.start, self.before, self.spent, self.expected = share, 0.0, 0.0, 0.0, 0.0

    def allows(self, trained: float) -> bool:
        """Whether one more like the last few still fits, after ``trained`` seconds of training."""
        return trained >= self.next

    @property
    def next(self) -> float:
        """Seconds of training from which on it does."""
        return self.start + (self.spent + self.expected) / self.share

    @property
    def total(self) -> float:
        """Seconds spent, those before the last :meth:`restart` too."""
        return self.before + self.spent

    def spend(self, seconds: float) -> None:
        """Account for one that was done."""
        self.spent += seconds
        self.expected = (self.expected + seconds) / 2 if self.expected else seconds

    def restart(self, trained: float) -> None:
        """Owe nothing for what was spent before ``trained`` seconds of training."""
        self.start, self.before, self.spent = trained, self.total, 0.0


class Opening:
    """Allows 20 measurements or more in the first second of training, the denser the earlier, whatever they cost.

    So a training of a tenth of a second is seen to move as well. Where steps are long, each step is measured.
    """

    SECONDS, MEASUREMENTS = 1.0, 20

    def __init__(self) -> None:
        self.taken, self.first, self.due, self.due_step = 0, 0, 0.0, 0

    def allows(self, trained: float, step: int) -> bool:
        """Whether one is due, at this step, after ``trained`` seconds of training."""
        return trained >= self.due or step >= self.due_step

    def take(self, trained: float, step: int) -> None:
        """Account for one that was done."""
        self.first = self.first or step
        self.taken += 1
        # Half the even spacing of those that are left: waiting for a step to end at most doubles it.
        left = max(1, self.MEASUREMENTS + 1 - self.taken)
        self.due = trained + (self.SECONDS - trained) / left / 2
        self.due_step = step + max(1, (step - self.first) // 4)
