"""The report of all problems in some folders: tables, figures, files. Imports the rest of the reporting side."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from stiefel.compare import figures, why, why_figures
from stiefel.compare.profile import Unit, profile, times
from stiefel.compare.recommend import in_setting, overall
from stiefel.compare.records import Record, frame, read_all
from stiefel.compare.rows import TOLERANCES, Row, lines_of, parsed, powers
from stiefel.compare.scores import Interval
from stiefel.compare.summary import Setting, Summary, summaries
from stiefel.errors import ProblemError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console


@dataclass(frozen=True)
class Report:
    """What records say, problem by problem; for notebooks, the command line and the files.

    Args:
        problems: a summary per problem, device and dtype, the one that ran last first.
        faults: what is wrong with records that could not be read.
    """

    problems: tuple[Summary, ...]
    faults: tuple[str, ...] = ()

    @classmethod
    def of(cls, records: Iterable[Record], faults: Iterable[str] = ()) -> Report:
        """The report of some records, as :func:`stiefel.compare.records.read_all` gives them."""
        return cls(tuple(summaries(records)), tuple(faults))

    @classmethod
    def read(cls, *folders: str | Path) -> Report:
        """The report of all records in some folders.

        Raises:
            ProblemError: a folder is not there, or there is no finished run.
        """
        for folder in folders:
            if not Path(folder).is_dir():
                raise ProblemError(
                    f"there is no folder {str(folder)!r}; give a folder of records, as written by stiefel compare"
                )
        records, faults = read_all([Path(folder) for folder in folders])
        if not records:
            broken = f" ({len(faults)} that cannot be read: {faults[0]})" if faults else ""
            where = ", ".join(map(str, folders))
            raise ProblemError(f"no finished run in {where}{broken}; run stiefel compare first")
        return cls.of(records, faults)

    @property
    def notes(self) -> tuple[str, ...]:
        """What concerns the records as a whole; each problem has notes of its own."""
        found = []
        if self.faults:
            some = "; ".join(self.faults[:3])
            found.append(f"{len(self.faults)} records cannot be read and are left out: {some}")
        digests: dict[str, set[str]] = {}
        for summary in self.problems:
            digests.setdefault(summary.problem, set()).add(summary.digest)
        mixed = [problem for problem, sources in digests.items() if len(sources) > 1]
        if mixed:
            found.append(f"the devices or dtypes of {', '.join(mixed)} ran at different sources of the problem")
        return tuple(found)

    def table(self) -> pd.DataFrame:
        """A row per problem, setting and method: choice, scores with intervals, ranks, failures, cost, hardware."""
        return pd.concat([table(summary) for summary in self.problems], ignore_index=True)

    def recommendations(self) -> pd.DataFrame:
        """A row per problem, setting (or all of them) and requirement: the method, its evidence, its rivals."""
        rows = []
        for summary in self.problems:
            parts = [("all settings", overall(summary)), *((s.title, in_setting(summary, s)) for s in summary.settings)]
            for title, found in parts:
                for r in found:
                    best, score = r.best, r.best.score if r.best else None
                    rows.append(
                        {
                            **_identity(summary),
                            "setting": title,
                            "requirement": r.requirement,
                            "method": best.name if best else None,
                            "choice": best.choice if best else None,
                            **_interval(f"test_{summary.metric}", score),
                            "n": score.n if score else 0,
                            "failed": best.failures if best else None,
                            "runs": best.runs if best else None,
                            "error_worst": best.error if best else None,
                            "step_ratio": best.step.value if best and best.step else None,
                            "not_told_apart": ", ".join(other.name for other in r.rivals),
                            "evidence": r.evidence or r.reason,
                            "hardware": summary.hardware,
                        }
                    )
        return pd.DataFrame(rows)

    def runs(self) -> pd.DataFrame:
        """A row per run, with what it ran on."""
        records = [record for summary in self.problems for record in summary.records]
        rows = frame(records)
        known = [{"wall_seconds": r.wall_seconds} | {key: r.environment.get(key) for key in _WHERE} for r in records]
        where = pd.DataFrame(known, index=rows.index)
        return rows.assign(**{str(name): where[name] for name in where})

    def epochs(self) -> pd.DataFrame:
        """A row per training run and epoch: steps, seconds, loss, what was measured, worst orthogonality error."""
        rows = []
        for record in (r for summary in self.problems for r in summary.records if r.spec.kind == "quality"):
            for m in parsed(lines_of(record)):
                parts = {f"{part}_{key}": v for part in ("validation", "test") for key, v in m.get(part, {}).items()}
                told = {key: m[key] for key in ("epoch", "step", "seconds", "train_loss")}
                rows.append({"hash": record.spec.hash, **told, **parts, "error": m["orthogonality"]["worst"]})
        return pd.DataFrame(rows)

    def layers(self) -> pd.DataFrame:
        """A row per problem, setting, method, moment (start, end) and layer: energies, variance, redundancy, rate."""
        return pd.concat([why.frames(summary, "layers") for summary in self.problems], ignore_index=True)

    def dependence(self) -> pd.DataFrame:
        """A row per problem, setting, method, moment and pair of layers: how far one's step turns the other's gradient.

        ``degrees`` for a step of 1 % of the weight's length, ``degrees_per_step`` for an SGD step at the method's rate.
        """
        return pd.concat([why.frames(summary, "dependence") for summary in self.problems], ignore_index=True)

    def rates(self) -> pd.DataFrame:
        """A row per problem, setting, method, training step and layer: the effective rate."""
        return pd.concat([why.frames(summary, "rates") for summary in self.problems], ignore_index=True)

    def times(self, unit: Unit = "steps", device: str | None = None) -> pd.DataFrame:
        """Median steps or seconds to the target, cases × methods, of one device (that of the newest problem)."""
        return times(self._on(device), unit)

    def profile(self, unit: Unit = "steps", device: str | None = None) -> pd.DataFrame:
        """Dolan and Moré's performance profile of :meth:`times`: ρ(τ), a column per method run in every case."""
        return profile(self.times(unit, device))

    @cached_property
    def devices(self) -> list[str]:
        """The devices of the problems."""
        return list(dict.fromkeys(summary.device for summary in self.problems))

    def _on(self, device: str | None) -> list[Summary]:
        return [summary for summary in self.problems if summary.device == (device or self.devices[0])]

    def figures(self) -> dict[str, Figure]:
        """Every figure, by name."""
        drawn: dict[str, Figure] = {}
        for device in self.devices:
            if len(self.times("steps", device)) > 1:
                drawn[f"profile-{device}"] = figures.profiles(self._on(device))
        for summary in self.problems:
            for name, figure in problem_figures(summary):
                drawn[_name(summary, name, len(self.problems) > 1)] = figure
        return drawn


