"""In what precision a constraint computes: which, and without autocast or reduced products. Imports torch, errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from stiefel.errors import OptionError, WeightError

EXACT_DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)
"""The precisions in which a weight can be held on its set; bfloat16 leaves a residual of about 0.02."""


When = Literal["auto", "always", "never"]

SLOW = 4.0
"""How many times as long a product may take in float64 as in float32, before float32 is used alone: its way takes
about twice as many products."""
SIZE, ROUNDS = 1024, 5
"""The products that are timed."""

_choice: list[When] = ["auto"]


def require_exact(dtype: torch.dtype, label: str) -> None:
    """Raise :class:`WeightError` where the weight ``label`` has a dtype in which it cannot be orthogonal."""
    if dtype not in EXACT_DTYPES:
        raise WeightError(
            f"weight '{label}' is {dtype}, in which it cannot be orthogonal; keep the model in float32 and use "
            "torch.autocast, or stiefel.release(model) before converting it"
        )


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of real numbers that go with a dtype; as ``dtype.to_real()``, which no compiler traces."""
    return {torch.complex64: torch.float32, torch.complex128: torch.float64}.get(dtype, dtype)


def in_double(x: Tensor) -> Tensor:
    """``x`` in float64, or complex128 where it is complex; on the CPU where its device has none, or a slow one.

    For what is done once: starts, reports. Steps use :func:`widened`. What is in double already stays where it is.
    """
    wide = wide_dtype(x)
    device = x.device if x.dtype == wide or has_double(x.device) else "cpu"
    return x.to(device, wide)


def widened(x: Tensor) -> Tensor:
    """``x`` in float64, or complex128, where its device computes in these as fast as steps need; else as it is."""
    return x.to(wide_dtype(x)) if has_double(x.device) else x


def wide_dtype(x: Tensor) -> torch.dtype:
    """float64, or complex128 for complex numbers."""
    return torch.promote_types(x.dtype, torch.float64)


class _Switch:
    """A setting that is global to the process, held at full precision while any thread asks for that."""

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, None

    def enter(self, owner: Any, attribute: str, exact: Any) -> None:
        """The first one in notes what the user has set; it is written only where it has to change."""
        with self._lock:
            if not self._inside:
                self._before = getattr(owner, attribute)
                if self._before != exact:
                    setattr(owner, attribute, exact)
            self._inside += 1

    def leave(self, owner: Any, attribute: str, exact: Any) -> None:
        """The last one out restores it."""
        with self._lock:
            self._inside -= 1
            if not self._inside and self._before != exact:
                setattr(owner, attribute, self._before)


_has_autocast = torch.amp.is_autocast_available
_AUTOCAST = frozenset(filter(_has_autocast, ("cpu", "cuda", "xpu", "mps", "hpu")))
"""Asked once: not every version of torch can trace the question."""
_switches = {"cpu": _Switch(), "cuda": _Switch()}


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Turn autocast and reduced-precision float32 products off on ``device``, and restore the settings afterwards.

    Autocast and TF32 leave an "orthonormal" matrix with a residual of 0.01 to 0.07 (bfloat16) or 3e-4 (TF32), and a
    dtype check cannot see it: a product under autocast can come back as float32 with bfloat16 accuracy.
    """
    if torch.compiler.is_compiling():  # traced code cannot write settings of the process
        with _without_autocast(device):
            yield
        return
    owner, attribute, exact = _setting(device)
    switch = _switches["cpu" if owner is getattr(torch.backends.mkldnn, "matmul", None) else "cuda"]
    switch.enter(owner, attribute, exact)
    try:
        with _without_autocast(device):
            yield
    finally:
        switch.leave(owner, attribute, exact)


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Turn autocast off on devices that have it."""
    if device.type in _AUTOCAST or (not torch.compiler.is_compiling() and _has_autocast(device.type)):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _setting(device: torch.device) -> tuple[Any, str, Any]:
    """Where the precision of float32 products on ``device`` is set, and the value for full precision.

    ``fp32_precision`` where torch has it: reading the older ``allow_tf32`` is an error once the newer one was written.
    """
    products = torch.backends.cuda.matmul if device.type == "cuda" else getattr(torch.backends.mkldnn, "matmul", None)
    if products is not None and hasattr(products, "fp32_precision"):
        return products, "fp32_precision", "ieee"
    return torch.backends.cuda.matmul, "allow_tf32", False


def use_double(when: When) -> None:
    """Choose whether steps on accelerators compute in float64 where float32 alone would lose digits.

    Starts, reports and a CPU's steps are in float64 in any case.

    Args:
        when: ``"auto"``, the default: where the device has float64 and its products take at most four times as long as
            those in float32, which is measured once per device; ``"always"``; ``"never"``.

    Raises:
        OptionError: another value.
    """
    if when not in get_args(When):
        raise OptionError(f"when={when!r}: expected one of {', '.join(map(repr, get_args(When)))}")
    _choice[0] = when


def has_double(device: torch.device) -> bool:
    """Whether steps on a device compute in float64."""
    if device.type in ("cpu", "meta"):
        return True
    if device.type == "mps" or _choice[0] == "never":
        return False
    # A compiler traces the choice of CUDA's large cards, since it cannot time anything.
    return _choice[0] == "always" or torch.compiler.is_compiling() or _ratio(device.type, device.index) <= SLOW


@cache
def _ratio(kind: str, index: int | None) -> float:
    """How many times as long a product in float64 takes; infinite where there is none."""
    device = torch.device(kind if index is None else f"{kind}:{index}")
    try:
        with full_precision(device):  # TF32 is no float32
            return _seconds(device, torch.float64) / _seconds(device, torch.float32)
    except (RuntimeError, TypeError):
        return float("inf")


def _seconds(device: torch.device, dtype: torch.dtype) -> float:
    """The least time of a product, with the host waiting for it."""
    a = torch.ones(SIZE, SIZE, dtype=dtype, device=device)
    least = float("inf")
    for _ in range(ROUNDS):
        torch.accelerator.synchronize(device)
        start = time.perf_counter()
        a @ a
        torch.accelerator.synchronize(device)
        least = min(least, time.perf_counter() - start)
    return least
