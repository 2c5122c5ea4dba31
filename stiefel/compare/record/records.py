"""Records of runs that have ended, read from disk and checked. Imports ``spec`` and the errors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stiefel.compare.record.spec import SCHEMA, RunSpec
from stiefel.errors import RecordError

if TYPE_CHECKING:
    pass


ENDED = ("done", "target missed")
"""The statuses of a run that trained to its end."""


BROKEN = ("error", "crashed", "out of memory", "timeout")
"""The statuses of a run that failed for reasons that may lie outside the method: ``--retry-failed`` runs it again."""


STATUSES = (*ENDED, "diverged", *BROKEN, "skipped")
"""Every status; ``skipped``: the method does not fit a layer or the optimizer, for the recorded reason."""


_NUMBERS = (
    "best_epoch", "best_validation", "test_at_best", "final_validation", "target", "default_rate", "higher_is_better",
    "steps", "seconds", "steps_to_target", "seconds_to_target", "compile_seconds", "orthogonality_worst",
    "orthogonality_final", "peak_resident_bytes", "step_seconds", "step_ratio", "constraint_share", "matmul_flops",
    "factorization_flops", "operators", "gpu_peak_bytes", "gpu_reserved_bytes", "gpu_energy_joules",
)  # fmt: skip
"""Entries of a summary that reports calculate with: numbers, null, or objects of these."""
_TEXTS = ("metric", "faults", "gpu_reason", "flops_reason")
"""Entries that reports show unchanged. Other keys are not checked: a later version may have written them."""


@dataclass(frozen=True)
class Record:
    """One finished run as read from disk; ``wall_seconds`` is how long its process took, evaluation included.

    ``label`` is the method as reports name it (as 0.1.0 did, where the record does not say), ``control`` whether it is
    the one that others are compared with.
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
        # Before the spec is built: another schema may have other fields.
        if raw["schema"] != SCHEMA:
            raise RecordError(
                f"{file} is of schema {raw['schema']}, this version reads schema {SCHEMA}; read it with the version "
                "that wrote it, or run the comparison again with another --out folder"
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
            label=str(raw.get("label", "")),
            control=bool(raw.get("control", _was_control(spec))),
        )
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RecordError(f"{file} cannot be read: {error.strerror}; fix its permissions") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(
            f"{file} is corrupt ({type(error).__name__}: {error}); stiefel compare puts it aside and repeats its run"
        ) from error


def _was_control(spec: RunSpec, name: str = "unconstrained") -> bool:
    """Whether a record of 0.1.0, which does not say so, is of the control."""
    return spec.method == name


def _check(raw: dict[str, Any], spec: RunSpec) -> None:
    """Raise where a record is JSON and yet not what a run wrote, before a report calculates with it."""
    status, summary, environment = raw["status"], raw["summary"], raw["environment"]
    if status not in STATUSES:
        raise ValueError(f"its status {status!r} is not one of the known ones")
    # Plans look a run up by its hash, which a spec edited by hand no longer has.
    if raw["hash"] != spec.hash:
        raise ValueError(f"the hash of its spec is {spec.hash}, not {raw['hash']}")
    if not (isinstance(summary, dict) and isinstance(environment, dict)):
        raise TypeError("summary and environment must be JSON objects")
    for key in _TEXTS:
        if not isinstance(summary.get(key), (str, type(None))):
            raise TypeError(f"{key} is {summary[key]!r}, not a string or null")
    numbers = [(key, summary.get(key)) for key in _NUMBERS]
    for key, value in (*numbers, ("wall_seconds", raw.get("wall_seconds"))):
        # bool is a subclass of int: higher_is_better passes.
        if not all(leaf is None or isinstance(leaf, (int, float)) for leaf in _leaves(value)):
            raise TypeError(f"{key} is {value!r}, not numbers or null")
    if spec.kind == "quality" and status in ENDED and summary.get("best_validation") is None:
        raise ValueError("its summary has no best_validation")
    if spec.kind == "cost" and status == "done":
        steps = [summary["step_seconds"][who][what] for who in ("method", "control") for what in ("median", "q1", "q3")]
        if None in (*steps, summary["step_ratio"], summary["constraint_share"]):
            raise ValueError("its summary has null for step_seconds, step_ratio or constraint_share")


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
