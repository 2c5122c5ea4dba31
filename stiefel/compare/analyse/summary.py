"""The comparison of one problem, in numbers. Imports ``rows``, ``records``."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from stiefel.compare.analyse.costs import CostRow, hardware
from stiefel.compare.analyse.rows import TOLERANCES, Row
from stiefel.compare.analyse.statistics.scores import Metric
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
        ranks: dict[float | None, dict[str, int]] = {}
        for tolerance in (None, *TOLERANCES):
            known = [
                (row.label, row.metric.better(row.test.value))
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
        measure: the metric that is compared.
        settings: the grid's points and scales.
        cost: what a step costs.
        failures: runs without a result that a reader should know of.
        records: all of its runs.
        older: how many records of earlier sources of the problem are left out.
        studies: whether each reported run has a tuning of its own; else one tuning chose for all.
        single: how many records of a single tuning are left out, because there are studies.
    """

    problem: str
    digest: str
    device: str
    dtype: str
    measure: Metric
    settings: tuple[Setting, ...]
    cost: tuple[CostRow, ...]
    failures: tuple[Record, ...]
    records: tuple[Record, ...] = field(repr=False)
    older: int = 0
    studies: bool = False
    single: int = 0

    @property
    def metric(self) -> str:
        """The metric's name."""
        return self.measure.name

    @property
    def higher_is_better(self) -> bool:
        """Of the metric."""
        return self.measure.higher_is_better

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
        return f"{self.problem} · {'CPU' if self.device == 'cpu' else 'GPU'} cost, {hardware(measured)}"

    @cached_property
    def hardware(self) -> str:
        """What the training runs ran on."""
        return hardware(self.records)


def dagger(label: str) -> str:
    """The name of a method with known faults, as reports write it."""
    return f"{label} †"