_WHERE = ("commit", "cpu", "cores", "threads", "gpu", "torch")


def problem_figures(summary: Summary) -> Iterable[tuple[str, Figure]]:
    """The figures of one problem with their names."""
    if summary.settings:  # cost runs alone have none
        yield "sensitivity", figures.sensitivity(summary)
        yield "defaults", figures.defaults(summary)
    for setting in summary.settings:
        yield setting.title, figures.curves(summary, setting)
        layers = why.Why(setting)
        for name, figure in (
            ("why", why_figures.depth(summary, layers)),
            ("dependence", why_figures.heat(summary, layers)),
        ):
            if figure is not None:
                yield f"{setting.title} {name}", figure


def table(summary: Summary) -> pd.DataFrame:
    """The rows of one problem as a frame."""
    return pd.DataFrame([_row(summary, setting, row) for setting in summary.settings for row in setting.rows])


def _row(summary: Summary, setting: Setting, row: Row) -> dict[str, Any]:
    environment: dict[str, Any] = next((r.environment for r in (*row.final, *row.tuning) if r.environment), {})
    cost = row.cost
    return {
        **_identity(summary),
        "setting": setting.title,
        "method": row.label,
        "faults": row.faults or None,
        "lr": row.choice.lr if row.choice else None,
        "knobs": ", ".join(f"{k}={v}" for k, v in row.choice.knobs) if row.choice else None,
        "lr_on_edge": row.edge,
        "state": row.state or "scored",
        **_interval(f"test_{summary.metric}", row.test),
        "n": row.runs,
        "failed": sum(row.failures.values()),
        "runs": row.runs,
        "rank": setting.rank(row),
        **{f"rank_at_{powers(tolerance)}": setting.rank(row, tolerance) for tolerance in TOLERANCES},
        "error_worst": row.error_worst,
        "error_final": row.error_final,
        "feasible_at": row.feasible,
        **_interval("steps_to_target", row.steps_to_target, "steps_"),
        **_interval("seconds_to_target", row.seconds_to_target, "seconds_"),
        "redundancy": row.redundancy,
        "step_ratio": cost.ratio if cost else None,
        "step_seconds": cost.step["median"] if cost else None,
        "constraint_share": cost.share if cost else None,
        "memory_bytes": cost.memory if cost else None,
        **(cost.counts if cost else {}),
        **{k: v for k, v in (cost.gpu if cost else {}).items() if k != "gpu_reason"},
        "cost_hardware": cost.hardware if cost else None,
        "default_validation": row.default.validation if row.default else None,
        "default_lr": row.default.choice.lr if row.default else None,
        "tuned_validation": row.tuned.validation if row.tuned else None,
        "tuning_runs": len(row.tuning),
        "tuning_failures": row.tuning_failures,
        **{name: environment.get(name) for name in _WHERE},
    }


