"""Kill the driver of a comparison at random moments, start it again, and see that nothing is lost or done twice.

    python tests/support/kill_and_resume.py [KILLS] [SEED]       20 kills of a grid of 40 runs, by default

Each run of the grid writes a line where it begins and one where it ends. After the last resume, every record that was
there at a kill must be there unchanged, every run must have begun once and ended once, and none may be missing. A run
that is going on when its driver is killed goes on, and the next driver waits for it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from stiefel.compare.plan.plan import RACE_SEEDS, RACED

PROBLEM = """
import multiprocessing, os, time
from dataclasses import dataclass
from pathlib import Path
import torch
from torch import nn
from stiefel.compare import Data, Problem

WITNESS = Path(__file__).with_name("witness.txt")

@dataclass(frozen=True, kw_only=True)
class Slow(Problem):
    epochs: int = 2
    batch_size: int = 16
    pause: float = 0.15

    def make_model(self):
        return nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 2))

    def make_data(self):
        x = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))
        y = (x[:, 0] > 0).long()
        return Data((x[:64], y[:64]), (x[64:80], y[64:80]), (x[80:], y[80:]))

    def measure(self, model, batches):
        self.witness("epoch")
        time.sleep(self.pause)
        return super().measure(model, batches)

    def witness(self, what):
        run = multiprocessing.current_process().name  # of a forked run, its hash
        line = f"{what} {run} {os.getpid()}\\n"
        descriptor = os.open(WITNESS, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, line.encode())
        os.close(descriptor)
"""


@dataclass(frozen=True)
class Outcome:
    """What a drill found: kills done, runs, and how many records were lost, changed, missing, or run twice."""

    kills: int
    runs: int
    finished_at_kills: tuple[int, ...]
    changed: int
    twice: int
    missing: int
    seconds: float

    @property
    def passed(self) -> bool:
        return self.changed == self.twice == self.missing == 0


def kill_and_resume(folder: Path, kills: int, seed: int, methods: int = 2, rates: int = 5, seeds: int = 3) -> Outcome:
    """Run a grid of ``methods · (rates · seeds + 4 · min(3, rates) + 5)`` runs with ``kills`` kills in between."""
    problem, runs, witness = folder / "slow.py", folder / "runs", folder / "witness.txt"
    problem.write_text(PROBLEM)
    command = [sys.executable, "-m", "stiefel", "compare", str(problem), "--jobs", "2", "--scale", "1", "--no-cost"]
    command += ["--methods", *["own", "soft"][:methods], "--lr", *[str(0.01 * (k + 1)) for k in range(rates)]]
    command += ["--tuning-seeds", str(seeds), "--seeds", "5", "--out", str(runs)]
    moments, seen, finished, start = random.Random(seed), {}, [], time.monotonic()
    for _ in range(kills):
        driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if moments.random() < 0.2:  # while it starts
            time.sleep(moments.uniform(0.0, 5.0))
        else:  # while runs start, go on, and end: each takes half a second
            begun = size(witness)
            while size(witness) == begun and driver.poll() is None:
                time.sleep(0.01)
            time.sleep(moments.uniform(0.0, 2.0))
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        now = snapshot(runs)
        finished.append(len(now))
        seen = now | seen
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    last = snapshot(runs)
    processes = {tuple(line.split()[1:]) for line in witness.read_text().splitlines()}
    begun = Counter(run for run, _ in processes if len(run) == 16)
    expected = methods * (rates * seeds + RACE_SEEDS * min(RACED, rates) + 5)
    return Outcome(
        kills=kills,
        runs=expected,
        finished_at_kills=tuple(finished),
        changed=sum(last.get(name) != text for name, text in seen.items()),
        twice=sum(count > 1 for count in begun.values()),
        missing=expected - len(last),
        seconds=time.monotonic() - start,
    )


def size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def snapshot(runs: Path) -> dict[str, tuple[int, str]]:
    """The records that are there, each of which must be whole."""
    found = {}
    for path in runs.glob("*/run.json"):
        text = path.read_text()
        json.loads(text)
        found[path.parent.name] = (path.stat().st_mtime_ns, text)
    return found


if __name__ == "__main__":
    count, first = (int(text) for text in (*sys.argv[1:], *("20", "0")[len(sys.argv) - 1 :]))
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        outcome = kill_and_resume(Path(scratch), count, first)
    print(outcome)
    sys.exit(not outcome.passed)
