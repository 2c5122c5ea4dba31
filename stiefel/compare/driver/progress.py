"""Progress of a comparison: a bar in a terminal, a line now and then in a log. Imports rich."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from stiefel.compare.record.records import ENDED

if TYPE_CHECKING:
    from stiefel.compare.record.records import Record

_WORDS = {
    "tuning": "tuning",
    "extend": "tuning, closer",
    "refine": "tuning, closer",
    "race": "best choices again",
    "final": "reported runs",
    "cost": "cost of a step",
}
"""Stages as people read of them; consecutive ones of one name are one stage, whose total grows."""
LOOKS = 5.0, 30.0
"""Seconds between estimates of what is left in a terminal, and between lines in a log."""


class Progress:
    """What is done, and how long the rest may take.

    Args:
        left: the seconds that the rest of the comparison may take, or None; asked now and then.
    """

    def __init__(self, left: Callable[[], float | None] = lambda: None) -> None:
        self.live = sys.stdout.isatty()
        self._left, self._start = left, time.monotonic()
        self._due, self._rest = self._start + self._pause(), ""
        self._stage: _Stage | None = None
        self.bars = Bars(
            TextColumn("{task.description:>18}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
            console=Console(),
            disable=not self.live,
        )

    def __enter__(self) -> Progress:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        self.bars.stop()

    def stage(self, name: str, total: int) -> Callable[[Record], None]:
        """Begin a stage of the plan, or the next round of the one that is going on; returns what takes each record."""
        words = _WORDS.get(name, name)
        if self._stage is None or self._stage.words != words:
            self._close()
            self._stage = _Stage(words, self.bars.add_task(words, total=0, said=""))
        self._stage.total += total
        self.bars.update(self._stage.task, total=self._stage.total)
        return self._advance

    def _pause(self) -> float:
        return LOOKS[0 if self.live else 1]

    def _advance(self, record: Record) -> None:
        assert self._stage is not None
        self._stage.counts[record.status] += 1
        due = time.monotonic() > self._due
        if due:
            begun, rest = time.monotonic(), self._left()
            self._rest = "" if rest is None else f", about {duration(rest)} left"
            now = time.monotonic()
            self._due = now + max(self._pause(), 20 * (now - begun))  # of large plans an estimate takes seconds
        spent = f"{elapsed(self._start)} so far{self._rest}"
        self.bars.update(self._stage.task, advance=1, said=f"{told(self._stage.counts)}; {spent}")
        if due and not self.live and self._stage.ended < self._stage.total:
            self._print(spent)

    def _close(self) -> None:
        if self._stage is not None and not self.live:
            self._print(f"{elapsed(self._start)} so far")
        self._stage = None

    def _print(self, spent: str) -> None:
        assert self._stage is not None
        counts = told(self._stage.counts)
        print(f"{self._stage.words}: {self._stage.ended} of {self._stage.total} runs, {counts}; {spent}", flush=True)


class _Stage:
    def __init__(self, words: str, task: TaskID) -> None:
        self.words, self.task, self.total = words, task, 0
        self.counts: Counter[str] = Counter()

    @property
    def ended(self) -> int:
        return sum(self.counts.values())


def told(counts: Counter[str]) -> str:
    """How many runs ended how: one that ended short of its target is done, and has a score."""
    done, short = sum(counts[status] for status in ENDED), counts["target missed"]
    parts = [f"{done} done" + (f" ({short} short of target)" if short else "")]
    parts += [f"{count} {status}" for status, count in sorted(counts.items()) if status not in ENDED]
    return ", ".join(parts)


def elapsed(start: float) -> str:
    """Time since ``start`` as minutes and seconds."""
    return duration(time.monotonic() - start)


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
