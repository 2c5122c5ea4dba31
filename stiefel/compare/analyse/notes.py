"""What a reader must know before believing a summary: where the protocol was not kept.

Imports ``summary``.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

from stiefel.compare.analyse.costs import hardware
from stiefel.compare.analyse.rows import Row
from stiefel.compare.analyse.statistics.scores import ENOUGH
from stiefel.compare.analyse.summary import Setting, Summary

DECADES = 3.0
"""What the protocol asks for: the span of the learning rates."""
STEADY = 1.5
"""Largest ratio of the control's step times between cost runs of one point of the grid, where its step is the same."""


def notes(summary: Summary) -> tuple[str, ...]:
    """One sentence for each finding, with the settings and methods that it concerns."""
    return tuple(note for part in (_faulty, _mixed, _tuning, _evidence, _compiled) for note in part(summary))


def _faulty(summary: Summary) -> Iterator[str]:
    kinds = defaultdict(list)
    for label, faults in summary.faults.items():
        kinds[faults].append(label)
    for faults, labels in kinds.items():
        yield f"† methods with known faults, neither ranked nor recommended ({faults}): {', '.join(labels)}"


def _mixed(summary: Summary) -> Iterator[str]:
    if summary.older:
        what = "1 record is" if summary.older == 1 else f"{summary.older} records are"
        yield f"{what} left out: made with an earlier source of {summary.problem}, which counts as another problem"
    if summary.single:
        yield f"{summary.single} runs of a single tuning (--seeds) are left out: the report is of the studies"
    environments = [r.environment for r in summary.records if r.environment]
    # Code that is not in a git checkout has no commit: its version stands for it.
    code = sorted({str(e.get("commit") or e.get("stiefel")) for e in environments})
    if len(code) > 1:
        yield f"these records come from {len(code)} versions of the code, whose results may differ: {', '.join(code)}"
    # Each kind by itself: a cost run may use more threads than a training run, and that is no mixture.
    for kind in ("quality", "cost"):
        machines = {e for r in summary.records if r.spec.kind == kind and r.environment for e in [hardware([r])]}
        if len(machines) > 1:
            yield (
                f"the {kind} runs come from {len(machines)} kinds of hardware or thread count, so their times do not "
                f"compare: {'; '.join(sorted(machines))}"
            )


def _tuning(summary: Summary) -> Iterator[str]:
    def unequal(setting: Setting) -> str:
        counts = defaultdict(list)
        for row in setting.rows:  # a method that fails at every rate is not refined: fewer runs are right
            if row.tuning and row.choice is not None:
                counts[len(row.tuning)].append(row.label)
        groups = [f"{n} ({few(labels)})" for n, labels in sorted(counts.items())]
        return " against ".join(groups) if len(groups) > 1 else ""

    def span(setting: Setting) -> str:
        # `rates` go from the smallest to the largest; 1e-6 allows for rounding in the logarithm.
        spans = [math.log10(row.rates[-1] / row.rates[0]) for row in setting.rows if row.rates]
        return f"{min(spans):.1f}" if spans and min(spans) < DECADES - 1e-6 else ""

    yield from _where(summary, unequal, "methods had unequal numbers of tuning runs: {}")
    yield from _where(summary, span, f"the learning rates span {{}} decades, the protocol asks for {DECADES:g}")
    yield from _where(
        summary,
        lambda setting: few(_on_edge(row) for row in setting.rows if row.edge),
        "* the best learning rate is on the edge of those tried, a better one may lie outside: {}",
    )


def _on_edge(row: Row) -> str:
    """A method, and in how many of its studies its best rate lies on the edge."""
    return row.label + (f" (in {len(row.edges)} of {len(row.choices)} studies)" if len(row.choices) > 1 else "")


def _compiled(summary: Summary) -> Iterator[str]:
    times = [r.summary.get("compile_seconds") or 0.0 for r in summary.records if r.spec.kind == "quality"]
    compiled = [seconds for seconds in times if seconds > 0]
    if compiled:
        yield (
            f"seconds exclude torch's compilation: {min(compiled):.2g} to {max(compiled):.2g} s per run, "
            f"in {len(compiled)} runs"
        )


def _evidence(summary: Summary) -> Iterator[str]:
    def seeds(setting: Setting) -> str:
        counts = [row.runs for row in setting.rows if row.runs]
        return str(min(counts)) if counts and min(counts) < ENOUGH else ""

    def none(setting: Setting) -> str:
        return few(row.label for row in setting.rows if not row.runs and row.choice is not None)

    def torn(setting: Setting) -> str:
        return few(f"{row.label} (in {few(row.torn, 3)})" for row in setting.rows if row.torn)

    if not summary.settings:
        yield "there are only cost runs, so nothing is known of how the methods train"
    yield from _where(
        summary, seeds, f"only n = {{}} replicates: there is no verdict and no interval below n = {ENOUGH}"
    )
    yield from _where(summary, none, "no run with fresh seeds, so no score: {}")
    yield from _where(summary, torn, "measurements are torn, and shown as far as they can be read, of runs of {}")
    if not summary.cost:
        yield "there is no cost pass, so nothing is known of what a step costs"
    else:
        yield from _where(
            summary,
            lambda setting: few(row.label for row in setting.rows if row.final and row.cost is None),
            "no cost run: {}",
        )
        yield from _restless(summary)


def _restless(summary: Summary) -> Iterator[str]:
    """Whether other work disturbed the cost runs: each times the control, whose step is the same in all."""
    controls = defaultdict(list)
    for cost in summary.cost:
        controls[cost.setting, cost.hardware].append(cost.control["median"])
    worst = max(controls.values(), key=lambda times: max(times) / min(times))
    if max(worst) > STEADY * min(worst):
        yield (
            f"the same step of the control took {1e3 * min(worst):.3g} to {1e3 * max(worst):.3g} ms in "
            "different cost runs: other work shared the machine, so the ratios of step times are rough"
        )


def _where(summary: Summary, told: Callable[[Setting], str], text: str) -> Iterator[str]:
    """One sentence for each different finding, with its settings where not all share it."""
    found = defaultdict(list)
    for setting in summary.settings:
        found[told(setting)].append(setting.title)
    for what, titles in found.items():
        if what:  # an empty text: nothing to tell of these settings
            yield text.format(what) + ("" if len(titles) == len(summary.settings) else f" ({'; '.join(titles)})")


def few(labels: Iterable[str], limit: int = 6) -> str:
    """Names in a row, not more than can be read."""
    names = list(labels)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def skips(rows: Iterable[Row]) -> dict[str, list[str]]:
    """Reasons for which every run of a method was skipped, with the methods."""
    found = defaultdict(list)
    for row in rows:
        if row.skipped is not None:
            found[row.skipped].append(row.label)
    return {reason: list(dict.fromkeys(labels)) for reason, labels in found.items()}
