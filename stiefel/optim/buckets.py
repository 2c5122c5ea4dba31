"""Equal-shaped matrices of different weights as one batch, and back. Imports ``layout``."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from stiefel.layout import Layout

T = TypeVar("T")


def bucket(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Group items with equal keys, keeping the order of first appearance."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def stack(layouts: Sequence[Layout], tensors: Sequence[Tensor], *, scaled: bool, copy: bool = False) -> Tensor:
    """Read tensors as one batch ``(Σb, p, n)``: as points where ``scaled``, otherwise as plain matrices.

    A single tensor that needs no rearranging is only viewed, unless a ``copy`` is asked for.
    """
    parts = [lay.points(t) if scaled else lay.matrices(t) for lay, t in zip(layouts, tensors, strict=True)]
    if len(parts) > 1:
        return torch.cat(parts)
    return parts[0].clone(memory_format=torch.contiguous_format) if copy else parts[0]


def unstack(layouts: Sequence[Layout], batch: Tensor, *, scaled: bool) -> list[Tensor]:
    """Inverse of :func:`stack`: one tensor per weight, in the weight's own shape."""
    parts = batch.split([lay.matrix_shape[0] for lay in layouts])
    return [lay.weight(x) if scaled else lay.tensor(x) for lay, x in zip(layouts, parts, strict=True)]
