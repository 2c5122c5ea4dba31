"""The published comparisons: run them, compact their records, and write README.md from what the records say.

    python benchmarks/publish/published.py run omdsm         run what of it is missing, beside what is published: exit
                                                             status 1 where a score is not the published one
    python benchmarks/publish/published.py collect omdsm     its records into results/omdsm
    python benchmarks/publish/published.py readme            README.md and docs/published_claims.md, from results/

Records go to ``runs/published/NAME``, a folder per comparison; a run that is stopped goes on where it stopped.
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from tempfile import TemporaryDirectory

import jinja2
import numpy as np
import pandas as pd
import tables
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
CAYT = "riemannian:metric=canonical,retraction=cayley"
QR = "qr_projection"
RENAMED = {"projection:map=qr": QR}
"""Methods that published records have under another name: that projection was the QR factor of X + U."""
FORMERLY = {"norm none": "batch_norm False", "norm batch": "batch_norm True"}
"""Values of factors, and what published records call them."""
FACTOR = 2.0
"""A learning rate counts as good where it ends within this factor of the best final metric."""

ARGUMENTS = {
    "omdsm": f"""omdsm.py --budget small --bias True --seeds 5 --methods unconstrained own own_pca soft {EI_QR} {CI_QR}
        {CAYT} {QR} pogo landing ei_qr_as_released ci_qr_as_released cayt_as_released qr_as_released""",
    "momentum": f"""momentum.py --budget small --bias True --depth 4 8 --seeds 5 --trials 7
        --methods unconstrained own {EI_QR} {CI_QR}""",
    "mlp": """mlp.py --budget small --norm none batch --seeds 5 --trials 7
        --methods unconstrained weight_norm own own:scale=learnable riemannian projection soft pogo""",
    "cnn": """cnn.py --budget small --layers all first first4 --seeds 5 --trials 7 --scale relu
        --methods unconstrained weight_norm own riemannian projection soft pogo""",
    "rnn": """rnn.py --budget small --seeds 5 --lr 0.0001 0.001 0.01 0.1 --trials 6
        --methods unconstrained own oni riemannian retraction pogo landing soft""",
    "copying": """rnn.py --budget small --task copying --studies 5 --extend --no-cost --lr 3e-4 1e-3 3e-3 1e-2
        --trials 6 --methods unconstrained default own riemannian retraction pogo landing soft""",
    "closed_form": """closed_form.py --budget small --seeds 5 --lr 0.01 0.1 1 10 --trials 6
        --methods unconstrained own oni cayley riemannian retraction projection pogo landing soft""",
    "gan": """gan.py --budget small --seeds 5 --lr 1e-5 1e-4 3e-4 1e-3 3e-3 1e-2 --trials 6 --no-cost
        --methods unconstrained spectral_norm own oni""",
}
"""What is run, by name: ``stiefel compare benchmarks/…``."""
SINCE = {"copying"}
"""Those that 0.1.0 had not, whose claims are not among its own."""
DOCUMENTS = {"README.md.j2": "README.md", "published_claims.md.j2": "../docs/published_claims.md"}
"""Templates, and what is written from them."""
OVER = {"omdsm": "depth", "momentum": "depth"}
"""Factors over which verdicts average, seed by seed."""


def command(name: str) -> list[str]:
    """The arguments of ``stiefel``, from the folder above this one."""
    file, *options = shlex.split(ARGUMENTS[name])
    return ["compare", f"benchmarks/{file}", *options, "--out", str(RUNS / name)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, collect or write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    actions = parser.add_subparsers(dest="action", required=True)
    for action, text in (("run", "run a comparison"), ("collect", "compact its records into results/")):
        sub = actions.add_parser(action, help=text)
        sub.add_argument("names", nargs="+", choices=list(ARGUMENTS))
        if action == "run":
            sub.epilog = "Further options go to stiefel compare: --jobs, --data-dir, --dry-run …"
    actions.add_parser("readme", help="write README.md and docs/published_claims.md")
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
    formerly = {new: old for old, new in RENAMED.items()}
    found: dict[str, tuple[tuple[str, str], tuple[str, str]]] = {}
    for setting in here.settings:
        then = reduce(lambda text, pair: text.replace(*pair), FORMERLY.items(), setting)
        for method in here.methods:
            names = (formerly.get(method, method), method)
            before = next((name for name in names if name in published.among(then)), None)
            if before is not None and here.ran(method, setting):
                found[f"{setting}, {method}"] = (method, setting), (before, then)
    known = {title: (now, then) for title, (now, then) in found.items() if now[0] in here.among(now[1])}
    pairs = [(here.sample(*now), published.sample(*then)) for now, then in known.values()]
    tested = dict(zip(known, family(pairs), strict=True))
    apart = {title for title in found if title not in known or tested[title].apart}
    lines = [
        f"{'≠' if title in apart else ' '} {title}: "
        f"{here.interval(*now) if title in known else 'failed'} → {published.interval(*then)}"
        for title, (now, then) in found.items()
    ]
    findable = [d.detectable for d in tested.values() if d.detectable is not None]
    head = f"{len(lines)} scores beside the published ones, here → published; ≠ where Welch's test tells them apart"
    if findable:
        head += f" (a difference of {np.median(findable):.2g} in the median would be told 4 times in 5)"
    return "\n".join([f"{head}:", *lines, f"{len(apart)} of {len(lines)} differ"]), len(apart)


def collect(name: str, runs: Path) -> int:
    """Tables, report and figures of a folder of records into ``results/NAME``."""
    report, folder = Report.read(runs), HERE / "results" / name
    folder.mkdir(parents=True, exist_ok=True)
    write_html(report, folder / "report.html")
    more = {"epochs": report.epochs(), "layers": report.layers(), "dependence": report.dependence()}
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
            small = what in ("summary", "stability")
            # Without the time, so that the same records give the same file.
            packed = None if small else {"method": "gzip", "mtime": 0}
            compact(flat(rows)).to_csv(folder / f"{what}.csv{'' if small else '.gz'}", index=False, compression=packed)


SHOWN = {
    "omdsm": (
        "sensitivity",
        "depth 8, scale 1",
        "depth 8, scale √2",
        "depth 8, scale √2 why",
        "depth 8, scale √2 dependence",
    ),
    "momentum": ("sensitivity",),
    "mlp": ("sensitivity",),
    "cnn": ("sensitivity",),
    "rnn": ("sensitivity", "task copying, scale 1", "task digits, scale 1"),
    "copying": ("sensitivity", "scale 1", "scale 1 why"),
    "closed_form": ("task procrustes, scale 1", "task pca, scale 1"),
    "gan": ("sensitivity",),
}
"""The figures that README.md shows: the ends of their names."""


def draw(report: Report, name: str, folder: Path) -> None:
    """The figures that are shown, and a sheet of samples where the runs have kept some."""
    for file in folder.glob("*.png"):
        file.unlink()
    figures = report.figures()
    for end in SHOWN[name]:
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
    return tables.Result(HERE / "results" / name, OVER.get(name, ""))


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
    results = {name: result_of(name) for name in ARGUMENTS}
    old = {name: result for name, result in results.items() if name not in SINCE}
    shown = {name: "stiefel " + shlex.join(command(name)) for name in ARGUMENTS}
    text = environment.get_template(template).render(
        results=old,
        **{name.replace("-", "_"): result for name, result in results.items()},
        commands=shown,
        totals=_totals(list(old.values())),
        refused_costs=tuple(map(sum, zip(*(result.refused for result in results.values()), strict=True))),
        recall="task copying, scale 1",
        digits="task digits, scale 1",
        pca="task pca, scale 1",
        procrustes="task procrustes, scale 1",
        number=words.score,
        error=words.error,
        holds=holds,
        EI_QR=EI_QR,
        CI_QR=CI_QR,
        CAYT=CAYT,
    )
    # A claim that holds leaves spaces behind, alone in a line or at the end of one: they go.
    return re.sub(r"[ \t]+$", "", re.sub(r"\n[ \t]+(?=\n)", "", text), flags=re.MULTILINE)


def _totals(results: Sequence[tables.Result]) -> dict[str, list[int]]:
    """Sums over the comparisons of what each counts of its best methods and of no constraint."""
    counts = {what: [getattr(result, what)() for result in results] for what in ("compared", "claimed", "survive")}
    return {what: [sum(part) for part in zip(*found, strict=True)] for what, found in counts.items()}


def holds(claim: bool) -> str:
    """An empty string where a claim of the text holds: a sentence must not outlive its numbers.

    Raises:
        AssertionError: the records say otherwise.
    """
    assert claim, "README.md.j2 says what the records do not"
    return ""


if __name__ == "__main__":
    sys.exit(main())
