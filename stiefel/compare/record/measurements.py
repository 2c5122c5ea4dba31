"""The lines of measurements that a run has left. Imports ``records`` and ``check``."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from typing import Any

from stiefel.compare.record.check import row_of
from stiefel.compare.record.records import Record


def lines_of(record: Record) -> list[str]:
    """A run's lines of measurements, of which some may be torn; none where the file cannot be read."""
    with contextlib.suppress(OSError):
        text = (record.path / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
        return [line for line in text.split("\n") if line]
    return []


def parsed(lines: Iterable[str]) -> list[dict[str, Any]]:
    """Measurements from their lines, without those that are torn, as a power cut or a copy that broke off leaves them.

    Nor are those kept that no run has written.
    """
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            row = row_of(json.loads(line))
            rows += [] if row is None else [row]
    return rows
