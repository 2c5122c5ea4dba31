"""What tuning decides, and from which records. Imports ``records``, ``spec``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from stiefel.compare.record.records import ENDED, Record
from stiefel.compare.record.spec import RunSpec


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
    """What the runs of one method in one setting share: all but rate, knobs, seed, phase and kind."""
    return (
        spec.problem,
        spec.digest,
        tuple(sorted(spec.fields.items())),
        spec.method,
        tuple(sorted((k, str(v)) for k, v in spec.options.items())),
        spec.device,
        spec.dtype,
    )


def winners(tuned: Iterable[Record], higher_is_better: bool) -> dict[tuple[Any, ...], Choice]:
    """The choice of each cell whose best validation metric, averaged over tuning seeds, is best.

    A choice at which a run failed (diverged, timed out, crashed) wins only where every choice had failures; one at
    which every run failed never wins. Ties go to the default knobs, then to the smallest rate.
    """
    scores: dict[tuple[Any, ...], dict[Choice, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in tuned:
        if record.spec.kind == "quality" and record.spec.phase == "tuning":
            scores[cell_key(record.spec)][Choice.of(record.spec)].append(record)
    best = {}
    for key, choices in scores.items():
        ranked = []
        for choice, records in choices.items():
            good = [r for r in records if r.status in ENDED]
            if good:
                mean = sum(r.summary["best_validation"] for r in good) / len(good)
                value = mean if higher_is_better else -mean
                # In this order: share of runs that trained to the end, mean metric, default knobs, small rate.
                ranked.append((len(good) / len(records), value, not choice.knobs, -choice.lr, choice))
        if ranked:
            # The choice itself is not compared: choices have no order.
            best[key] = max(ranked, key=lambda entry: entry[:-1])[-1]
    return best


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
        return winners(self.records, self.higher_is_better)

    def __add__(self, more: Iterable[Record]) -> Tuned:
        """The same with more records."""
        return replace(self, records=(*self.records, *more))


def on_edge(lr: float, rates: Sequence[float]) -> bool:
    """Whether a winning rate is the smallest or largest of its grid, so that a better one may lie outside."""
    return len(rates) > 1 and lr in (min(rates), max(rates))
