"""Progress of a comparison: a bar in a terminal, a line now and then in a log. Imports rich."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

if TYPE_CHECKING:
    from stiefel.compare.record.records import Record


class Progress:
    """One bar per stage, with how many runs ended in which status."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty()
        self.bars = Bars(
            TextColumn("{task.description:>6}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[statuses]}"),
            console=Console(),
            disable=not self.live,
        )

    def __enter__(self) -> Progress:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def stage(self, name: str, total: int) -> Callable[[Record], None]:
        """Begin a stage; returns what to call with each record."""
        task = self.bars.add_task(name, total=total, statuses="")
        counts: Counter[str] = Counter()
        every = max(1, total // 5)  # about five lines per stage in a log

        def advance(record: Record) -> None:
            counts[record.status] += 1
            statuses = ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
            self.bars.update(task, advance=1, statuses=statuses)
            ended = sum(counts.values())
            if not self.live and (ended % every == 0 or ended == total):
                print(f"{name:>6} {ended}/{total}: {statuses}", flush=True)

        return advance
