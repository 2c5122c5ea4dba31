"""Records of runs that have ended, read from disk and checked. Imports ``spec``, ``check``, ``portable``, the errors.

Any file in a folder of records may be torn or strange: what cannot be read is a :class:`RecordError` that names it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stiefel.compare.record.check import check_outcome, check_spec, moment, printable, shown
from stiefel.compare.record.portable import portable
from stiefel.compare.record.spec import SCHEMA, RunSpec
from stiefel.errors import RecordError

ENDED = ("done", "target missed")
"""The statuses of a run that trained to its end."""


BROKEN = ("error", "crashed", "killed", "out of memory", "timeout")
"""The statuses of a run that failed for reasons that may lie outside the method: ``--retry-failed`` runs it again."""


STATUSES = (*ENDED, "diverged", *BROKEN, "skipped")
"""Every status; ``skipped``: the method does not fit a layer or the optimizer, for the recorded reason."""


@dataclass(frozen=True)
class Record:
    """One finished run as read from disk; ``wall_seconds`` is how long its process took, evaluation included.

    ``label`` is the method as reports name it (as 0.1.0 did, where the record does not say), ``control`` whether it is
    the one that others are compared with, ``written`` when it ended (where the record does not say, when its file was
    last written). ``reason`` and ``traceback`` are without the folders of the machine.
    """

    path: Path
    spec: RunSpec
    status: str
    reason: str | None
    summary: dict[str, Any]
    environment: dict[str, Any]
    written: float = 0.0
    wall_seconds: float | None = None
    traceback: tuple[str, ...] = ()
    label: str = ""
    control: bool = False

    def __post_init__(self) -> None:
        if not self.label:
            object.__setattr__(self, "label", self.spec.plain_label)

    def metrics(self) -> list[dict[str, Any]]:
        """Its rows of measurements as they were written; lines that are not JSON are left out."""
        rows = []
        for line in (self.path / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                rows.append(json.loads(line))
        return rows


def read(path: Path) -> Record | None:
    """The record in a run's folder; None where the run has not ended.

    Raises:
        RecordError: there is a record, but it is corrupt or of another schema.
    """
    file = path / "run.json"
    try:
        return _record(path, json.loads(file.read_bytes()), file.stat().st_mtime)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RecordError(f"{file} cannot be read: {error.strerror}; fix its permissions") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = str(printable(str(error)))
        raise RecordError(
            f"{file} is corrupt ({type(error).__name__}: {what}); stiefel compare puts it aside and repeats its run"
        ) from error


def _record(path: Path, raw: Any, modified: float) -> Record:
    if raw["schema"] != SCHEMA:
        raise RecordError(
            f"{path / 'run.json'} is of schema {shown(raw['schema'])}, this version reads schema {SCHEMA}; read it "
            "with the version that wrote it, or run the comparison again into another folder"
        )
    spec = RunSpec.from_dict(raw["spec"])
    if raw["hash"] != spec.hash:
        raise ValueError(f"the hash of its spec is {spec.hash}, not {shown(raw['hash'])}")
    written, raw = raw["spec"], printable(raw)
    if raw["spec"] != written:
        raise ValueError("its spec holds texts or numbers that no run writes")
    check_spec(written)
    check_outcome(raw)
    _check_result(raw, spec)
    return Record(
        path=path,
        spec=spec,
        status=raw["status"],
        reason=None if raw["reason"] is None else portable(raw["reason"]),
        summary=raw["summary"],
        environment=raw["environment"],
        written=modified if raw.get("ended") is None else moment(raw["ended"]),
        wall_seconds=raw.get("wall_seconds"),
        traceback=tuple(map(portable, raw.get("traceback", ()))),
        label=raw.get("label") or "",
        control=bool(raw.get("control", _was_control(spec))),
    )


def _was_control(spec: RunSpec, name: str = "unconstrained") -> bool:
    """Whether a record of 0.1.0, which does not say so, is of the control."""
    return spec.method == name


def _check_result(raw: dict[str, Any], spec: RunSpec) -> None:
    """Raise where a record lacks the results that its status promises."""
    status, summary = raw["status"], raw["summary"]
    if status not in STATUSES:
        raise ValueError(f"status {shown(status)}")
    if spec.kind == "quality" and status in ENDED and summary.get("best_validation") is None:
        raise ValueError("its summary has no best_validation")
    if spec.kind == "cost" and status == "done":
        timed = {"method", "control", *summary["step_seconds"]}
        steps = [summary["step_seconds"][who][what] for who in timed for what in ("median", "q1", "q3", "n")]
        if None in (*steps, summary["step_ratio"], summary["constraint_share"]):
            raise ValueError("its summary has null for step_seconds, step_ratio or constraint_share")


def read_all(roots: Iterable[Path]) -> tuple[list[Record], list[str]]:
    """All records below some folders, in a fixed order, and what is wrong with those that cannot be read."""
    records, faults = [], []
    for root in roots:
        for path in sorted(Path(root).glob("*/run.json")):
            name = printable(path.parent.name)
            if name != path.parent.name:
                faults.append(f"{name} is a folder whose name is no text; rename it")
                continue
            try:
                record = read(path.parent)
            except RecordError as error:
                # Whoever reads a report knows where the records are: it names no folders above them.
                faults.append(str(error).replace(str(path.parent), name))
            else:
                records += [record] if record is not None else []
    return records, faults
