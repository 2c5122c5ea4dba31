"""The columns of the tables of results and of costs. Imports ``values``, ``rows``, ``formatting``.

To add one to the results: its value under a name in ``analyse/values.py``, which makes it a column of ``summary.csv``
too; here a line of :data:`RESULTS`, as ``valued("redundancy", VALUES["redundancy"], "{:.3g}".format)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar

from stiefel.compare.analyse.costs import CostRow
from stiefel.compare.analyse.summary import Setting, Summary
from stiefel.compare.analyse.values import VALUES, Line
from stiefel.compare.present import formatting as words

T = TypeVar("T")
Place = Literal["terminal", "wide", "page"]

TERMINAL: frozenset[Place] = frozenset({"terminal", "wide"})
WIDE: frozenset[Place] = frozenset({"wide"})
PAGE: frozenset[Place] = frozenset({"page"})
BOTH = TERMINAL | PAGE


def _nothing(line: Any) -> str:
    return ""


@dataclass(frozen=True)
class Column(Generic[T]):
    """How a table shows one value of each line, in plain text, which the terminal and the page escape.

    Args:
        heading: lines of text; ``{metric}`` stands for the metric's name.
        text: of a cell; in a terminal its second line is dim.
        key: what the page sorts by, where nothing (None, NaN) comes last; None where it sorts by the text.
        where: the terminal, one of 110 characters or more (``wide``), the page. A shorter form for 80 characters is a
            column of its own.
        prose: whether the page sets it as words, not as numbers.
        css: classes of a cell on the page.
        tone: ``good`` or ``bad`` for a cell's text on the page, or empty.
        optional: whether it is left out of a table in which no line has a key.
    """

    heading: str
    text: Callable[[T], str]
    key: Callable[[T], Any] | None = None
    where: frozenset[Place] = PAGE
    prose: bool = False
    css: Callable[[T], str] = _nothing
    tone: Callable[[T], str] = _nothing
    optional: bool = False


def valued(
    heading: str, value: Callable[[T], Any], form: Callable[[Any], str] = str, missing: str = words.NONE, **more: Any
) -> Column[T]:
    """A column that shows a value and is sorted by it.

    Args:
        heading: as of :class:`Column`.
        value: of a line.
        form: the value in words.
        missing: what stands for None.
        more: other fields of the column.
    """

    def text(line: T) -> str:
        known = value(line)
        return missing if known is None else form(known)

    return Column(heading, text, value, **more)


@dataclass(frozen=True)
class Grid(Generic[T]):
    """A table: its columns, with the metric's name in the headings, and its lines.

    Args:
        columns: from left to right.
        lines: from top to bottom.
        css: class of a line on the page.
    """

    columns: tuple[Column[T], ...]
    lines: tuple[T, ...]
    css: Callable[[T], str] = _nothing


@dataclass(frozen=True)
class CostLine:
    """A cost with the summary, which names its method."""

    summary: Summary
    cost: CostRow


def _method(at: Line) -> str:
    return "\n".join(filter(None, (at.name, words.knobs(at.row))))


def _score(at: Line) -> str:
    return words.bound(at.row) + str(at.row.test) if at.row.test else at.row.state


def _step_cost(at: Line) -> str:
    ratio = VALUES["step_ratio"](at)
    if ratio is not None:
        return words.ratio(ratio)
    return words.NONE if at.row.cost is None else words.DOUBTED


def _ran(at: Line, text: str) -> str:
    """A text about the reported runs; a dash where there are none."""
    return text if at.row.runs else words.NONE


def _median_steps(at: Line) -> str:
    interval = at.row.steps_to_target
    if interval is None:
        return words.NONE
    return words.number(interval.value, ".0f") if interval.finite else words.NOT_REACHED


_SCORE = Column("test {metric}", _score, VALUES["test_{metric}"])

RESULTS: tuple[Column[Line], ...] = (
    Column("method", _method, where=TERMINAL),
    Column("method", lambda at: at.name),
    Column("lr", lambda at: words.rate(at.row), where=TERMINAL),
    Column("rate, knobs", lambda at: words.choice(at.row), VALUES["lr"]),
    replace(_SCORE, heading="test {metric}\n[95 %]", where=TERMINAL),
    _SCORE,
    Column("failed\nof n", lambda at: f"{VALUES['failed'](at)}/{at.row.runs}", where=TERMINAL),
    Column(
        "failed",
        lambda at: at.row.failed,
        VALUES["failed"],
        css=lambda at: "failed bad" if at.row.failures else "failed",
    ),
    valued("worst\nerror", VALUES["error_worst"], words.error, where=TERMINAL),
    Column(
        "worst\nerror",
        lambda at: _ran(at, words.error(at.row.error_worst)),
        VALUES["error_worst"],
        tone=lambda at: words.tone(at.row.error_worst) if at.row.runs else "",
    ),
    Column("final\nerror", lambda at: _ran(at, words.error(at.row.error_final)), VALUES["error_final"]),
    Column("steps to\ntarget", _median_steps, where=TERMINAL),
    Column("steps to\ntarget", lambda at: words.steps(at.row.steps_to_target), VALUES["steps_to_target"]),
    Column("seconds to\ntarget", lambda at: words.seconds(at.row.seconds_to_target), VALUES["seconds_to_target"]),
    Column("step\ncost", _step_cost, VALUES["step_ratio"], where=BOTH),
    valued("gradient\nat the end", VALUES["gradient_norm"], "{:.2g}".format, optional=True),
    valued("redundancy", VALUES["redundancy"], "{:.3g}".format, optional=True),
    Column("tuning\nruns", lambda at: str(VALUES["tuning_runs"](at))),
    Column("failed,\ntuning", lambda at: str(at.row.tuning_failures)),
)
"""Of a method in a setting, from left to right."""


def _spread(at: CostLine) -> str:
    median, low, high = (words.milliseconds(at.cost.step[key]) for key in ("median", "q1", "q3"))
    return f"{median} ({low}–{high})"


def _believed(of: Callable[[CostRow], float]) -> Callable[[CostLine], float | None]:
    """A number that rests on times; None where these are not credible."""
    return lambda at: of(at.cost) if at.cost.credible else None


def _counted(heading: str, name: str) -> Column[CostLine]:
    return valued(heading, lambda at: at.cost.counts[name], words.count)


def _of_gpu(heading: str, name: str, form: Callable[[Any], str]) -> Column[CostLine]:
    return valued(heading, lambda at: at.cost.gpu.get(name), form, optional=True)


COSTS: tuple[Column[CostLine], ...] = (
    Column("method", lambda at: at.summary.marked(at.cost.label)),
    Column("setting", lambda at: at.cost.setting, prose=True),
    valued("ratio", _believed(lambda cost: cost.ratio), "{:.2f}×".format, missing=words.DOUBTED),
    Column("ms per step", _spread, lambda at: at.cost.step["median"]),
    Column("n", lambda at: str(at.cost.step["n"])),
    valued("control,\nms", lambda at: at.cost.control["median"], words.milliseconds),
    valued("constraint's\nshare", _believed(lambda cost: cost.share), lambda share: f"{100 * share:.0f} %"),
    _counted("matmul\nFLOPs", "matmul_flops"),
    _counted("factorization\nFLOPs", "factorization_flops"),
    _counted("operators", "operators"),
    valued("peak\nmemory", lambda at: at.cost.memory, words.megabytes),
    _of_gpu("GPU\nallocated", "gpu_peak_bytes", lambda value: words.megabytes(value, ".1f")),
    _of_gpu("GPU\nreserved", "gpu_reserved_bytes", lambda value: words.megabytes(value, ".1f")),
    _of_gpu("GPU energy\nper step", "gpu_energy_joules", "{:.3g} J".format),
)
"""Of what a step costs, from left to right."""


def results(summary: Summary, setting: Setting, place: Place) -> Grid[Line]:
    """The methods of a setting, best first: on the page the control is marked as the reference."""

    def css(at: Line) -> str:
        return "ref" if at.control else ""

    lines = tuple(Line(summary, setting, row) for row in setting.rows)
    return Grid(shown(RESULTS, lines, place, summary.metric), lines, css)


def costs(summary: Summary, place: Place) -> Grid[CostLine]:
    """What a step costs, by setting and method."""
    lines = tuple(CostLine(summary, cost) for cost in summary.cost)
    return Grid(shown(COSTS, lines, place, summary.metric), lines)


def shown(columns: Iterable[Column[T]], lines: tuple[T, ...], place: Place, metric: str) -> tuple[Column[T], ...]:
    """The columns of a place, without optional ones that are empty, and with the metric's name in their headings."""
    return tuple(
        replace(column, heading=column.heading.replace("{metric}", metric))
        for column in columns
        if place in column.where and not (column.optional and _empty(column, lines))
    )


def _empty(column: Column[T], lines: tuple[T, ...]) -> bool:
    return all(column.key is None or column.key(line) is None for line in lines)
