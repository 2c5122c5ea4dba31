"""How many learning rates end near the best: a table of the tuning runs in folders of records.

    python benchmarks/publish/stability.py runs/ --factor 2

For metrics that are positive and better when smaller, as a distance or a gap is.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stiefel.compare.record.records import ENDED, Record, read_all
from stiefel.errors import ProblemError


@dataclass(frozen=True)
class Stability:
    """Of one method in one setting: its rates, and how many of them ended within a factor of the best final metric.

    ``own`` counts from the method's own best, ``all`` from the best of all methods of the setting. A rate at which a
    run did not end counts as tried.
    """

    setting: str
    method: str
    rates: int
    own: int
    all: int


def stability(records: Iterable[Record], factor: float) -> list[Stability]:
    """A row per setting and method, from tuning runs at the methods' default knobs; a rate's seeds are averaged."""
    ends: dict[str, dict[str, dict[float, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for record in records:
        spec = record.spec
        if (spec.kind, spec.phase) != ("quality", "tuning") or spec.knobs or record.status == "skipped":
            continue
        if record.summary.get("higher_is_better", False):
            raise ProblemError(f"{spec.problem}: a factor of the best says nothing where more is better")
        factors = ", ".join(f"{name}={value}" for name, value in sorted(spec.fields.items()))
        final = record.summary.get("final_validation") if record.status in ENDED else None
        ends[f"{spec.problem}, {factors}, scale={spec.options.get('scale')}"][record.label][spec.lr].append(
            float("inf") if final is None else final
        )
    rows = []
    for setting, methods in ends.items():
        means = {m: [sum(v) / len(v) for v in rates.values()] for m, rates in methods.items()}
        best = min(min(values) for values in means.values())
        for method, values in means.items():
            # Around the method's own best, then the best of all; runs that failed are infinite and never near.
            near = [sum(v <= factor * b < float("inf") for v in values) for b in (min(values), best)]
            rows.append(Stability(setting, method, len(values), *near))
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--factor", type=float, default=2.0)
    arguments = parser.parse_args()
    rows = stability(read_all(arguments.folders)[0], arguments.factor)
    for setting in dict.fromkeys(row.setting for row in rows):
        print(
            f"\n{setting}\n\n| method | within {arguments.factor:g}× its own best | of the best of all |\n|---|---|---|"
        )
        for row in sorted((r for r in rows if r.setting == setting), key=lambda r: (-r.all, -r.own, r.method)):
            print(f"| `{row.method}` | {row.own} of {row.rates} rates | {row.all} of {row.rates} |")


if __name__ == "__main__":
    main()
