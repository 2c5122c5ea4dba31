"""Copies that a run's code forks of the run: each ends where that code returns to the engine. Imports nothing of ours.

A copy that went on would train beside the run, and fork again at the next step: two to the power of the steps of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

_ENGINE = "stiefel.compare."


def end_copies() -> None:
    """From now on let copies of this process, made by ``os.fork``, end where they would return to the engine.

    A child that does work of its own and leaves by ``os._exit`` is not touched, nor are the children of
    :mod:`multiprocessing`, which data loaders use: they never return.
    """
    os.register_at_fork(after_in_child=_watch)


def _watch() -> None:
    stack = list(_stack(sys._getframe(1)))
    if any(name == "multiprocessing.popen_fork" for name, _ in stack):
        return
    engine = {frame for name, frame in stack if name.startswith(_ENGINE)}

    def returned(frame: FrameType, event: str, argument: Any) -> None:
        if event == "return" and frame.f_back in engine:
            os._exit(0)

    # A profile function sees every return, by exceptions too; it slows the copy alone.
    sys.setprofile(returned)


def _stack(frame: FrameType | None) -> Iterator[tuple[str, FrameType]]:
    while frame is not None:
        yield frame.f_globals.get("__name__", ""), frame
        frame = frame.f_back
