"""The folder of one run, as the processes that write it see it. Imports ``spec`` and the errors.

``run.json`` appears by an atomic rename when a run has ended: where it is missing, the run has not ended. What the
run's process printed is in ``output.txt``.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stiefel.compare.record.spec import SCHEMA, RunSpec
from stiefel.errors import StorageError

if TYPE_CHECKING:
    pass


NO_STORAGE = 74
"""Exit status of a run's process whose folder cannot be written: EX_IOERR, which no crash gives."""


_REMEDY = "free disk space or fix the permissions and run the same command again, or choose another folder with --out"


@contextlib.contextmanager
def writing(folder: Path, remedy: str = _REMEDY) -> Iterator[None]:
    """Turn errors of the file system while a folder is written into :class:`StorageError` with a remedy."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written: {error.strerror or error}; what has finished is kept; {remedy}"
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
            # The record first: rows of a new attempt must not stand beside the record of an old one.
            (self.path / "run.json").unlink(missing_ok=True)
            for name in ("metrics.jsonl", "output.txt"):
                (self.path / name).write_text("")

    def append(self, row: dict[str, Any]) -> None:
        """Add a row of measurements."""
        # Not synced to disk as the record is: a torn last line can be left by a power cut, and readers expect it.
        line = json.dumps(_plain(row)) + "\n"
        with writing(self.path), (self.path / "metrics.jsonl").open("a") as stream:
            stream.write(line)

    def finish(self, outcome: dict[str, Any], environment: dict[str, Any]) -> None:
        """Write the record by an atomic rename."""
        record = {"schema": SCHEMA, "hash": self.spec.hash, "spec": self.spec.to_dict(), **outcome}
        text = json.dumps(_plain({**record, "environment": environment}), indent=1)
        # In the same folder: a rename is atomic within one file system only.
        temporary = self.path / f"run.json.{os.getpid()}"
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            with temporary.open("w") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())  # a record that is there is whole, also after a power cut
            temporary.replace(self.path / "run.json")


def _plain(value: Any) -> Any:
    """Data that strict JSON can hold: non-finite numbers become None."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
