"""The context in which a constraint computes: no autocast, no TF32. Imports only torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Turn autocast and TF32 off on ``device``, and restore both.

    Autocast and TF32 leave an "orthonormal" matrix with a residual of 0.01 to 0.07 (bfloat16) or 3e-4 (TF32), and a
    dtype check cannot see it: a product under autocast can come back as float32 with bfloat16 accuracy.
    """
    tf32 = device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    if tf32:
        torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
