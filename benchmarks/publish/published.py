"""The published comparisons: run them, compact their records, and write the documents that say what the records do.

    python benchmarks/publish/published.py run omdsm         run what of it is missing, beside what is published: exit
                                                             status 1 where a score is not the published one
    python benchmarks/publish/published.py collect omdsm     its records into results/omdsm
    python benchmarks/publish/published.py readme            the documents, from results/

``comparisons.toml`` has their commands. Records go to ``runs/published/NAME``, a folder per comparison; a run that is
stopped goes on where it stopped. The experiments of ``talk.py`` write into ``results/`` themselves, by ``--out``.
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import tables
from experiments import Experiment
from matplotlib import pyplot
from stability import stability

from stiefel.compare import cli
from stiefel.compare.analyse.rows import Row
from stiefel.compare.analyse.statistics.differences import family
from stiefel.compare.present import formatting as words
from stiefel.compare.present.page import write_html
from stiefel.compare.present.publish import file_name, flat
from stiefel.compare.present.report import Report
from stiefel.compare.record.records import Record

HERE = Path(__file__).parent.parent
RUNS = Path("runs/published")
EI_QR = "riemannian:metric=euclidean,retraction=qr"
CI_QR = "riemannian:metric=canonical,retraction=qr"
FACTOR = 2.0
"""A learning rate counts as good where it ends within this factor of the best final metric."""

COMPARISONS: dict[str, dict[str, Any]] = tomllib.loads((HERE / "comparisons.toml").read_text())
"""What is run, by name."""
DOCUMENTS = {"README.md.j2": "README.md", "talk.md.j2": "../docs/talk.md", "findings.md.j2": "../docs/findings.md"}
"""Templates, and what is written from them."""


def command(name: str) -> list[str]:
    """The arguments of ``stiefel``, from the folder above this one."""
    file, *options = shlex.split(COMPARISONS[name]["run"])
    return ["compare", f"benchmarks/{file}", *options, "--out", str(RUNS / name)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, collect or write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    actions = parser.add_subparsers(dest="action", required=True)
    for action, text in (("run", "run a comparison"), ("collect", "compact its records into results/")):
        sub = actions.add_parser(action, help=text)
        sub.add_argument("names", nargs="+", choices=list(COMPARISONS))
        if action == "run":
            sub.epilog = "Further options go to stiefel compare: --jobs, --data-dir, --dry-run …"
    actions.add_parser("readme", help="write the documents")
    options, more = parser.parse_known_args(arguments)
    if more and options.action != "run":
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if options.action == "readme":
        for template, path in DOCUMENTS.items():
            (HERE / path).write_text(rendered(template))
        return 0
    for name in options.names:
        status = run(name, more) if options.action == "run" else collect(name, RUNS / name)
        if status:
            return status
    return 0


def run(name: str, more: Sequence[str]) -> int:
    """Run a comparison, and compare its results with the published ones."""
    print(f"stiefel {shlex.join([*command(name), *more])}\n", flush=True)
    status = cli.main([*command(name), *more])
    published = HERE / "results" / name
    if "--dry-run" in more or status not in (0, 3) or not published.is_dir():
        return status
    with TemporaryDirectory() as folder:
        write(frames(Report.read(RUNS / name)), Path(folder))
        said, apart = beside(tables.Result(Path(folder)), result_of(name))
    print(said)
    return 1 if apart else status


def beside(here: tables.Result, published: tables.Result) -> tuple[str, int]:
    """The scores of two runs of a comparison, and how many are not the published ones.

    Each is tested as methods are against each other: Welch's test, corrected by Holm's for their number. One that has
    a published score and none here differs too.
    """
    found = {
        f"{setting}, {method}": (method, setting)
        for setting in here.settings
        for method in here.methods
        if here.ran(method, setting) and method in published.among(setting)
    }
    known = {title: at for title, at in found.items() if at[0] in here.among(at[1])}
    pairs = [(here.sample(*at), published.sample(*at)) for at in known.values()]
    tested = dict(zip(known, family(pairs), strict=True))
    apart = {title for title in found if title not in known or tested[title].apart}
    lines = [
        f"{'≠' if title in apart else ' '} {title}: "
        f"{here.interval(*at) if title in known else 'failed'} → {published.interval(*at)}"
        for title, at in found.items()
    ]
    findable = [d.detectable for d in tested.values() if d.detectable is not None]
    head = f"{len(lines)} scores beside the published ones, here → published; ≠ where Welch's test tells them apart"
    if findable:
        head += f" (a difference of {np.median(findable):.2g} in the median would be told 4 times in 5)"
    return "\n".join([f"{head}:", *lines, f"{len(apart)} of {len(lines)} differ"]), len(apart)


def collect(name: str, records: Path) -> int:
    """Tables, report and figures of a folder of records into ``results/NAME``; curves of the reported runs alone."""
    report, folder = Report.read(records), HERE / "results" / name
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "report.html"
    page.unlink(missing_ok=True)
    if COMPARISONS[name].get("page"):
        write_html(report, page)
    runs = report.runs()
    reported, epochs = runs[runs.phase == "final"].hash, report.epochs()
    more = {
        "verdict": report.verdict(),
        "epochs": epochs[epochs.hash.isin(reported)],
        "layers": report.layers(),
        "dependence": report.dependence(),
    }
    if not report.problems[0].higher_is_better:
        more["stability"] = pd.DataFrame(map(asdict, stability(report.problems[0].records, FACTOR)))
    write(frames(report) | more, folder)
    draw(report, name, folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size / 1e6:.2f} MB")
    return 0


def frames(report: Report) -> dict[str, pd.DataFrame]:
    """What a :class:`tables.Result` is made of, by the names of its files."""
    return {"summary": report.table(), "runs": report.runs()}


def write(frames: Mapping[str, pd.DataFrame], folder: Path) -> None:
    """Frames as files, those that are not small compressed."""
    for what, rows in frames.items():
        if len(rows):
            small = what in ("summary", "verdict", "stability")
            # Without the time, so that the same records give the same file.
            packed = None if small else {"method": "gzip", "mtime": 0}
            compact(flat(rows)).to_csv(folder / f"{what}.csv{'' if small else '.gz'}", index=False, compression=packed)


def draw(report: Report, name: str, folder: Path) -> None:
    """The figures that are shown, each by the end of its name, and a sheet of samples where the runs have kept some."""
    for file in folder.glob("*.png"):
        file.unlink()
    figures = report.figures()
    for end in COMPARISONS[name].get("figures", ["sensitivity"]):
        (title,) = [title for title in figures if title.endswith(f"-{end}")]
        figures[title].savefig(folder / f"{file_name(end)}.png", dpi=80, facecolor="white")
    rows = [row for setting in report.problems[0].settings for row in setting.rows if row.final]
    kept = {row.label: _median(row).path / "samples.png" for row in rows}
    if all(path.is_file() for path in kept.values()):
        sheet, axes = pyplot.subplots(1, len(kept), figsize=(2.6 * len(kept), 2.9), layout="constrained")
        for ax, (label, path) in zip(axes, kept.items(), strict=True):
            ax.imshow(pyplot.imread(path), interpolation="nearest")
            ax.set_title(label, fontsize=9)
            ax.axis("off")
        sheet.savefig(folder / "samples.png", dpi=100, facecolor="white")


def _median(row: Row) -> Record:
    """The reported run with the median score."""
    return sorted(row.final, key=lambda record: row.scores[record.spec.seed])[len(row.final) // 2]


def compact(rows: pd.DataFrame) -> pd.DataFrame:
    """Without empty columns, and with six digits."""
    rows = rows.dropna(axis="columns", how="all")
    return rows.map(lambda value: float(f"{value:.6g}") if isinstance(value, float) else value)


def result_of(name: str) -> tables.Result:
    """A published comparison."""
    return tables.Result(HERE / "results" / name)


def rendered(template: str) -> str:
    """A document as it is to be, from its template and the results."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "publish"),
        autoescape=False,  # Markdown
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["exp"] = math.exp
    known = [name for name in COMPARISONS if (HERE / "results" / name).is_dir()]
    results = {name: result_of(name) for name in known}
    experiments = {
        folder.name: Experiment(folder) for folder in (HERE / "results").iterdir() if (folder / "rows.csv").is_file()
    }
    text = environment.get_template(template).render(
        **results,
        **experiments,
        results=results,
        commands={name: "stiefel " + shlex.join(command(name)) for name in known},
        asks={name: comparison["asks"] for name, comparison in COMPARISONS.items()},
        number=words.score,
        error=words.error,
        holds=holds,
        EI_QR=EI_QR,
        CI_QR=CI_QR,
    )
    # A claim that holds leaves spaces and empty lines behind: they go.
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE))


def holds(claim: bool) -> str:
    """An empty string where a claim of the text holds: a sentence must not outlive its numbers.

    Raises:
        AssertionError: the records say otherwise.
    """
    assert claim, "a template says what the records do not"
    return ""


if __name__ == "__main__":
    sys.exit(main())
