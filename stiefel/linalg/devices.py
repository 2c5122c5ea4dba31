"""What a device can do, and what the host may do while it computes. Imports torch and the errors."""

from __future__ import annotations

import time
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from stiefel.errors import OptionError

When = Literal["auto", "always", "never"]

SLOW = 4.0
"""How many times as long a product may take in float64 as in float32, before float32 is used alone: its way takes
about twice as many products."""
SIZE, ROUNDS = 1024, 5
"""The products that are timed."""

_choice: list[When] = ["auto"]


def may_wait(tensor: Tensor) -> bool:
    """Whether a step may read a tensor's values: anywhere but on a CPU the host would wait for all that is queued."""
    return tensor.device.type == "cpu"


def is_capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured on a tensor's device: values can then not be read back, not even later."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


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
    from stiefel.linalg.precision import full_precision  # which asks this module what a device has

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
