"""What tuning decides, and from which records. Imports ``records``, ``spec``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from stiefel.compare.record.records import ENDED, Record
from stiefel.compare.record.spec import RunSpec, canonical, fixed


@dataclass(frozen=True)
class Choice:
    """What tuning decides for one method in one setting: a learning rate, and knobs in place of the defaults."""

    lr: float
    knobs: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, spec: RunSpec) -> Choice:
        """The choice that a run is made with."""
        return cls(spec.lr, tuple(sorted(spec.knobs.items())))

    def apply(self, cell: RunSpec, **changes: Any) -> RunSpec:
        """A run of a cell with this choice."""
        return replace(cell, lr=self.lr, knobs=dict(self.knobs), **changes)

    def __str__(self) -> str:
        return ", ".join([f"lr={self.lr:g}", *(f"{key}={value}" for key, value in self.knobs)])


def cell_key(spec: RunSpec) -> tuple[Any, ...]:
    """What the runs of one method in one setting and study share: all but rate, knobs, seed, phase and kind."""
    return (
        spec.problem,
        spec.digest,
        tuple(sorted(fixed(spec.fields).items())),
        spec.method,
        tuple(sorted((k, str(canonical(v))) for k, v in spec.options.items())),
        spec.device,
        spec.dtype,
        spec.study,
    )


def ranked(tuned: Iterable[Record], higher_is_better: bool) -> dict[tuple[Any, ...], list[Choice]]:
    """The choices of each cell, best first, by their best validation metric, averaged over tuning seeds.

    Choices that were raced, on more seeds than others, come first, because a mean of fewer seeds owes more to luck; but
    not those of which half the runs failed (diverged, timed out, crashed). Then choices with fewer failures come first.
    One at which every run failed is left out. Ties go to the default knobs, then to the smallest rate.
    """
    scores: dict[tuple[Any, ...], dict[Choice, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in tuned:
        if record.spec.kind == "quality" and record.spec.phase == "tuning":
            scores[cell_key(record.spec)][Choice.of(record.spec)].append(record)

    def place(choice: Choice, records: list[Record]) -> tuple[Any, ...]:
        good = [record.summary["best_validation"] for record in records if record.status in ENDED]
        mean = sum(good) / len(good)
        value = -mean if higher_is_better else mean
        ended = len(good) / len(records)
        return ended <= 0.5, -len(records), -ended, value, bool(choice.knobs), choice.lr

    found = {}
    for key, choices in scores.items():
        placed = [
            (place(choice, records), choice)
            for choice, records in choices.items()
            if any(record.status in ENDED for record in records)
        ]
        if placed:
            found[key] = [choice for _, choice in sorted(placed, key=lambda entry: entry[0])]
    return found


def winners(tuned: Iterable[Record], higher_is_better: bool) -> dict[tuple[Any, ...], Choice]:
    """The first of each cell's choices as :func:`ranked` orders them."""
    return {key: choices[0] for key, choices in ranked(tuned, higher_is_better).items()}


@dataclass(frozen=True)
class Tuned:
    """Tuning runs that have ended, and the choice that wins each cell.

    Args:
        records: records of the runs.
        higher_is_better: of the validation metric.
    """

    records: tuple[Record, ...]
    higher_is_better: bool = True

    @cached_property
    def winners(self) -> dict[tuple[Any, ...], Choice]:
        """The choice of each cell, by :func:`cell_key`; a cell whose runs all failed has no entry."""
        return {key: choices[0] for key, choices in self.ranked.items()}

    @cached_property
    def ranked(self) -> dict[tuple[Any, ...], list[Choice]]:
        """The choices of each cell, best first."""
        return ranked(self.records, self.higher_is_better)

    def __add__(self, more: Iterable[Record]) -> Tuned:
        """The same with more records."""
        return replace(self, records=(*self.records, *more))


def on_edge(lr: float, rates: Sequence[float]) -> bool:
    """Whether a winning rate is the smallest or largest of its grid, so that a better one may lie outside."""
    return len(rates) > 1 and lr in (min(rates), max(rates))
