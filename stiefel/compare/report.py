"""The table in the terminal and the self-contained HTML. Imports ``summary``, ``figures``, rich, jinja2."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path

import jinja2
from rich import box
from rich.table import Table

import stiefel
from stiefel.compare import figures
from stiefel.compare.summary import Row, Setting, Summary, table


def terminal_tables(summary: Summary) -> list[Table]:
    """A table per setting, a line per method, for an 80-column terminal."""
    columns = (("lr", 5), (f"test {summary.metric} [95 %]", 20), ("worst\nerror", 6), ("steps to\ntarget", 8))
    tables = []
    for setting in summary.settings:
        title = f"{_title(summary)} · {setting.title}"
        out = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False, collapse_padding=True)
        out.add_column("method", min_width=13, overflow="fold")
        out.add_column("n", justify="right")
        for name, width in (*columns, ("step\ncost", 5), ("failed", 6)):
            out.add_column(name, justify="right", min_width=width)
        for row in setting.rows:
            out.add_row(
                row.label,
                str(row.test.n if row.test else 0),
                rate(row),
                str(row.test) if row.test else "every run failed",
                f"{row.error_worst:.0e}",
                steps(row.steps_to_target),
                ratio(summary, setting, row),
                f"{sum(row.failures.values())}/{row.runs}",
            )
        tables.append(out)
    return tables


def write_html(summary: Summary, path: Path) -> None:
    """Write the report as one file that needs no network, and the same rows as ``summary.csv`` beside it."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("stiefel.compare", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "steps": steps, "rate": rate, "bytes": megabytes, "ms": milliseconds}
    environments = [r.environment for r in summary.records if r.environment]
    page = environment.get_template("report.html.j2").render(
        summary=summary,
        title=_title(summary),
        version=stiefel.__version__,
        environment=environments[0] if environments else {},
        cost_threads=next((r.environment.get("threads") for r in summary.records if r.spec.kind == "cost"), None),
        headlines=[headline(summary, setting) for setting in summary.settings],
        sensitivity=figures.svg(figures.sensitivity(summary)),
        curves=[(setting, figures.svg(figures.curves(summary, setting))) for setting in summary.settings],
        cost_ratio=lambda setting, row: ratio(summary, setting, row),
    )
    path.write_text(page, encoding="utf-8")
    table(summary).to_csv(path.with_name("summary.csv"), index=False)


def write_png(summary: Summary, folder: Path) -> list[Path]:
    """Write each figure as a PNG with a white ground; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {"sensitivity": figures.sensitivity(summary)}
    drawn |= {setting.title: figures.curves(summary, setting) for setting in summary.settings}
    written = []
    for title, figure in drawn.items():
        name = "-".join(re.findall(r"[\w.]+", title.replace("√2", "relu")))
        written.append(folder / f"{summary.problem}-{name}.png")
        figure.savefig(written[-1], dpi=110, facecolor="white")
    return written


def headline(summary: Summary, setting: Setting) -> tuple[str, str]:
    """One sentence on a setting: what is best, what is best and feasible, and how many reach the target."""
    best, exact = setting.best(), setting.best(1e-6)
    if best is None or best.test is None:
        return setting.title, "every run of every method failed."
    words = f"best {best.label}, test {summary.metric} {best.test}{_caution(best)}"
    if exact is None or exact.test is None:
        words += "; no method keeps ‖XXᵀ−I‖/√p ≤ 1e-6."
    elif exact is best:
        words += ", and it keeps ‖XXᵀ−I‖/√p ≤ 1e-6."
    else:
        words += f"; best with ‖XXᵀ−I‖/√p ≤ 1e-6: {exact.label}, {exact.test}{_caution(exact)}."
    if setting.target is not None:
        reached = sum(row.runs > 0 and math.isfinite(row.steps_to_target) for row in setting.rows)
        words += f" {reached} of {len(setting.rows)} methods reach validation {summary.metric} {setting.target:g}."
    return setting.title, words


def _caution(row: Row) -> str:
    return f" (of {row.runs} runs {row.broken} did not train to the end)" if row.broken else ""


def failure_lines(summary: Summary) -> list[str]:
    """Why runs have no result, each reason once, with how many runs it cost."""
    reasons = Counter((r.status, r.spec.label, r.reason) for r in summary.failures)
    return [f"{label}: {n} {status}: {reason}" for (status, label, reason), n in reasons.most_common(8)]


def ratio(summary: Summary, setting: Setting, row: Row) -> str:
    """Step time as a multiple of the control's."""
    value = summary.step_ratio(setting, row)
    return "—" if value is None else f"{value:.1f}×"


def rate(row: Row) -> str:
    """The chosen learning rate, with a mark where it is on the edge of its grid."""
    return "—" if row.lr is None else f"{row.lr:g}" + ("*" if row.edge else "")


def steps(value: float) -> str:
    """Steps to the target; ∞ where the median run misses it."""
    return "∞" if math.isinf(value) else f"{value:.0f}"


def number(value: float) -> str:
    """An error, with one digit."""
    return "∞" if math.isinf(value) else f"{value:.0e}"


def megabytes(value: float | None) -> str:
    """A difference of memory in MB."""
    return "—" if value is None else f"{value / 1e6:+.0f} MB"


def milliseconds(value: float) -> str:
    """A duration in ms."""
    return f"{value * 1e3:.2f}"


def _title(summary: Summary) -> str:
    return f"{summary.problem} · {'GPU' if summary.device == 'cuda' else 'CPU'} cost"
