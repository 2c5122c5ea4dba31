"""The report as one HTML file that needs no network. Imports ``analyse``, ``columns``, ``figures``, jinja2."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from stiefel import __version__
from stiefel.compare.analyse.layers import Why
from stiefel.compare.analyse.notes import few, notes, skips
from stiefel.compare.analyse.requirements import Answer
from stiefel.compare.analyse.summary import Setting, Summary
from stiefel.compare.analyse.values import Line
from stiefel.compare.analyse.verdict import Verdict
from stiefel.compare.present import columns
from stiefel.compare.present import formatting as words
from stiefel.compare.present.columns import CostLine, Grid
from stiefel.compare.present.figures.curves import curves, orthogonality
from stiefel.compare.present.figures.layers import depth, heat
from stiefel.compare.present.figures.profiles import profiles
from stiefel.compare.present.figures.scores import against_cost, scores
from stiefel.compare.present.figures.sheet import Sheet
from stiefel.compare.present.figures.style import INK
from stiefel.compare.present.figures.tuning import defaults, sensitivity
from stiefel.compare.present.sentences import grouped, sentences
from stiefel.compare.present.standings import Standing, standings
from stiefel.compare.record.records import Record

if TYPE_CHECKING:
    from stiefel.compare.analyse.results import Results

CURVES = 4
"""Settings of a report whose curves are drawn into the page; ``--figures`` draws all."""
MORE = {
    "input_condition": "condition\nof inputs",
    "block_condition": "condition of\nFisher blocks",
    "operator_largest": "convolution,\nlargest",
    "operator_smallest": "convolution,\nsmallest",
}
"""Columns of :attr:`Why.methods` that are shown where a method has a value."""
FAILURES = 60
"""Failures that the page lists, each kind once; runs.csv has all."""


@dataclass(frozen=True)
class Failure:
    """Runs of one method without a result, for one reason."""

    first: Record
    runs: tuple[Record, ...]

    @property
    def folders(self) -> str:
        """The first three folders, and the number of the others."""
        return few((run.path.name for run in self.runs), 3)


@dataclass(frozen=True)
class Section:
    """One problem's part of the page.

    Args:
        summary: what it shows.
        curves: how many settings' curves it may draw.
    """

    summary: Summary
    curves: int = CURVES

    @cached_property
    def verdict(self) -> Verdict:
        """Over all points of the grid."""
        return Verdict(self.summary)

    @property
    def sentences(self) -> list[str]:
        """The verdict in words, the core first."""
        return sentences(self.verdict)

    @cached_property
    def answers(self) -> tuple[list[tuple[list[str], Answer, list[str]]], list[str]]:
        """What to use under which requirements, and those that nothing meets."""
        return grouped(self.verdict)

    @property
    def scales(self) -> bool:
        """Whether the scale is a choice."""
        return len({setting.scale for setting in self.summary.settings}) > 1

    @property
    def points(self) -> int:
        """How many points of the grid the recommendation is over."""
        return len({setting.point for setting in self.summary.settings})

    @property
    def targets(self) -> str:
        """What a run must reach; more than one where the settings differ in it."""
        return " or ".join(f"{t:g}" for t in sorted({s.target for s in self.summary.settings if s.target is not None}))

    @property
    def skips(self) -> dict[str, list[str]]:
        """Why methods were skipped."""
        return skips(row for setting in self.summary.settings for row in setting.rows)

    @cached_property
    def failures(self) -> list[Failure]:
        """The runs without a result, each reason once."""
        kinds: dict[Any, list[Record]] = defaultdict(list)
        # One message may come from different places: the last lines of the traceback tell them apart.
        for record in self.summary.failures:
            kinds[record.label, record.status, record.reason, record.traceback[-3:]].append(record)
        return [Failure(records[0], tuple(records)) for records in kinds.values()]

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know before believing the numbers."""
        return notes(self.summary)

    @property
    def budget(self) -> str:
        """What a run and its tuning had, in words."""
        return words.budget(self.summary)

    @property
    def standings(self) -> Grid[Standing]:
        """The table of the verdict."""
        return standings(self.verdict, "page")

    def results(self, setting: Setting) -> Grid[Line]:
        """The table of one setting."""
        return columns.results(self.summary, setting, "page")

    @property
    def costs(self) -> Grid[CostLine]:
        """The table of what steps cost."""
        return columns.costs(self.summary, "page")

    @property
    def scores(self) -> Sheet | None:
        """The figure of the scores with their intervals."""
        return scores(self.verdict)

    @property
    def against_cost(self) -> Sheet | None:
        """The figure of scores against step costs."""
        return against_cost(self.verdict)

    @property
    def sensitivity(self) -> Sheet:
        """The figure of validation metrics against learning rates."""
        return sensitivity(self.summary)

    @property
    def defaults(self) -> Sheet:
        """The figure of default and tuned settings."""
        return defaults(self.summary)

    def drawn(self) -> Iterator[tuple[Setting, Sheet, Sheet]]:
        """The settings with their errors and curves."""
        for setting in self.summary.settings[: self.curves]:
            yield setting, orthogonality(self.summary, setting), curves(self.summary, setting)

    def why(self) -> Iterator[tuple[Setting, Sheet, Sheet | None, list[dict[str, Any]], list[str], dict[str, str]]]:
        """The settings whose layers are known: through depth, dependence where known, a row per method, what failed.

        Last the further columns of these rows that have a value: name and heading.
        """
        for setting in self.summary.settings[: self.curves]:
            why = Why(setting)
            through = depth(self.summary, why)
            if through is not None:
                methods = why.methods
                more = {name: text for name, text in MORE.items() if name in methods and methods[name].notna().any()}
                rows: Any = methods.to_dict("records")
                yield setting, through, heat(self.summary, why), rows, why.reasons, more


def write_html(report: Results, path: Path) -> None:
    """Write the report as one file."""
    # The limit holds for the whole page: the first problems draw, as far as it lasts.
    sections, left = [], CURVES
    for summary in report.problems:
        sections.append(Section(summary, max(0, left)))
        left -= len(summary.settings)
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            sections=sections,
            profiles=list(_profiles(report)),
            version=__version__,
            limit=FAILURES,
        )
    )
    path.write_text(page, encoding="utf-8")


def _profiles(report: Results) -> Iterator[dict[str, Any]]:
    for device in report.devices:
        steps, seconds = (report.times(unit, device) for unit in ("steps", "seconds"))
        if len(steps) > 1:  # a profile is a distribution over cases
            summaries = [summary for summary in report.problems if summary.device == device]
            figure = profiles(summaries)
            # Methods that were not run in every case: the profile leaves them out.
            absent = [label for label in steps if steps[label].isna().any()]
            yield {"device": device, "steps": steps, "seconds": seconds, "figure": figure, "absent": absent}


def _environment() -> jinja2.Environment:
    # autoescape: labels, errors and paths come from users' files.
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("stiefel.compare.present"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["ink"] = INK
    environment.filters |= {
        name: getattr(words, name) for name in ("dashes", "error", "key", "number", "score", "tone")
    }
    return environment
