"""The claims of the author's talk on normalization and orthogonal weights, and others' results, one command each.

    python benchmarks/talk.py                          lists them
    python benchmarks/talk.py distortion               at a size that shows the effect: minutes
    python benchmarks/talk.py distortion --tiny        only that it runs: under a minute
    python benchmarks/talk.py omdsm -- --jobs 2        options after -- go to `stiefel compare`

Some are experiments of their own (``claims/``), which leave ``rows.csv``, ``figure.png`` and a sentence; others are
the published comparisons of methods (``comparisons.toml``), which leave a report.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import shlex
import sys
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stiefel.compare import cli

if TYPE_CHECKING:
    from claims.outcome import Claim

HERE = Path(__file__).parent
EXPERIMENTS = ("conditioning", "choices", "axes", "distortion", "signal", "rates", "depth", "pca")
COMPARISONS: dict[str, dict[str, str]] = tomllib.loads((HERE / "comparisons.toml").read_text())
"""What is asked, and the arguments of ``stiefel compare``: as published, and tiny."""


def main(arguments: list[str] | None = None) -> int:
    """List the claims, or try one."""
    given = sys.argv[1:] if arguments is None else arguments
    given, more = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("claim", nargs="?", choices=(*EXPERIMENTS, *COMPARISONS))
    parser.add_argument("--tiny", action="store_true", help="only that it runs")
    parser.add_argument("--out", type=Path, default=Path("runs/talk"), help="folder of the results")
    options = parser.parse_args(given)
    if options.claim is None:
        for name in (*EXPERIMENTS, *COMPARISONS):
            print(f"{name:18} {COMPARISONS[name]['asks'] if name in COMPARISONS else claim(name).says}")
        return 0
    folder = options.out / (f"{options.claim}-tiny" if options.tiny else options.claim)
    if options.claim in COMPARISONS:
        return compare(options.claim, folder, tiny=options.tiny, more=more)
    return experiment(options.claim, folder, tiny=options.tiny)


def claim(name: str) -> Claim[Any]:
    """An experiment's. Imported late, since that registers methods: a comparison loads what it needs itself."""
    found: Claim[Any] = importlib.import_module(f"claims.{name}").CLAIM
    return found


def compare(name: str, folder: Path, *, tiny: bool, more: list[str]) -> int:
    """Run a comparison."""
    comparison = COMPARISONS[name]
    file, *options = shlex.split(comparison["tiny" if tiny else "run"])
    command = ["compare", str(HERE / file), *options, *more, "--out", str(folder)]
    print(f"{comparison['asks']}\nstiefel {shlex.join(command)}\n", flush=True)
    return cli.main(command)


def experiment(name: str, folder: Path, *, tiny: bool) -> int:
    """Run an experiment, and write what it leaves."""
    found, start = claim(name), time.perf_counter()
    print(found.says, flush=True)
    outcome = found.run(found.tiny if tiny else found.shown)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "rows.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(outcome.rows[0]))
        writer.writeheader()
        writer.writerows(
            {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
            for row in outcome.rows
        )
    outcome.figure.savefig(folder / "figure.png", dpi=100)
    (folder / "sentence.txt").write_text(outcome.sentence + "\n")
    print(f"{outcome.sentence}\n{time.perf_counter() - start:.0f} s; written to {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
