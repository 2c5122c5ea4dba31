"""A file of bounded size for what a run prints: the first and the last of it. Imports the standard library."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

HEAD, TAIL = 500_000, 450_000
"""Bytes kept of the beginning and of the end."""
_PAUSE = 1.0  # seconds between writes of the end, which is written over where more comes


class Output:
    """What a run prints, as it comes; the middle is left out once there is more than a megabyte.

    A disk that takes no more does not stop it: the record of the run, or its absence, says so.
    """

    def __init__(self, path: Path) -> None:
        self._head = 0
        self._tail = bytearray()
        self._left_out = 0
        self._due = False
        self._written = 0.0
        self._file = -1
        with contextlib.suppress(OSError):
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)

    def feed(self, data: bytes) -> None:
        """Take what was printed."""
        room = max(0, HEAD - self._head)
        if room:
            self._write(data[:room], self._head)
            self._head += len(data[:room])
        self._tail += data[room:]
        if len(self._tail) > 2 * TAIL:
            self._shorten()
        self._due = self._due or len(data) > room

    def flush(self) -> None:
        """Write the end, where it has changed and was not written just now."""
        if self._due and time.monotonic() > self._written + _PAUSE:
            self._write_tail()

    def close(self) -> None:
        """Write the end and close the file."""
        if self._due:
            self._write_tail()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _shorten(self) -> None:
        extra = len(self._tail) - TAIL
        if extra > 0:
            del self._tail[:extra]
            self._left_out += extra

    def _write_tail(self) -> None:
        self._shorten()
        note = f"\n[{self._left_out:,} bytes of output are left out here]\n" if self._left_out else ""
        text = note.encode() + self._tail
        self._write(text, HEAD)
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, HEAD + len(text))
        self._due, self._written = False, time.monotonic()

    def _write(self, data: bytes | bytearray, at: int) -> None:
        with contextlib.suppress(OSError):
            while data:
                count = os.pwrite(self._file, data, at)
                data, at = data[count:], at + count
