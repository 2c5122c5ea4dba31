"""Where a monitor's rows go: JSON lines, CSV, TensorBoard, a function. Imports only the errors."""

from __future__ import annotations

import csv
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from stiefel.errors import OptionError

Row = dict[str, Any]


class Sink(Protocol):
    """Takes rows one by one, and may be closed between two of them."""

    def write(self, row: Row) -> None:
        """Take a row."""

    def flush(self) -> None:
        """Write out the rows taken, so that a crash of this process does not lose them."""

    def close(self) -> None:
        """Close what is open."""


def sink_of(target: Any) -> Sink:
    """The sink that a user's target stands for.

    Args:
        target: a path that ends in ``.jsonl`` or ``.csv``, which is appended to; an object with
            ``add_scalar(tag, value, step)``, as TensorBoard's SummaryWriter; or a function of a row.

    Raises:
        OptionError: it is none of these.
    """
    if isinstance(target, (str, os.PathLike)):
        kinds: dict[str, type[_File]] = {".jsonl": JsonLines, ".csv": Table}
        kind = kinds.get(Path(target).suffix)
        if kind is not None:
            return kind(Path(target))
    elif hasattr(target, "add_scalar"):
        return Scalars(target)
    elif callable(target):
        return Call(target)
    raise OptionError(
        f"sink {target!r} is not understood; use a path that ends in .jsonl or .csv, an object with "
        "add_scalar(tag, value, step) such as torch.utils.tensorboard.SummaryWriter, or a function of one row"
    )


def flat(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Entries of a row, those of an inner dict under ``outer/inner``."""
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


class _File(ABC):
    """A text file that is appended to, and opened when it is first needed."""

    @abstractmethod
    def write(self, row: Row) -> None:
        """Append a row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None

    def append(self, text: str) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # A new line, so that the torn one does not swallow this row.
            if self._ends_torn():
                text = "\n" + text
            self._file = self.path.open("a", encoding="utf-8", newline="")
        self._file.write(text)

    def flush(self) -> None:
        """Hand what was written to the operating system."""
        if self._file is not None:
            self._file.flush()

    def _ends_torn(self) -> bool:
        """Whether the last line is incomplete, since the process died while writing it."""
        if not self.path.exists() or not self.path.stat().st_size:
            return False
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() != b"\n"

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class JsonLines(_File):
    """A line of strict JSON per row. A number that is not finite is null, and named in ``nonfinite``."""

    def write(self, row: Row) -> None:
        """Append a row."""
        # JSON has no NaN and no infinity; other readers refuse the words that Python writes for them.
        lost = {k: str(v) for k, v in flat(row) if isinstance(v, float) and not math.isfinite(v)}
        self.append(json.dumps({**_finite(row), "nonfinite": lost} if lost else row, allow_nan=False) + "\n")


def _finite(row: Mapping[str, Any]) -> Row:
    return {
        k: _finite(v) if isinstance(v, Mapping) else None if isinstance(v, float) and not math.isfinite(v) else v
        for k, v in row.items()
    }


class Table(_File):
    """A CSV file with a column per entry. A row with a new entry rewrites the file with one column more.

    The rewritten file replaces the old one in one step, so that a crash leaves one of the two. An empty cell is None or
    absent; numbers that are not finite are ``nan``, ``inf``, ``-inf``.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._columns: list[str] | None = None

    def write(self, row: Row) -> None:
        """Append a row."""
        cells = dict(flat(row))
        if self._columns is None:
            # A file of an earlier run is continued with its columns.
            self._columns = next(iter(self._read()), [])
        new = [name for name in cells if name not in self._columns]
        if new:
            self._widen(new)
        self.append(_line(cells.get(name) for name in self._columns))

    def _read(self) -> list[list[str]]:
        if not self.path.exists():
            return []
        with self.path.open(encoding="utf-8", newline="") as file:
            return list(csv.reader(file))

    def _widen(self, new: list[str]) -> None:
        self.close()  # writes out what is buffered, before the file is read
        assert self._columns is not None
        self._columns += new
        body = (row + [""] * (len(self._columns) - len(row)) for row in self._read()[1:])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, since os.replace is atomic within one file system only.
        draft = self.path.with_name(self.path.name + ".new")
        draft.write_text(_line(self._columns) + "".join(map(_line, body)), encoding="utf-8", newline="")
        os.replace(draft, self.path)


def _line(cells: Any) -> str:
    texts = ("" if cell is None else str(cell) for cell in cells)
    # Quoted as RFC 4180 has it, only where needed.
    return ",".join('"' + t.replace('"', '""') + '"' if set(t) & set(',"\n\r') else t for t in texts) + "\n"


class Scalars:
    """A SummaryWriter of TensorBoard, or an object like it: a tag per number. Its owner closes it."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def write(self, row: Row) -> None:
        """Add a row's numbers at its step."""
        for tag, value in flat(row):
            if tag != "step" and isinstance(value, (int, float)):
                self.writer.add_scalar(tag, value, row["step"])

    def flush(self) -> None:
        """Left to the writer, which flushes by itself."""

    def close(self) -> None:
        """Flush, if it can."""
        if hasattr(self.writer, "flush"):
            self.writer.flush()


class Call:
    """A function of a row."""

    def __init__(self, function: Callable[[Row], object]) -> None:
        self.function = function

    def write(self, row: Row) -> None:
        """Call it with a copy."""
        self.function(dict(row))

    def flush(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is open."""
