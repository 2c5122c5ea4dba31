"""A problem is tried before its first run, in a process of its own: its code may end that. Imports ``process``."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import stiefel.errors
from stiefel.compare.driver import post_mortem
from stiefel.compare.driver.process import RunProcess, start_trial
from stiefel.compare.worker.job import packed
from stiefel.errors import ProblemError, StiefelError

_LOOK = 0.2  # seconds between looks at what the trial prints, which is shown: it may tell of a download
_SHOWN = 20_000  # characters of it that are shown


def attempt(
    file: str | Path,
    settings: Iterable[dict[str, Any]] = (),
    *,
    timeout: float,
    memory: int | None = None,
    threads: int = 1,
) -> None:
    """Import a problem's file in another process, and try the problem once in each setting.

    Args:
        file: the problem's.
        settings: values of the problem's fields; none: the file is imported alone.
        timeout: seconds for the import, and for each setting.
        memory: bytes that it may allocate.
        threads: of the process.

    Raises:
        ProblemError: the problem is at fault, or its code has ended the process, or has not returned.
        DataError: as the problem's data raise it.
    """
    limits = {"timeout": timeout, "memory": memory, "threads": threads}
    task = packed({"file": str(Path(file).resolve()), "settings": list(settings), **limits})
    with tempfile.TemporaryDirectory(prefix="stiefel-trial-") as folder:
        output = Path(folder) / "output.txt"
        before = post_mortem.oom_kills()
        process = start_trial(task, str(output))
        try:
            _show(process, output)
        finally:
            process.stop()
        _judge(file, process.outcome or {}, output, timeout, post_mortem.oom_kills() > before)


def _show(process: RunProcess, output: Path) -> None:
    """Show what a trial prints, until it has ended."""
    shown, ended = 0, False
    while not ended:
        ended = process.wait(_LOOK)
        if shown < _SHOWN and output.is_file():
            with output.open("rb") as stream:
                stream.seek(shown)
                data = stream.read(_SHOWN - shown)
            shown += len(data)
            print(data.decode(errors="replace"), end="", file=sys.stderr, flush=True)


def _judge(file: str | Path, outcome: dict[str, Any], output: Path, timeout: float, oom: bool) -> None:
    """Raise what a trial has found."""
    if outcome.get("passed"):
        return
    at = outcome.get("at", str(file))
    if "error" in outcome:
        name, message = outcome["error"]
        kind = getattr(stiefel.errors, name, ProblemError)
        raise kind(message) if issubclass(kind, StiefelError) else ProblemError(message)
    if "raised" in outcome:
        raise ProblemError(f"{at} fails: {outcome['raised']}")
    lines = post_mortem.printed(output)
    if post_mortem.timed_out(outcome, lines):
        what = f"has not returned after {timeout:g} s; if it needs longer, give --timeout SECONDS"
    elif outcome["exit"] >= 0:
        what = f"ends the process, with code {outcome['exit']}; return or raise an error instead (no os._exit)"
    else:
        what = f"ends the process, by {post_mortem.signal_name(-outcome['exit'])}"
        what += ": memory ran out" if oom else ""
    told = "".join(f"\n    {line:.200}" for line in post_mortem.tail(lines))
    raise ProblemError(f"{at} {what}{told and ', in'}{told}" if told else f"{at} {what}")
