"""Specs and records of a small problem, for tests of the comparison."""

from pathlib import Path

from stiefel.compare.record.records import Record
from stiefel.compare.record.spec import RunSpec

OMDSM = Path(__file__).parents[2] / "benchmarks" / "omdsm.py"


def spec(**changes):
    base = {
        "kind": "quality",
        "phase": "tuning",
        "problem": "toy",
        "digest": "d",
        "fields": {"depth": 4},
        "method": "own",
    }
    return RunSpec(**{**base, "options": {"scale": 1.0}, "lr": 0.1, "seed": 0, **changes})


def record(lr, value, status="done", seed=0, **changes):
    summary = {"best_validation": value}
    return Record(Path("."), spec(lr=lr, seed=seed, **changes), status, None, summary, {})
