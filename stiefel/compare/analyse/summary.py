"""The comparison of one problem, in numbers. Imports ``rows``, ``records``."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from stiefel.compare.analyse.rows import TOLERANCES, CostRow, Row
from stiefel.compare.record.records import Record


@dataclass(frozen=True)
class Setting:
    """One point of the grid of factors at one scale, with its rows, best first.

    Args:
        title: the point and the scale, in words.
        point: the factors that vary, with their values; empty where none does.
        scale: the scale as reports write it.
        fields: the problem's factors.
        target: validation metric that a run must reach, or None.
        rows: one per method; those with known faults last.
    """

    title: str
    point: str
    scale: str
    fields: dict[str, Any]
    target: float | None
    rows: tuple[Row, ...]

    def best(self, tolerance: float | None = None) -> Row | None:
        """The row with the best score, among those within an orthogonality tolerance where one is given."""
        return next((row for row in self.rows if self.rank(row, tolerance) == 1), None)

    def rank(self, row: Row, tolerance: float | None = None) -> int | None:
        """Its place by score, among the rows within a tolerance where one is given; equal scores share a place.

        None outside the tolerance, without a finite score, or with known faults.
        """
        return self._ranks[tolerance].get(row.label)

    @cached_property
    def _ranks(self) -> dict[float | None, dict[str, int]]:
        # −sign(worst) turns scores so that higher is better: worst is −∞ where it is, ∞ where lower is.
        ranks: dict[float | None, dict[str, int]] = {}
        for tolerance in (None, *TOLERANCES):
            known = [
                (row.label, -math.copysign(1, row.worst) * row.test.value)
                for row in self.rows
                if row.test
                and row.test.finite
                and not row.faults
                and (tolerance is None or row.error_worst <= tolerance)
            ]
            ranks[tolerance] = {label: 1 + sum(other > score for _, other in known) for label, score in known}
        return ranks


@dataclass(frozen=True)
class Summary:
    """The comparison of one problem on one device, summarized.

    Args:
        problem, digest, device, dtype: what its records share.
        metric, higher_is_better: what is compared.
        settings: the grid's points and scales.
        cost: what a step costs.
        failures: runs without a result that a reader should know of.
        records: all of its runs.
        older: how many records of earlier sources of the problem are left out.
    """

    problem: str
    digest: str
    device: str
    dtype: str
    metric: str
    higher_is_better: bool
    settings: tuple[Setting, ...]
    cost: tuple[CostRow, ...]
    failures: tuple[Record, ...]
    records: tuple[Record, ...] = field(repr=False)
    older: int = 0

    @cached_property
    def labels(self) -> list[str]:
        """All methods by name: the order of colours."""
        return sorted({record.label for record in self.records})

    @cached_property
    def controls(self) -> set[str]:
        """Labels of the unconstrained control."""
        return {record.label for record in self.records if record.control}

    @cached_property
    def faults(self) -> dict[str, str]:
        """The known faults of methods, by label, of those that have any."""
        return {row.label: row.faults for setting in self.settings for row in setting.rows if row.faults}

    def marked(self, label: str) -> str:
        """A method's name, with a dagger where it has known faults."""
        return dagger(label) if label in self.faults else label

    @property
    def title(self) -> str:
        """The problem, and what its costs were measured on."""
        # Cost runs may have had another machine than the training runs: where there are any, theirs is named.
        measured = [r for r in self.records if r.spec.kind == "cost"] or list(self.records)
        return f"{self.problem} · {'GPU' if self.device == 'cuda' else 'CPU'} cost, {hardware(measured)}"

    @property
    def hardware(self) -> str:
        """What the training runs ran on."""
        return hardware(self.records)


def dagger(label: str) -> str:
    """The name of a method with known faults, as reports write it."""
    return f"{label} †"


def hardware(records: Iterable[Record]) -> str:
    """The processors or GPUs that records come from, with the threads of each run."""
    found = []
    for environment in (r.environment for r in records if r.environment):
        threads = environment.get("threads")
        count = "" if not threads else f", {threads} thread{'s' * (threads != 1)}"
        # A run on a GPU is known by the GPU alone, one on the CPU by the processor and its threads.
        found.append(environment.get("gpu") or f"{environment.get('cpu') or 'unknown processor'}{count}")
    return " and ".join(dict.fromkeys(found)) or "unknown hardware"
