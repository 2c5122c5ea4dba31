"""What orthogonality costs, beside the peers: maps, steps, whole training steps, scaling, and layers at rest.

    python benchmarks/cost.py              # the short form, some minutes on two cores
    python benchmarks/cost.py --full       # all shapes and nets
    python benchmarks/cost.py --device cuda --full

Everything that is compared runs in one process, in rounds. Written under ``--out``: ``records.csv`` and
``records.json`` with a row per number (what was timed, on what hardware, by which versions), ``cost.md`` with tables
and the targets beside them, ``cost.png`` and ``cost.svg``. Peers that are not installed are named and left out;
``pip install 'stiefel[bench]'`` brings them.
"""

import argparse
import csv
import json
import sys
import time
import warnings
from pathlib import Path

import torch
from costs.picture import draw
from costs.sections import FORMS, SECTIONS, Bench, Record
from costs.tables import markdown

from stiefel.errors import OptionError
from stiefel.measure.cost.accelerator import device_of


def main(arguments: list[str] | None = None) -> int:
    """Measure, and write what was measured."""
    options = _parser().parse_args(arguments)
    try:
        device = device_of(options.device)
    except OptionError as error:
        print(error, file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of peers: they would break into the progress
    start = time.perf_counter()
    bench = Bench(
        FORMS[options.form],
        device,
        getattr(torch, options.dtype),
        tell=lambda line: print(f"{time.perf_counter() - start:6.0f} s  {line}", flush=True),
    )
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.sections:
        write(bench.run([name]), options.out, options.form)  # after each section, so that an interruption loses one
    print((options.out / "cost.md").read_text().partition("\n## ")[0].strip())
    print(f"\nmeasured in {time.perf_counter() - start:.0f} s; tables, picture and records are in {options.out}")
    return 0


def write(records: list[Record], out: Path, form: str) -> None:
    """Records as CSV and JSON, tables in Markdown, and the picture."""
    columns = list(dict.fromkeys(key for record in records for key in record))
    with (out / "records.csv").open("w", newline="") as stream:
        rows = csv.DictWriter(stream, columns)
        rows.writeheader()
        rows.writerows(records)
    (out / "records.json").write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    (out / "cost.md").write_text(markdown(records, form))
    draw(records, out)


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    form = parser.add_mutually_exclusive_group()
    for name in FORMS:
        form.add_argument(f"--{name}", dest="form", action="store_const", const=name, help=f"the {name} form")
    parser.set_defaults(form="short")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="default: all")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, xpu, mps, or auto")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--out", type=Path, default=Path("runs/cost"), help="folder to write to (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
