"""Writing a report: page, tables, verdicts, pictures, terminal. Imports ``report``, ``page``, ``terminal``."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from stiefel.compare.analyse import layers
from stiefel.compare.analyse.notes import notes
from stiefel.compare.present.report import Report
from stiefel.compare.present.verdict_json import document

if TYPE_CHECKING:
    from rich.console import Console


def publish(
    report: Report,
    *,
    html: Path,
    figures: Path | None = None,
    console: Console | None = None,
) -> None:
    """Write report.html, the tables and the verdicts beside it, then print the tables.

    The files come first: a terminal may lack characters, and a pipe may be closed before all is printed.

    Args:
        report: what is to be published.
        html: where the report goes; summary and runs as CSV (where pyarrow is there, as Parquet too) and verdict.json
            go beside it.
        figures: a folder for every figure as PNG, or None.
        console: where to print; by default standard output, which may be closed.
    """
    from stiefel.compare.present.page import write_html

    html.parent.mkdir(parents=True, exist_ok=True)
    write_html(report, html)
    written = {"report": [html], "tables": write_tables(report, html.parent)}
    written["verdict"] = [html.parent / "verdict.json"]
    text = json.dumps(document(report.problems), indent=1, ensure_ascii=False, allow_nan=False)
    written["verdict"][0].write_text(text + "\n", encoding="utf-8")
    if figures is not None:
        written |= {"figures": found} if (found := write_png(report, figures)) else {}
    _print(report, written, console or _terminal())


def _print(report: Report, written: dict[str, list[Path]], console: Console) -> None:
    """The tables and notes of each problem, and where the files are."""
    from stiefel.compare.present import terminal

    for summary in reversed(report.problems):  # the newest last, where a terminal shows it
        for shown in terminal.terminal_tables(summary, console.width):
            console.print(shown)
        for note in (*notes(summary), *layers.line(summary), *terminal.failure_lines(summary)):
            # Notes hold labels, paths and errors of users: brackets in them are no markup.
            console.print(f"· {note}", highlight=False, markup=False)
    for note in report.notes:
        console.print(f"· {note}", highlight=False, markup=False)
    for what, files in written.items():
        names = ", ".join(file.name for file in files[1:4]) + (" …" if len(files) > 4 else "")
        line = f"{what}: {files[0]}" + (f", {names}" if names else "")
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _terminal() -> Console:
    """Standard output, which its reader may close while it is written."""
    from rich.console import Console

    class Terminal(Console):
        def on_broken_pipe(self) -> None:
            # Rich would end the process with status 1. What is still to come goes nowhere, as to a reader who has left.
            self.quiet = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    return Terminal()


def write_tables(report: Report, folder: Path) -> list[Path]:
    """Write summary.csv and runs.csv, and both as Parquet where pyarrow is there; returns the files.

    In the CSV files a text that a spreadsheet would compute has an apostrophe before it (:func:`guarded`).
    """
    try:
        import pyarrow  # type: ignore[import-untyped, import-not-found, unused-ignore]  # noqa: F401

        parquet = True
    except ModuleNotFoundError:
        parquet = False
    written = []
    for name, rows in (("summary", flat(report.table())), ("runs", flat(report.runs()))):
        written.append(folder / f"{name}.csv")
        guarded(rows).to_csv(written[-1], index=False, encoding="utf-8")
        if parquet:
            written.append(folder / f"{name}.parquet")
            rows.to_parquet(written[-1], index=False)
    return written


FORMULA = re.compile(r"'*[=+\-@\t\r]")
"""How a text begins that a spreadsheet would compute; also after apostrophes, so that one can be taken off again."""


def guarded(rows: pd.DataFrame) -> pd.DataFrame:
    """The same with an apostrophe before texts, names of columns among them, that a spreadsheet takes for formulas.

    Numbers stay as they are, also those in columns of texts. ``re.sub("^'(?='*[=+\\-@\\t\\r])", "", text)`` undoes it.
    """

    def safe(value: Any) -> Any:
        if not isinstance(value, str) or not FORMULA.match(value):
            return value
        try:
            float(value)
        except ValueError:
            return f"'{value}"
        return value

    texts = {name for name in rows if pd.api.types.is_string_dtype(rows[name]) or rows[name].dtype == object}
    return pd.DataFrame({safe(name): rows[name].map(safe) if name in texts else rows[name] for name in rows})


def flat(rows: pd.DataFrame) -> pd.DataFrame:
    """A frame whose columns hold one type each, as files want it: nested data as JSON, mixed columns as text."""

    def plain(column: pd.Series) -> pd.Series:
        known = column.dropna()
        if column.dtype != object or known.empty:  # a column of None alone has no type: it becomes NaN
            return column if column.dtype != object else column.astype("float64")
        if known.map(lambda value: isinstance(value, (dict, list, tuple))).any():
            column = column.map(lambda value: json.dumps(value) if isinstance(value, (dict, list, tuple)) else value)
            known = column.dropna()
        return column if known.map(type).nunique() == 1 else column.map(str, na_action="ignore")

    return pd.DataFrame({name: plain(rows[name]) for name in rows})


def write_png(report: Report, folder: Path) -> list[Path]:
    """Write each figure as a PNG with a white ground; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for title, figure in report.figures().items():
        written.append(folder / f"{file_name(title)}.png")
        figure.savefig(written[-1], dpi=110, facecolor="white")
    return written


def file_name(title: str) -> str:
    """A figure's title as the name of a file."""
    return "-".join(re.findall(r"[\w.]+", title.replace("√2", "relu")))
