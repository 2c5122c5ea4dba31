"""Writing a report: terminal, page, tables, pictures. Imports ``report``, ``page``, ``terminal``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from stiefel.compare.analyse import layers
from stiefel.compare.analyse.notes import notes
from stiefel.compare.present.report import Report

if TYPE_CHECKING:
    from rich.console import Console


def publish(
    report: Report,
    *,
    html: Path,
    figures: Path | None = None,
    console: Console | None = None,
) -> None:
    """Print the tables and write report.html, summary and runs as CSV and, where pyarrow is there, as Parquet.

    Args:
        report: what is to be published.
        html: where the report goes; the tables go beside it.
        figures: a folder for every figure as PNG, or None.
        console: where to print.
    """
    from rich.console import Console

    from stiefel.compare.present import terminal
    from stiefel.compare.present.page import write_html

    console = console or Console()
    for summary in reversed(report.problems):  # the newest last, where a terminal shows it
        for shown in terminal.terminal_tables(summary):
            console.print(shown)
        for note in (*notes(summary), *layers.line(summary), *terminal.failure_lines(summary)):
            # Notes hold labels, paths and errors of users: brackets in them are no markup.
            console.print(f"· {note}", highlight=False, markup=False)
    for note in report.notes:
        console.print(f"· {note}", highlight=False, markup=False)
    html.parent.mkdir(parents=True, exist_ok=True)
    write_html(report, html)
    written = {"report": [html], "tables": write_tables(report, html.parent)}
    if figures is not None:  # cost runs alone give no figure, and `files[0]` below needs one
        written |= {"figures": found} if (found := write_png(report, figures)) else {}
    for what, files in written.items():
        names = ", ".join(file.name for file in files[1:4]) + (" …" if len(files) > 4 else "")
        line = f"{what}: {files[0].resolve()}" + (f", {names}" if names else "")
        # soft_wrap: a path that is broken over two lines cannot be copied.
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def write_tables(report: Report, folder: Path) -> list[Path]:
    """Write summary.csv and runs.csv, and both as Parquet where pyarrow is there; returns the files."""
    try:
        import pyarrow  # type: ignore[import-untyped, import-not-found, unused-ignore]  # noqa: F401

        parquet = True
    except ModuleNotFoundError:
        parquet = False
    written = []
    for name, rows in (("summary", flat(report.table())), ("runs", flat(report.runs()))):
        written.append(folder / f"{name}.csv")
        rows.to_csv(written[-1], index=False)
        if parquet:
            written.append(folder / f"{name}.parquet")
            rows.to_parquet(written[-1], index=False)
    return written


def flat(rows: pd.DataFrame) -> pd.DataFrame:
    """A frame whose columns hold one type each, as files want it: nested data as JSON, mixed columns as text."""

    def plain(column: pd.Series) -> pd.Series:
        known = column.dropna()
        if column.dtype != object or known.empty:  # a column of None alone has no type: it becomes NaN
            return column if column.dtype != object else column.astype("float64")
        if known.map(lambda value: isinstance(value, (dict, list, tuple))).any():
            return column.map(lambda value: json.dumps(value) if isinstance(value, (dict, list, tuple)) else value)
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
