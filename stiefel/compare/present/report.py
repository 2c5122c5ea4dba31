"""Results with their figures: what :func:`stiefel.compare.read_report` returns. Imports ``results``, ``figures``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from stiefel.compare.analyse.layers import Why
from stiefel.compare.analyse.results import Results
from stiefel.compare.analyse.summary import Summary
from stiefel.compare.analyse.verdict import Verdict
from stiefel.compare.present.figures.curves import curves, orthogonality
from stiefel.compare.present.figures.layers import depth, heat
from stiefel.compare.present.figures.profiles import profiles
from stiefel.compare.present.figures.scores import against_cost, scores
from stiefel.compare.present.figures.sheet import Sheet
from stiefel.compare.present.figures.tuning import defaults, sensitivity

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Report(Results):
    """What records say, problem by problem; for notebooks, the command line and the files."""

    def figures(self) -> dict[str, Figure]:
        """Every figure, by name."""
        drawn: dict[str, Figure] = {}
        for device in self.devices:
            if len(self.times("steps", device)) > 1:  # a profile is a distribution over cases
                drawn[f"profile-{device}"] = profiles(self.on(device)).figure()
        for summary in self.problems:
            for name, sheet in problem_figures(summary):
                drawn[_name(summary, name, len(self.problems) > 1)] = sheet.figure()
        return drawn


def problem_figures(summary: Summary) -> Iterable[tuple[str, Sheet]]:
    """The figures of one problem with their names."""
    verdict = Verdict(summary)
    yield from _known({"scores": scores(verdict), "cost": against_cost(verdict)})
    if summary.settings:  # cost runs alone have none
        yield "sensitivity", sensitivity(summary)
        yield "defaults", defaults(summary)
    for setting in summary.settings:
        yield setting.title, curves(summary, setting)
        yield f"{setting.title} orthogonality", orthogonality(summary, setting)
        why = Why(setting)
        found = {f"{setting.title} why": depth(summary, why), f"{setting.title} dependence": heat(summary, why)}
        yield from _known(found)


def _known(found: dict[str, Sheet | None]) -> Iterable[tuple[str, Sheet]]:
    return ((name, sheet) for name, sheet in found.items() if sheet is not None)


def _name(summary: Summary, figure: str, many: bool) -> str:
    # With many, one problem may have several summaries, of different devices and dtypes.
    return "-".join([summary.problem, *([summary.device, summary.dtype] if many else []), figure])
