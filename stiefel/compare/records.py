"""Records on disk: a folder per run with ``run.json`` and ``metrics.jsonl``, and reading them. Imports ``spec``.

``run.json`` appears by an atomic rename when a run has ended: where it is missing, the run has not ended. What the
run's process printed is in ``output.txt``.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stiefel.compare.spec import SCHEMA, RunSpec
from stiefel.errors import RecordError, StorageError

if TYPE_CHECKING:
    import pandas as pd

ENDED = ("done", "target missed")
"""The statuses of a run that trained to its end."""
BROKEN = ("error", "crashed", "out of memory", "timeout")
"""Those of a run that did not, for reasons that may lie outside the method: what ``--retry-failed`` runs again."""
NO_STORAGE = 74
"""What a run's process ends with where its folder cannot be written: EX_IOERR, which no crash of its own gives."""
STATUSES = (*ENDED, "diverged", *BROKEN, "skipped")
"""Every status; ``skipped`` is a method that cannot hold a layer or be served by the optimizer, with the reason."""
_WORDS = ("metric", "faults", "gpu_reason", "flops_reason")
"""What a summary says in words; the rest of it are numbers."""


_REMEDY = "the same command goes on when there is space and permission, or give another folder with --out"


@contextlib.contextmanager
def writing(folder: Path, remedy: str = _REMEDY) -> Iterator[None]:
    """Turn what the file system says while a folder is written into an error with its remedy."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written: {error.strerror or error}; what has finished is kept, and {remedy}"
        ) from error


class RunFolder:
    """The folder of one run, for the processes that write it.

    Its methods raise :class:`StorageError` where that folder cannot be written.
    """

    def __init__(self, root: Path, spec: RunSpec) -> None:
        self.path = root / spec.hash
        self.spec = spec

    def start(self) -> None:
        """Create the folder and drop what an earlier or interrupted attempt left in it."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "run.json").unlink(missing_ok=True)
            for name in ("metrics.jsonl", "output.txt"):
                (self.path / name).write_text("")

    def append(self, row: dict[str, Any]) -> None:
        """Add a row of measurements."""
        line = json.dumps(_plain(row)) + "\n"
        with writing(self.path), (self.path / "metrics.jsonl").open("a") as stream:
            stream.write(line)

    def finish(self, outcome: dict[str, Any], environment: dict[str, Any]) -> None:
        """Write the record, at once."""
        record = {"schema": SCHEMA, "hash": self.spec.hash, "spec": self.spec.to_dict(), **outcome}
        text = json.dumps(_plain({**record, "environment": environment}), indent=1)
        temporary = self.path / f"run.json.{os.getpid()}"
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            with temporary.open("w") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())  # a record that is there is whole, also after a power cut
            temporary.replace(self.path / "run.json")


@dataclass(frozen=True)
class Record:
    """One finished run as read from disk; ``wall_seconds`` is how long its process took, evaluation included."""

    path: Path
    spec: RunSpec
    status: str
    reason: str | None
    summary: dict[str, Any]
    environment: dict[str, Any]
    written: float = 0.0
    wall_seconds: float | None = None
    traceback: tuple[str, ...] = ()

    def metrics(self) -> list[dict[str, Any]]:
        """Its rows of measurements."""
        lines = (self.path / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


def read(path: Path) -> Record | None:
    """The record in a run's folder; None where the run has not ended.

    Raises:
        RecordError: there is a record, but it is corrupt or of another schema.
    """
    file = path / "run.json"
    try:
        raw = json.loads(file.read_text())
        if raw["schema"] != SCHEMA:
            raise RecordError(
                f"{file} is of schema {raw['schema']}, this version reads schema {SCHEMA}; read it with the version "
                "that wrote it, or run the comparison again into another folder"
            )
        spec = RunSpec.from_dict(raw["spec"])
        _check(raw, spec)
        return Record(
            path=path,
            spec=spec,
            status=raw["status"],
            reason=raw["reason"],
            summary=raw["summary"],
            environment=raw["environment"],
            written=file.stat().st_mtime,
            wall_seconds=raw.get("wall_seconds"),
            traceback=tuple(raw.get("traceback", ())),
        )
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RecordError(f"{file} cannot be read: {error.strerror}; mend its permissions") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(
            f"{file} is corrupt ({type(error).__name__}: {error}); the comparison that wrote it will run it again"
        ) from error


def _check(raw: dict[str, Any], spec: RunSpec) -> None:
    """Raise where a record is JSON and yet not what a run wrote, before a report calculates with it."""
    status, summary, environment = raw["status"], raw["summary"], raw["environment"]
    if status not in STATUSES:
        raise ValueError(f"status {status!r}")
    if raw["hash"] != spec.hash:
        raise ValueError(f"the hash of its spec is {spec.hash}, not {raw['hash']}")
    if not (isinstance(summary, dict) and isinstance(environment, dict)):
        raise TypeError("summary and environment must be objects")
    numbers = {key: value for key, value in summary.items() if key not in _WORDS}
    for key, value in (*numbers.items(), ("wall_seconds", raw.get("wall_seconds"))):
        if not all(leaf is None or isinstance(leaf, (int, float)) for leaf in _leaves(value)):
            raise TypeError(f"{key} is {value!r}, not a number")
    if spec.kind == "quality" and status in ENDED and summary.get("best_validation") is None:
        raise ValueError("it has no best_validation")
    if spec.kind == "cost" and status == "done":
        steps = [summary["step_seconds"][who][what] for who in ("method", "control") for what in ("median", "q1", "q3")]
        if None in (*steps, summary["step_ratio"], summary["constraint_share"]):
            raise ValueError("it does not say how long a step took")


def _leaves(value: Any) -> Iterator[Any]:
    for item in value.values() if isinstance(value, dict) else ():
        yield from _leaves(item)
    if not isinstance(value, dict):
        yield value


def read_all(roots: Iterable[Path]) -> tuple[list[Record], list[str]]:
    """All records below some folders, in a fixed order, and what is wrong with those that cannot be read."""
    records, faults = [], []
    for root in roots:
        for path in sorted(Path(root).glob("*/run.json")):
            try:
                record = read(path.parent)
            except RecordError as error:
                faults.append(str(error))
            else:
                records += [record] if record is not None else []
    return records, faults


def frame(records: Iterable[Record]) -> pd.DataFrame:
    """A row per run: spec, status, summary, with the problem's factors and the scale as columns.

    Where a factor has the name of something in the summary, as ``steps``, that is ``run_steps``.
    """
    import pandas as pd

    rows = []
    for record in records:
        spec = record.spec
        flat = {k: v for k, v in spec.to_dict().items() if k not in ("fields", "options", "knobs", "schema")}
        scale = spec.options.get("scale", 1.0)
        rows.append(
            {
                **flat,
                **spec.fields,
                **{f"knob_{k}": v for k, v in spec.knobs.items()},
                "scale": scale,
                "label": spec.label,
                "hash": spec.hash,
                "status": record.status,
            }
            | {"reason": record.reason}
            | {f"run_{k}" if k in spec.fields else k: v for k, v in record.summary.items()}
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
