"""What records say, problem by problem, as tables. Imports ``frames``, ``layers``, ``profile``, ``summarize``."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import pandas as pd

from stiefel.compare.analyse import frames, layers
from stiefel.compare.analyse.profile import Unit, profile, times
from stiefel.compare.analyse.summarize import summaries
from stiefel.compare.analyse.summary import Summary
from stiefel.compare.record.records import Record, read_all
from stiefel.errors import ProblemError


@dataclass(frozen=True)
class Results:
    """What records say, problem by problem; for notebooks, the command line and the files.

    Args:
        problems: a summary per problem, device and dtype, the one that ran last first.
        faults: what is wrong with records that could not be read.
    """

    problems: tuple[Summary, ...]
    faults: tuple[str, ...] = ()

    @classmethod
    def of(cls, records: Iterable[Record], faults: Iterable[str] = ()) -> Self:
        """The report of some records, as :func:`stiefel.compare.record.records.read_all` gives them."""
        return cls(tuple(summaries(records)), tuple(faults))

    @classmethod
    def read(cls, *folders: str | Path, only: Container[str] | None = None) -> Self:
        """The report of the records in some folders.

        Args:
            folders: of records.
            only: hashes of the records to report; None for all.

        Raises:
            ProblemError: a folder is not there, or there is no finished run.
        """
        for folder in folders:
            if not Path(folder).is_dir():
                raise ProblemError(
                    f"there is no folder {str(folder)!r}; give a folder of records, as written by stiefel compare"
                )
        found, faults = read_all([Path(folder) for folder in folders])
        records = [record for record in found if only is None or record.spec.hash in only]
        if not records:
            broken = f" ({len(faults)} unreadable, the first: {faults[0]})" if faults else ""
            where = ", ".join(map(str, folders))
            raise ProblemError(f"no finished run in {where}{broken}; run stiefel compare first")
        return cls.of(records, faults)

    @property
    def records(self) -> list[Record]:
        """The runs of all problems."""
        return [record for summary in self.problems for record in summary.records]

    @property
    def notes(self) -> tuple[str, ...]:
        """What concerns the records as a whole; each problem has notes of its own."""
        found = []
        if self.faults:
            some = "; ".join(self.faults[:3])
            found.append(f"unreadable records left out: {len(self.faults)} ({some})")
        # A summary has one digest. Where those of one problem differ between devices or dtypes, its file was edited
        # between the runs.
        digests: dict[str, set[str]] = {}
        for summary in self.problems:
            digests.setdefault(summary.problem, set()).add(summary.digest)
        mixed = [problem for problem, sources in digests.items() if len(sources) > 1]
        if mixed:
            found.append(f"between devices or dtypes, the source of {', '.join(mixed)} changed: do not compare them")
        return tuple(found)

    def table(self) -> pd.DataFrame:
        """A row per problem, setting and method: choice, scores with intervals, ranks, failures, cost, hardware."""
        return pd.concat([frames.table(summary) for summary in self.problems], ignore_index=True)

    def recommendations(self) -> pd.DataFrame:
        """A row per problem and requirement, over all settings: the method, its evidence, its rivals."""
        return frames.recommendations(self.problems)

    def verdict(self) -> pd.DataFrame:
        """A row per comparison: ``setting, method, against, n, difference, low, high, told_apart`` and how it was made.

        ``difference`` is the method's score less that of what it is compared with, where ``ratio`` their ratio.
        ``told_apart`` is empty where fewer than five replicates of either are known. Where ``against`` is a control,
        the correction is for all comparisons with controls, else for all pairs.
        """
        return frames.verdict(self.problems)

    def runs(self) -> pd.DataFrame:
        """A row per run, with what it ran on."""
        rows, where = frames.runs(self.records), frames.where(self.records)
        where.index = rows.index  # both have a row per record, in the same order
        # A problem's factor may be called like one of these (threads, cores): it keeps its name.
        return rows.assign(**{f"machine_{name}" if name in rows else str(name): where[name] for name in where})

    def epochs(self) -> pd.DataFrame:
        """A row per training run and epoch: steps, seconds, loss, what was measured, worst orthogonality error."""
        return frames.epochs(self.records)

    def layers(self) -> pd.DataFrame:
        """A row per problem, setting, method, moment (start, end) and layer: energies, conditions, norms, rates …"""
        return layers.frames(self.problems, "layers")

    def dependence(self) -> pd.DataFrame:
        """A row per problem, setting, method, moment and pair of layers: how far one's step turns the other's gradient.

        ``degrees`` for a step of 1 % of the weight's length, ``degrees_per_step`` for an SGD step at the method's rate.
        """
        return layers.frames(self.problems, "dependence")

    def rates(self) -> pd.DataFrame:
        """A row per problem, setting, method, training step and layer: the effective rate."""
        return layers.frames(self.problems, "rates")

    def times(self, unit: Unit = "steps", device: str | None = None) -> pd.DataFrame:
        """Median steps or seconds to the target, cases × methods, of one device (that of the newest problem)."""
        return times(self.on(device), unit)

    def profile(self, unit: Unit = "steps", device: str | None = None) -> pd.DataFrame:
        """Dolan and Moré's performance profile of :meth:`times`: ρ(τ), a column per method run in every case."""
        return profile(self.times(unit, device))

    @cached_property
    def devices(self) -> list[str]:
        """The devices of the problems."""
        # Unique, and in the order of the problems: `on` takes the first as the device of the newest one.
        return list(dict.fromkeys(summary.device for summary in self.problems))

    def on(self, device: str | None) -> list[Summary]:
        """The problems that ran on a device; on that of the newest one where none is given."""
        return [summary for summary in self.problems if summary.device == (device or self.devices[0])]
