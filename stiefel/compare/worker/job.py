"""What a process needs to run a spec. Imports ``spec``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stiefel.compare.record.spec import RunSpec
from stiefel.errors import ProblemError


@dataclass(frozen=True)
class Job:
    """A spec, and where and how it is run: nothing here changes its result.

    Args:
        spec: what is run.
        file: the problem's file.
        settings: values of all fields of the problem, also of those that say where something is.
        root: folder of the records.
        threads: of the process.
        timeout: in seconds.
        memory: bytes that it may allocate; None for all there are.
        processes: how many ``torchrun`` starts, each with its share of every batch; 1: without ``torchrun``.
        visible: the CUDA device that it sees, as ``CUDA_VISIBLE_DEVICES`` has it; None for all.
        label: the method as reports name it.
        control: whether it is the one that others are compared with.
    """

    spec: RunSpec
    file: str
    settings: dict[str, Any]
    root: Path
    threads: int = 1
    timeout: float = 3600.0
    memory: int | None = None
    processes: int = 1
    visible: str | None = None
    label: str = ""
    control: bool = False

    def to_json(self) -> str:
        """The job as text for the process that runs it.

        Raises:
            ProblemError: a field of the problem has a value that is no plain data.
        """
        return packed({**asdict(self), "spec": self.spec.to_dict()})

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Inverse of :meth:`to_json`."""
        data = unpacked(text)
        return cls(**{**data, "spec": RunSpec.from_dict(data["spec"])})

    @property
    def identity(self) -> dict[str, Any]:
        """What a record says of the method beside the spec."""
        return {"label": self.label or self.spec.plain_label, "control": self.control}


def packed(value: Any) -> str:
    """Plain data as JSON that keeps tuples, paths, and keys of dictionaries that are no texts.

    Raises:
        ProblemError: a part of it is of another kind.
    """
    return json.dumps(_pack(value))


def unpacked(text: str) -> Any:
    """Inverse of :func:`packed`."""
    return _unpack(json.loads(text))


def _pack(value: Any) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list):
        return [_pack(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_pack(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_pack(key), _pack(item)] for key, item in value.items()]}
    if isinstance(value, Path):
        return {"path": str(value)}
    raise ProblemError(
        f"a factor of the problem is {value!r:.100}, a {type(value).__name__}, which cannot be handed to a run's "
        "process; give numbers, texts, paths, None, or tuples, lists and dictionaries of them"
    )


def _unpack(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpack(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, items),) = value.items()
    if kind == "path":
        return Path(items)
    if kind == "tuple":
        return tuple(_unpack(item) for item in items)
    return {_unpack(key): _unpack(item) for key, item in items}
