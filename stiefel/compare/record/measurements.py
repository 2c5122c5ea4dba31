"""The lines of measurements that a run has left. Imports ``records``."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from stiefel.compare.record.records import Record

_MEASURED = {"step", "seconds", "train_loss", "validation", "orthogonality"}  # keys that every row has


def lines_of(record: Record) -> list[str]:
    """A run's lines of measurements; none where they cannot be read: the record counts without them."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return (record.path / "metrics.jsonl").read_text().splitlines()
    return []


def parsed(lines: list[str]) -> list[dict[str, Any]]:
    """Measurements from their lines; none where one of them is torn, as a power cut leaves it."""
    try:
        rows = [json.loads(line) for line in lines]
    except ValueError:
        return []
    return rows if all(isinstance(row, dict) and row.keys() >= _MEASURED for row in rows) else []
