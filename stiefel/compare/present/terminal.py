"""The report in a terminal, of 80 columns or more. Imports ``analyse``, ``columns``, ``standings``, rich."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from stiefel.compare.analyse.candidates import Candidate
from stiefel.compare.analyse.notes import few, skips
from stiefel.compare.analyse.requirements import Answer
from stiefel.compare.analyse.summary import Summary
from stiefel.compare.analyse.verdict import Verdict
from stiefel.compare.present import columns
from stiefel.compare.present import formatting as words
from stiefel.compare.present.columns import Grid, Place
from stiefel.compare.present.sentences import grouped, sentences
from stiefel.compare.present.standings import standings

WIDE = 110
"""Characters from which on a terminal gets more columns."""
_LEFT: dict[str, Any] = {"title_justify": "left", "pad_edge": False}


def terminal_tables(summary: Summary, width: int = 80) -> list[Table | Text]:
    """The verdict in words, what to use under which requirement, the candidates, then a table per setting.

    Args:
        summary: of one problem.
        width: characters of a line.
    """
    if not summary.settings:
        return []
    verdict = Verdict(summary)
    spoken = [Text(f"{summary.title}\n", style="bold"), *map(_prose, sentences(verdict)), Text()]
    place: Place = "wide" if width >= WIDE else "terminal"
    tables = [_table(standings(verdict, place), _over(verdict))]
    if len({setting.point for setting in summary.settings}) > 1:
        tables += [_table(columns.results(summary, setting, place), setting.title) for setting in summary.settings]
    return [*spoken, recommendations(verdict), *tables]


def _over(verdict: Verdict) -> str:
    """What the table of candidates is about."""
    budget = words.budget(verdict.summary)
    return f"{verdict.title}; {budget}" if budget else verdict.title


def _prose(sentence: str) -> Text:
    """A sentence with its `code` in bold."""
    parts = sentence.split("`")
    return Text.assemble(*((part, "bold" if i % 2 else "") for i, part in enumerate(parts)))


def failure_lines(summary: Summary) -> list[str]:
    """Why runs have no result, each reason once, with how many runs it cost and where one of them is."""
    lines = [
        f"{', '.join(labels)}: skipped: {reason}"
        for reason, labels in skips(row for setting in summary.settings for row in setting.rows).items()
    ]
    failed = [r for r in summary.failures if r.status != "skipped"]
    reasons = Counter((r.status, r.label, r.reason) for r in failed)
    # Backwards, so that the first run of each kind is the one shown.
    folders = {(r.status, r.label, r.reason): r.path for r in reversed(failed)}
    for key, n in reasons.most_common(8):
        status, label, reason = key
        lines.append(f"{label}: {n} {status}: {reason} (see {folders[key].name})")
    return lines + ([f"and {len(reasons) - 8} other failures, in report.html"] if len(reasons) > 8 else [])


def recommendations(verdict: Verdict) -> Table:
    """What to use under which requirement, each method once, with the evidence."""
    out = Table(box=None, title="what to use, by what you require", **_LEFT, padding=(0, 1, 0, 0))
    out.show_header = False
    out.add_column(width=28)
    out.add_column(ratio=1)
    groups, missing = grouped(verdict)
    for requirements, answer, more in groups:
        if answer.best is not None:
            text = _evidence(answer.best, "; ".join(more))
            out.add_row(escape("\n".join(requirements)), text + _related(answer))
    for text in missing:
        requirement, _, reason = text.partition(": ")
        out.add_row(escape(requirement), escape(reason))
    return out


def _evidence(best: Candidate, more: str) -> str:
    failed = f"; failed {best.failures}/{best.runs}" if best.failures else ""
    return f"[b]{escape(best.name)}[/] ({escape(best.choice)}){failed}" + (f"\n{escape(more)}" if more else "")


def _related(answer: Answer) -> str:
    names = [other.name for other in answer.rivals]
    return f"\n{escape(few(names, 4))}: {answer.relation}" if names else ""


def _table(grid: Grid[Any], title: str) -> Table:
    out = Table(box=box.SIMPLE_HEAD, title=escape(title), **_LEFT, collapse_padding=True)
    # The first column holds names: long ones are folded, not cut off.
    for i, column in enumerate(grid.columns):
        how: dict[str, Any] = {"justify": "right", "no_wrap": True} if i else {"overflow": "fold", "min_width": 13}
        out.add_column(Text(column.heading), **how)
    for line in grid.lines:
        out.add_row(*(_cell(column.text(line)) for column in grid.columns))
    return out


def _cell(text: str) -> Text:
    first, cut, more = text.partition("\n")  # a Text, in which rich looks for no markup: cells need no escape
    return Text.assemble(first, (cut + more, "dim"))
