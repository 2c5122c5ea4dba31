"""All that is to be measured on a GPU, by one command: ``make gpu``.

    python benchmarks/gpu.py                 # tests of the device, what methods cost there, a small comparison
    python benchmarks/gpu.py --parts tests   # one of its parts
    python benchmarks/gpu.py --dry-run       # the same on a machine without one: a stand-in, and the CPU

Written below ``benchmarks/results/gpu/<name of the device>``: ``environment.json`` (device, driver, versions, power
limit), ``tests.txt``, the records of the cost benchmark, and those of the comparison with memory and energy. Parts that
take longer than their share of what is left of ``--minutes`` are ended, and what they have written by then stays.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from stiefel.errors import OptionError
from stiefel.measure.cost.accelerator import device_of, name_of
from stiefel.measure.cost.environment import environment

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("tests", "kernels", "cost", "comparison")
TOLD = ("name", "driver_version", "power.limit", "clocks.max.sm", "memory.total", "mig.mode.current")
"""What the driver is asked for."""


@dataclass(frozen=True)
class Part:
    """A part of the run.

    Args:
        name: of its output.
        command: after the interpreter.
        share: of the minutes, beside the parts that come after it.
    """

    name: str
    command: list[str]
    share: float


def parts(device: str, out: Path, dry: bool) -> list[Part]:
    """What is run, in this order."""
    tests = "tests/laws/test_elsewhere.py" if dry else "tests/laws/test_devices.py"
    sections = ["rest"] if dry else ["maps", "steps", "training", "rest"]
    form = ["--tiny"] if dry else ["--short"]
    methods = ["own", "riemannian", "pogo", "soft", "unconstrained", "default"]
    tried = ["--lr", "0.1", "1", "--trials", "3", "--studies", "3"]
    cores = os.cpu_count() or 1
    beside = ["-n", str(min(8, cores))] if not dry and find_spec("xdist") else []
    # Runs side by side do not fill a GPU; those whose time is reported run alone, after the others.
    jobs = str(max(1, min(6, cores // 2)))
    comparison = ["--budget", "tiny", "--depth", "4", "--scale", "relu", *tried]
    return [
        Part(
            "tests",
            ["-m", "pytest", "-q", "-p", "no:cacheprovider", tests, *(["-k", "stand_in"] if dry else beside)],
            0.4,
        ),
        *([] if dry else [Part("kernels", ["benchmarks/budget.py", "--kernels"], 0.1)]),
        Part(
            "cost",
            ["benchmarks/cost.py", "--device", device, *form, "--sections", *sections, "--out", str(out / "cost")],
            0.4,
        ),
        Part(
            "comparison",
            [
                *("-m", "stiefel", "compare", "benchmarks/omdsm.py", "--methods", *methods, *comparison),
                *("--device", device, "--jobs", jobs, "--out", str(out / "comparison")),
                *(["--dry-run"] if dry else []),
            ],
            0.2,
        ),
    ]


def described(device: torch.device) -> dict[str, Any]:
    """What the run was made on; the driver's words are null with the reason where there is none."""
    found: dict[str, Any] = {**environment(device), "cuda": torch.version.cuda, "driver": None, "driver_reason": None}
    try:
        query = ["nvidia-smi", f"--query-gpu={','.join(TOLD)}", "--format=csv,noheader"]
        line = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0]
        found["driver"] = dict(zip(TOLD, (cell.strip() for cell in line.split(",")), strict=True))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError) as error:
        found["driver_reason"] = f"nvidia-smi: {type(error).__name__}: {error}"
    return found


def run(part: Part, out: Path, seconds: float) -> bool:
    """Run a part for so long at most; its output is shown and kept. Whether it ended well."""
    print(f"{part.name}: {' '.join(part.command)}", flush=True)
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("", "benchmarks", "tests", "tests/laws", "tests/support"))
    start = time.monotonic()
    with (out / f"{part.name}.txt").open("w", encoding="utf-8") as log:
        try:
            code = subprocess.run(
                [sys.executable, *part.command],
                cwd=ROOT,
                env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": paths},
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=seconds,
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
    lines = (out / f"{part.name}.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    print("\n".join(f"    {line}" for line in lines[-6:]))
    how = {0: "ended well", -1: "was ended: its share of the time was over"}.get(code, f"failed (exit status {code})")
    print(f"{part.name} {how}, after {time.monotonic() - start:.0f} s", flush=True)
    return code == 0


def main(arguments: list[str] | None = None) -> int:
    """Run all parts, one after the other; the exit status is 1 where one did not end well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="cuda, xpu, or auto (default)")
    parser.add_argument("--minutes", type=float, default=12.0, help="for all parts (default 12)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--out", type=Path, help="folder (default benchmarks/results/gpu/<device>)")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with a stand-in for the device")
    given = parser.parse_args(arguments)
    try:
        device = device_of("cpu" if given.dry_run else given.device)
    except OptionError as error:
        print(error, file=sys.stderr)
        return 2
    if device.type == "cpu" and not given.dry_run:
        print("there is no accelerator on this machine that torch can use; try --dry-run", file=sys.stderr)
        return 2
    name = re.sub(r"\W+", "-", (name_of(device) or "dry run").lower()).strip("-")
    out = given.out or ROOT / "benchmarks" / "results" / "gpu" / name
    out.mkdir(parents=True, exist_ok=True)
    (out / "environment.json").write_text(json.dumps(described(device), indent=1) + "\n", encoding="utf-8")
    chosen = [part for part in parts(device.type, out, given.dry_run) if part.name in given.parts]
    start, ended = time.monotonic(), []
    for i, part in enumerate(chosen):
        left = 60 * given.minutes - (time.monotonic() - start)
        ended.append(run(part, out, max(left, 0.0) * part.share / sum(later.share for later in chosen[i:])))
    print(f"records are in {out}")
    return 0 if all(ended) else 1


if __name__ == "__main__":
    sys.exit(main())
