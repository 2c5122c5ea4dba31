"""The report in a terminal of 80 columns. Imports ``summary``, ``recommend``, ``words``, rich."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from stiefel.compare.analyse.notes import few, skips
from stiefel.compare.analyse.recommend import Candidate, candidates, overall, reference
from stiefel.compare.analyse.rows import Row
from stiefel.compare.analyse.summary import Setting, Summary
from stiefel.compare.present import formatting as words

_LEFT: dict[str, Any] = {"title_justify": "left", "pad_edge": False}


def terminal_tables(summary: Summary) -> list[Table]:
    """A table per setting, a line per method, and the recommendations last, where a terminal shows them."""
    return [*(_setting(summary, setting) for setting in summary.settings), recommendations(summary)]


def failure_lines(summary: Summary) -> list[str]:
    """Why runs have no result, each reason once, with how many runs it cost and where one of them is."""
    lines = [
        f"{', '.join(labels)}: skipped: {reason}"
        for reason, labels in skips(row for setting in summary.settings for row in setting.rows).items()
    ]
    failed = [r for r in summary.failures if r.status != "skipped"]
    reasons = Counter((r.status, r.label, r.reason) for r in failed)
    folders = {(r.status, r.label, r.reason): r.path for r in reversed(failed)}
    for key, n in reasons.most_common(8):
        status, label, reason = key
        lines.append(f"{label}: {n} {status}: {reason} (see {folders[key]})")
    return lines + ([f"and {len(reasons) - 8} other failures, in report.html"] if len(reasons) > 8 else [])


def recommendations(summary: Summary) -> Table:
    """What to take under which requirement, over all settings, with the evidence."""
    out = Table(box=None, title=f"{summary.title}\nrecommended over all settings", **_LEFT, padding=(0, 1, 0, 0))
    out.show_header = False
    out.add_column(width=21)
    out.add_column(ratio=1)
    for found in overall(summary):
        text = found.reason if found.best is None else _evidence(summary, found.best, found.evidence)
        out.add_row(found.requirement, text + _apart([other.name for other in found.rivals]))
    control = reference(candidates(summary), summary.higher_is_better)
    if control is not None:
        out.add_row("for reference", _evidence(summary, control))
    return out


def _evidence(summary: Summary, best: Candidate, more: str = "") -> str:
    step = "" if best.step is None else f", step {best.step.value:.1f}×"
    return (
        f"[b]{escape(best.name)}[/] ({escape(best.choice)}){': ' + more if more else ''}\n"
        f"{summary.metric} {best.score}, n = {best.score.n if best.score else 0}, failed {best.failures}/{best.runs}, "
        f"error {words.error(best.error)}{step}"
    )


def _apart(names: list[str]) -> str:
    return f"\nnot told apart from {escape(few(names, 4))}" if names else ""


def _setting(summary: Summary, setting: Setting) -> Table:
    out = _table(f"{summary.title}\n{setting.title}")
    out.add_column("method", min_width=13, overflow="fold")
    score, steps = f"test {summary.metric} [95 %]", "steps to\ntarget"
    for name in ("lr", score, "failed\nof n", "worst\nerror", steps, "step\ncost"):
        out.add_column(name, justify="right", min_width=5)
    for row in setting.rows:
        out.add_row(_name(summary, row), *_line(row))
    return out


def _name(summary: Summary, row: Row) -> str:
    knobs = words.knobs(row)
    return escape(summary.marked(row.label)) + (f"\n[dim]{escape(knobs)}[/]" if knobs else "")


def _line(row: Row) -> Iterator[str]:
    yield words.rate(row)
    yield str(row.test) if row.test else row.state
    yield f"{sum(row.failures.values())}/{row.runs}"
    yield words.error(row.error_worst)
    yield words.NONE if row.steps_to_target is None else words.number(row.steps_to_target.value, ".0f")
    yield words.ratio(row)


def _table(title: str) -> Table:
    return Table(box=box.SIMPLE_HEAD, title=title, **_LEFT, collapse_padding=True)
