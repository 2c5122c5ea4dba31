"""Records on disk: a folder per run with ``run.json`` and ``metrics.jsonl``, and reading them. Imports ``spec``.

``run.json`` appears by an atomic rename when a run has ended: where it is missing, the run has not ended.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stiefel.compare.spec import SCHEMA, RunSpec

if TYPE_CHECKING:
    import pandas as pd

ENDED = ("done", "target missed")
"""The statuses of a run that trained to its end; the others are diverged, timeout, error and skipped."""


class RunFolder:
    """The folder of one run, for the process that writes it."""

    def __init__(self, root: Path, spec: RunSpec) -> None:
        self.path = root / spec.hash
        self.spec = spec

    def start(self) -> None:
        """Create the folder and drop what an earlier or interrupted attempt left in it."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "run.json").unlink(missing_ok=True)
        (self.path / "metrics.jsonl").write_text("")

    def append(self, row: dict[str, Any]) -> None:
        """Add a row of measurements."""
        with (self.path / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps(_plain(row)) + "\n")

    def finish(self, outcome: dict[str, Any], environment: dict[str, Any]) -> None:
        """Write the record, at once."""
        self.path.mkdir(parents=True, exist_ok=True)
        record = {"schema": SCHEMA, "hash": self.spec.hash, "spec": self.spec.to_dict(), **outcome}
        temporary = self.path / f"run.json.{os.getpid()}"
        temporary.write_text(json.dumps(_plain({**record, "environment": environment}), indent=1))
        temporary.replace(self.path / "run.json")


@dataclass(frozen=True)
class Record:
    """One finished run as read from disk."""

    path: Path
    spec: RunSpec
    status: str
    reason: str | None
    summary: dict[str, Any]
    environment: dict[str, Any]
    written: float = 0.0

    def metrics(self) -> list[dict[str, Any]]:
        """Its rows of measurements."""
        lines = (self.path / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


def read(path: Path) -> Record | None:
    """The record in a run's folder; None where it has not ended, or was written by another schema."""
    try:
        raw = json.loads((path / "run.json").read_text())
        if raw["schema"] != SCHEMA:
            return None
        spec = RunSpec.from_dict(raw["spec"])
        written = (path / "run.json").stat().st_mtime
        return Record(path, spec, raw["status"], raw["reason"], raw["summary"], raw["environment"], written)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_all(roots: Iterable[Path]) -> Iterator[Record]:
    """All records below some folders, in a fixed order."""
    for root in roots:
        for path in sorted(Path(root).glob("*/run.json")):
            record = read(path.parent)
            if record is not None:
                yield record


def frame(records: Iterable[Record]) -> pd.DataFrame:
    """A row per run: spec, status, summary, with the problem's factors and the scale as columns."""
    import pandas as pd

    rows = []
    for record in records:
        spec = record.spec
        flat = {k: v for k, v in spec.to_dict().items() if k not in ("fields", "options", "schema")}
        scale = spec.options.get("scale", 1.0)
        rows.append(
            {**flat, **spec.fields, "scale": scale, "label": spec.label, "hash": spec.hash, "status": record.status}
            | {"reason": record.reason, **record.summary}
        )
    return pd.DataFrame(rows)


def _plain(value: Any) -> Any:
    """Data that strict JSON can hold: non-finite numbers become None."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
