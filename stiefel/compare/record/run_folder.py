"""The folder of one run, as the processes that write it see it. Imports ``spec`` and the errors.

``run.json`` appears by an atomic rename when a run has ended: where it is missing, the run has not ended. What the
run's process printed is in ``output.txt``.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import unicodedata
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stiefel.compare.record.portable import portable
from stiefel.compare.record.spec import SCHEMA, RunSpec
from stiefel.errors import StorageError

REASON, LINE, LINES = 2000, 500, 60
"""Characters of a reason and of a line of a traceback, and such lines, that a record keeps at most."""
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
        self._process = os.getpid()

    def start(self) -> None:
        """Create the folder and drop what an earlier or interrupted attempt left in it."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            # The record first: rows of a new attempt must not stand beside the record of an old one.
            for record in (self.path / "run.json", *self.path.glob("run.json.[0-9]*")):
                record.unlink(missing_ok=True)
            for name in ("metrics.jsonl", "output.txt"):
                (self.path / name).write_text("")

    def append(self, row: dict[str, Any]) -> None:
        """Add a row of measurements."""
        leave_if_copied(self._process)
        # Not synced to disk as the record is: a torn last line can be left by a power cut, and readers expect it.
        line = json.dumps(_plain(row)) + "\n"
        with writing(self.path), (self.path / "metrics.jsonl").open("a") as stream:
            stream.write(line)

    def finish(self, outcome: dict[str, Any], environment: dict[str, Any]) -> None:
        """Write the record, with the time, by an atomic rename."""
        leave_if_copied(self._process)
        outcome = {**outcome, "ended": datetime.now(UTC).isoformat(timespec="microseconds")}
        if outcome.get("reason") is not None:
            outcome["reason"] = readable(portable(str(outcome["reason"])), REASON)
        if "traceback" in outcome:
            outcome["traceback"] = [readable(portable(str(line)), LINE) for line in outcome["traceback"][-LINES:]]
        record = {**_plain({**outcome, "environment": environment}), "spec": _finite(self.spec.to_dict())}
        text = json.dumps({"schema": SCHEMA, "hash": self.spec.hash, **record}, indent=1)
        # In the same folder: a rename is atomic within one file system only.
        temporary = self.path / f"run.json.{os.getpid()}"
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            with temporary.open("w") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())  # a record that is there is whole, also after a power cut
            temporary.replace(self.path / "run.json")


def leave_if_copied(process: int) -> None:
    """End this process where it is not that one: a copy that a run's code has forked is not to go on as the run."""
    if os.getpid() != process:
        os._exit(0)


def readable(text: str, most: int | None = None) -> str:
    """A text that any file and terminal takes: lone surrogates and control characters are written as escapes.

    Args:
        text: what somebody else's code has said.
        most: characters to keep; the middle of a longer text is left out.
    """
    if most is not None and len(text) > most:
        half = most // 2 - 20
        text = f"{text[:half]} [… {len(text) - 2 * half} characters …] {text[-half:]}"
    text = "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else _escaped(c) for c in text)
    return text if most is None or len(text) <= most else text[:most]


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _plain(value: Any) -> Any:
    """Data that strict JSON can hold, with texts that are readable: non-finite numbers become None."""
    if isinstance(value, dict):
        return {readable(str(k)): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return readable(value) if isinstance(value, str) else _finite(value)


def _finite(value: Any) -> Any:
    """Data without non-finite numbers; texts as they are."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
