"""Train random configurations: each stays within its method's claim, or is refused by an error that names what for.

    python tests/fuzz.py --count 1000 --seed 1            a histogram, and an example of each kind of failure
    python tests/fuzz.py --seed 1 --only 17 -v            one of them again
    make fuzz ARGS="--count 10000 --seed 7 --jobs 2"

What is drawn: ``fuzzing/configuration.py``; what is looked at: ``fuzzing/trial.py`` and ``fuzzing/judge.py``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from fuzzing.configuration import Configuration, draw, simpler
from fuzzing.judge import SLOW, Verdict, judge

Result = tuple[int, Configuration, Verdict]


def run(number: int, seed: int) -> Result:
    """Draw and judge one configuration."""
    c = draw(seed, number)
    return number, c, judge(c)


def reduced(c: Configuration, kind: str) -> Configuration:
    """A configuration that fails in the same way, of which nothing can be left out."""
    simplest = [] if kind == SLOW else simpler(c)
    while simplest:
        verdict = judge(simplest[0])
        if (verdict.outcome, verdict.kind) == ("failed", kind):
            c, simplest = simplest[0], simpler(simplest[0])
        else:
            simplest = simplest[1:]
    return c


def results(numbers: Iterable[int], seed: int, jobs: int) -> Iterator[Result]:
    """Those of several configurations, in any order."""
    torch.set_num_threads(1)
    if jobs == 1:
        yield from (run(number, seed) for number in numbers)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, torch.set_num_threads, (1,)) as pool:
        yield from pool.imap_unordered(partial(run, seed=seed), numbers, chunksize=8)


def describe(found: list[Result], seed: int, reduce: bool) -> Iterator[str]:
    """The histogram of outcomes, and the simplest example of each kind of failure."""
    outcomes = Counter((v.outcome, v.kind) for *_, v in found)
    for (outcome, kind), count in sorted(outcomes.items(), key=lambda item: (item[0][0] == "failed", -item[1])):
        yield f"{count:6}  {outcome} {kind}"
        if outcome == "failed":
            failures = [(n, c, v) for n, c, v in found if (v.outcome, v.kind) == (outcome, kind)]
            number, c, verdict = min(failures, key=lambda result: len(str(result[1])))
            yield f"        by {dict(Counter(c.method for _, c, _ in failures).most_common(8))}"
            yield f"        python tests/fuzz.py --seed {seed} --only {number} -v"
            yield f"        {reduced(c, kind) if reduce else c}"
            yield f"        {verdict.detail[:300]}"


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 where a configuration failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=1000, help="how many configurations")
    parser.add_argument("--seed", type=int, default=0, help="of all of them")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--only", type=int, help="the number of one configuration")
    parser.add_argument("--as-drawn", action="store_true", help="do not reduce the examples")
    parser.add_argument("-v", action="store_true", help="print every configuration with its verdict")
    chosen = parser.parse_args(arguments)
    numbers = range(chosen.count) if chosen.only is None else [chosen.only]
    found, start, failed = [], time.perf_counter(), 0
    for result in results(numbers, chosen.seed, chosen.jobs):
        found.append(result)
        failed += result[2].outcome == "failed"
        if chosen.v:
            print(*result, sep="  ")
        elif len(found) % 100 == 0:
            print(f"{len(found)} of {len(numbers)}, {failed} failed, {time.perf_counter() - start:.0f} s", flush=True)
    for line in describe(found, chosen.seed, not chosen.as_drawn and chosen.only is None):
        print(line, flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
