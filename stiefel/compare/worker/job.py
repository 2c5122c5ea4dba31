"""What a process needs to run a spec. Imports ``spec``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stiefel.compare.record.spec import RunSpec


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

    @property
    def identity(self) -> dict[str, Any]:
        """What a record says of the method beside the spec."""
        return {"label": self.label or self.spec.plain_label, "control": self.control}
