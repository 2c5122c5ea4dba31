"""What is known of a process that has ended without a result. Imports ``worker`` for its limits."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

from stiefel.compare.worker.main import TAIL
from stiefel.compare.worker.output import HEAD
from stiefel.compare.worker.output import TAIL as END

_REQUESTS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
"""How people and schedulers end a process: no fault of the run's, unlike SIGSEGV or SIGABRT."""
_NEAR = 0.9
"""The part of ``--memory`` that a killed run must have used for memory to be the likely reason."""


def examine(outcome: dict[str, Any], output: Path, seconds: float, memory: int | None, oom: bool) -> dict[str, Any]:
    """The record's ``status``, ``reason`` and ``traceback`` for a run that has written none.

    A run ended by SIGKILL is *out of memory* where that is evident: the kernel has counted a kill for want of memory in
    this control group, or the run had used most of ``memory``. Without evidence a person or a scheduler has killed it,
    as where it was asked to end.

    Args:
        outcome: what its supervisor reports.
        output: file with what it printed.
        seconds: its timeout.
        memory: bytes that it might allocate, or None.
        oom: whether the kernel has killed for want of memory since it began.
    """
    lines, code = printed(output), outcome["exit"]
    found: dict[str, Any] = {"traceback": tail(lines), "summary": {}, "wall_seconds": None}
    if timed_out(outcome, lines):
        return found | {"status": "timeout", "reason": f"not finished after {seconds:g} s (--timeout)"}
    near = memory is not None and outcome.get("peak", 0) > _NEAR * memory
    if code == -signal.SIGKILL and (oom or near):
        return found | {"status": "out of memory", "reason": f"{describe_exit(code)}, as memory ran out"}
    if -code in _REQUESTS:
        return found | {"status": "killed", "reason": f"{describe_exit(code)}; there is no sign that memory ran out"}
    return found | {"status": "crashed", "reason": f"{describe_exit(code)}{_fault(outcome)}"}


def _fault(outcome: dict[str, Any]) -> str:
    return f" (its supervisor: {outcome['fault']})" if outcome.get("fault") else ""


def timed_out(outcome: dict[str, Any], lines: list[str]) -> bool:
    """Whether a process was ended for its timeout."""
    # faulthandler, set up by :mod:`worker.main`, prints this line at the timeout and exits with status 1.
    return outcome.get("late", False) or any(re.match(r"Timeout \(\d+:\d\d:\d\d", line) for line in lines)


def describe_exit(code: int) -> str:
    """How a process without a result ended, in words."""
    if code >= 0:
        return f"the process exited with code {code} before it wrote a record"
    return f"the process was killed by {signal_name(-code)}"


def signal_name(number: int) -> str:
    """A signal's name; real-time signals have only numbers."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def tail(lines: list[str]) -> list[str]:
    """The last lines of a process that died; of Python's dump of its threads, the stack of the one that crashed."""
    # After a crash one thread is "Current thread". After a timeout none is, and the main thread comes last.
    dumps = [i for i, line in enumerate(lines) if line.startswith(("Current thread", "Thread 0x"))]
    crashed = [i for i in dumps if lines[i].startswith("Current thread")] or dumps
    return lines[crashed[-1] :][:TAIL] if crashed else lines[-TAIL:]


def printed(output: Path) -> list[str]:
    """The lines that a process printed, of a file that may be cut short or missing."""
    try:
        with output.open("rb") as stream:
            return stream.read(HEAD + 2 * END).decode(errors="replace").splitlines()
    except OSError:
        return []


def oom_kills() -> int:
    """Kills for want of memory that the kernel has counted in this control group, or else on this machine."""
    for file in _counters():
        try:
            if found := re.search(r"^oom_kill (\d+)$", file.read_text(), re.MULTILINE):
                return int(found[1])
        except OSError:
            continue
    return 0


def _counters() -> list[Path]:
    mounted = Path("/sys/fs/cgroup")
    try:
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        groups = []
    own = []
    for _, controllers, path in groups:
        if "memory" in controllers.split(","):
            own.append(mounted / "memory" / path.lstrip("/") / "memory.oom_control")
        elif not controllers:
            own.append(mounted / path.lstrip("/") / "memory.events")
    # In a container the group's own files lie at the mount, whatever its path says.
    return [*own, mounted / "memory/memory.oom_control", mounted / "memory.events", Path("/proc/vmstat")]