def _identity(summary: Summary) -> dict[str, Any]:
    return {name: getattr(summary, name) for name in ("problem", "digest", "device", "dtype")}


def _interval(name: str, interval: Interval | None, prefix: str = "") -> dict[str, Any]:
    known = (interval.value, interval.low, interval.high) if interval else (None, None, None)
    return dict(zip((name, f"{prefix}low", f"{prefix}high"), known, strict=True))


def _name(summary: Summary, figure: str, many: bool) -> str:
    return "-".join([summary.problem, *([summary.device, summary.dtype] if many else []), figure])


def publish(
    records: Iterable[Record],
    faults: Iterable[str] = (),
    *,
    html: Path,
    figures: Path | None = None,
    console: Console | None = None,
) -> Report:
    """Print the tables and write report.html, summary and runs as CSV and, where pyarrow is there, as Parquet.

    Args:
        records, faults: as :func:`stiefel.compare.records.read_all` gives them.
        html: where the report goes; the tables go beside it.
        figures: a folder for every figure as PNG, or None.
        console: where to print.

    Returns:
        The report.
    """
    from rich.console import Console

    from stiefel.compare import terminal
    from stiefel.compare.page import write_html

    report, console = Report.of(records, faults), console or Console()
    for summary in reversed(report.problems):  # the newest last, where a terminal shows it
        for shown in terminal.terminal_tables(summary):
            console.print(shown)
        for note in (*summary.notes, *why.line(summary), *terminal.failure_lines(summary)):
            console.print(f"· {note}", highlight=False, markup=False)
    for note in report.notes:
        console.print(f"· {note}", highlight=False, markup=False)
    html.parent.mkdir(parents=True, exist_ok=True)
    write_html(report, html)
    written = {"report": [html], "tables": write_tables(report, html.parent)}
    if figures is not None:
        written |= {"figures": found} if (found := write_png(report, figures)) else {}
    for what, files in written.items():
        names = ", ".join(file.name for file in files[1:4]) + (" …" if len(files) > 4 else "")
        line = f"{what}: {files[0].resolve()}" + (f", {names}" if names else "")
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return report


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
        if column.dtype != object or known.empty:
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
