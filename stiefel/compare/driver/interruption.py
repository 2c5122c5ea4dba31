"""Ctrl-C, and the signals by which schedulers and closing terminals end a driver. Imports the standard library."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A signal asks this process to end.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


_DEFAULTS = {"SIGINT": signal.default_int_handler, "SIGTERM": signal.SIG_DFL, "SIGHUP": signal.SIG_DFL}
_USUAL = {getattr(signal, name): default for name, default in _DEFAULTS.items() if hasattr(signal, name)}
"""The signals, and what Python does with them by default: other handlers, and ignoring (``nohup``), are left alone."""


def raising() -> contextlib.AbstractContextManager[None]:
    """While it is entered, each of the signals raises :class:`Interrupted` in the main thread."""

    def interrupt(error: Interrupted) -> None:
        raise error

    return calling(interrupt)


@contextlib.contextmanager
def calling(call: Callable[[Interrupted], object]) -> Iterator[None]:
    """While it is entered, each of the signals calls a function with an :class:`Interrupted`."""

    def handle(number: int, frame: FrameType | None) -> None:
        call(Interrupted(number))

    handle.ours = True  # type: ignore[attr-defined]
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number, usual in _USUAL.items():
            found = signal.getsignal(number)
            if found is usual or hasattr(found, "ours"):
                before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
