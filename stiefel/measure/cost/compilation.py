"""How long torch's compiler takes inside training steps, so that it can be subtracted. Imports ``compat``."""

from __future__ import annotations

import time
from typing import Any

from stiefel.compat.torch_private import compiler_callbacks


class CompileClock:
    """Adds up the time that ``torch.compile`` spends compiling while the clock is entered.

    with clock:
        one_step()
    clock.seconds

    A model that is compiled compiles in its first step, and again where shapes change. Where nothing is compiled it
    costs next to nothing.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since: float | None = None

    def __enter__(self) -> CompileClock:
        # Without the compiler's module there is nothing to compile yet; making any optimizer imports it.
        self._told_by = compiler_callbacks()
        if self._told_by is not None:
            self._told_by.register_start_callback(self._begin)
            self._told_by.register_end_callback(self._end)
        return self

    def __exit__(self, *error: object) -> None:
        if self._told_by is not None:
            self._told_by.remove_start_callback(self._begin)
            self._told_by.remove_end_callback(self._end)

    def _begin(self, *why: Any) -> None:
        self._since = time.perf_counter()

    def _end(self, *why: Any) -> None:
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
            self._since = None
