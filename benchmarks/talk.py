"""The claims of the author's talk on normalization and orthogonal weights, and others' results, one command each.

    python benchmarks/talk.py                          lists them
    python benchmarks/talk.py distortion               at a size that shows the effect: minutes
    python benchmarks/talk.py distortion --tiny        only that it runs: under a minute
    python benchmarks/talk.py omdsm -- --jobs 2        options after -- go to `stiefel compare`

Some are experiments of their own (``claims/``), which leave ``rows.csv``, ``figure.png`` and a sentence; others are
comparisons of methods, which leave a report.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stiefel.compare import cli

if TYPE_CHECKING:
    from claims.outcome import Claim

HERE = Path(__file__).parent
EXPERIMENTS = ("conditioning", "choices", "axes", "distortion", "signal", "rates", "depth", "pca")
PAPER = """unconstrained default own olm_as_released own_pca soft riemannian:metric=euclidean,retraction=qr
    ei_qr_as_released"""
COMPARISONS = {
    "small_batches": (
        "Batch normalization fails in small batches; layers, groups and orthogonal weights do not need them large.",
        "mlp.py --norm none batch layer group --methods own unconstrained --scale relu --no-cost",
        "--batch-size 2 16 128 --epochs 3 --lr 0.01 0.1 0.3 1 --studies 2",
        "--batch-size 32 256 --epochs 1 --seeds 2 --lr 0.1",
    ),
    "omdsm": (
        "On several dependent Stiefel manifolds OWN trains where penalties and Riemannian methods do not.",
        f"omdsm.py --bias True False --scale 1 --no-cost --methods {PAPER}",
        "--depth 8 --epochs 35 --lr 0.1 0.3 1 3 10 --studies 2",
        "--budget tiny --bias False --seeds 2 --lr 0.3",
    ),
    "convolutions": (
        "Orthogonal convolutions help: all of them, or the first few; with batch normalization too.",
        "cnn.py --methods own unconstrained --scale relu --no-cost",
        "--layers all first4 first2 first --norm none batch --lr 0.03 0.1 0.3 1 --studies 3",
        "--budget tiny --net vgg --layers all first --norm none batch --seeds 2 --lr 0.05",
    ),
    "networks": (
        "So it is in batch-normalized Inception and in wide ResNets.",
        "cnn.py --net inception wrn --methods own unconstrained --scale 1 --no-cost --pixels 8",
        "--layers all first --epochs 3 --batch-size 64 --width 0.0625 --examples 1024 --lr 0.03 0.1 0.3 --studies 2",
        "--budget tiny --layers all --seeds 2 --lr 0.05",
    ),
    "groups": (
        "Groups of rows trade orthogonality against capacity.",
        "cnn.py --methods own --scale relu --no-cost",
        "--groups 1 16 32 64 --norm none batch --lr 0.03 0.1 0.3 1 --studies 3",
        "--budget tiny --net vgg --groups 1 16 --seeds 2 --lr 0.05",
    ),
    "adam": (
        "By Adam too.",
        "mlp.py --optim adam --methods own own:scale=learnable weight_norm unconstrained default --no-cost",
        "--scale relu --lr 0.0003 0.001 0.003 0.01 0.03 --studies 3",
        "--epochs 1 --seeds 2 --lr 0.003",
    ),
    "gan": (
        "A constrained discriminator makes the game of a GAN steadier.",
        "gan.py --methods own spectral_norm unconstrained --no-cost",
        "--epochs 2 20 --lr 3e-4 1e-3 3e-3 --studies 2",
        "--budget tiny --seeds 2 --lr 1e-3",
    ),
    "memory": (
        "Orthogonal recurrent matrices remember for longer: copying over 100 and 200 steps.",
        "rnn.py --methods own riemannian unconstrained --no-cost",
        "--task copying --delay 100 200 --epochs 10 --lr 3e-4 1e-3 3e-3 --studies 2",
        "--budget tiny --task copying --seeds 2 --lr 1e-3",
    ),
    "pixels": (
        "And over the 784 pixels of an image.",
        "rnn.py --methods own riemannian unconstrained --no-cost",
        "--task digits --data fashion-mnist --examples 2048 --epochs 5 --lr 3e-4 1e-3 3e-3 --studies 2",
        "--budget tiny --task digits --seeds 2 --lr 1e-3",
    ),
}
"""A claim, the comparison that tries it, and its options at the size that shows the effect and at the tiny one."""


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
            print(f"{name:15} {COMPARISONS[name][0] if name in COMPARISONS else claim(name).says}")
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
    says, what, shown, small = COMPARISONS[name]
    file, *options = shlex.split(f"{what} {small if tiny else shown}")
    command = ["compare", str(HERE / file), *options, *more, "--out", str(folder)]
    print(f"{says}\nstiefel {shlex.join(command)}\n", flush=True)
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
        writer.writerows(outcome.rows)
    outcome.figure.savefig(folder / "figure.png", dpi=150)
    (folder / "sentence.txt").write_text(outcome.sentence + "\n")
    print(f"{outcome.sentence}\n{time.perf_counter() - start:.0f} s; written to {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
