"""Equal-shaped matrices of different weights as one batch, and back; gradients as they come. Imports ``layout``."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from stiefel.errors import OptionError
from stiefel.layout import Layout

T = TypeVar("T")

_most = [2**28]
"""Bytes of the weights of one batch at most. No share of what is free: a step must not depend on that."""


def bucket_bytes(most: int) -> None:
    """Bound the weights that are computed as one batch, to so many bytes of theirs; default 256 MiB.

    A step needs several times the memory of the batch that it computes (docs/budget.md). Batches that are cut give the
    same weights to rounding. A weight that is larger by itself is a batch of its own.

    Raises:
        OptionError: it is no positive whole number.
    """
    if not isinstance(most, int) or isinstance(most, bool) or most < 1:
        raise OptionError(f"most={most!r}: expected a positive number of bytes, for example 2**26")
    _most[0] = most


def bucket(
    items: Iterable[T], key: Callable[[T], Hashable], weight: Callable[[T], Tensor] | None = None
) -> list[list[T]]:
    """Group items with equal keys, keeping the order of first appearance.

    Args:
        items, key: what to group, by what.
        weight: of an item; a group is then cut where its weights are more than :func:`bucket_bytes`.
    """
    groups: dict[Hashable, list[list[T]]] = {}
    sizes: dict[Hashable, int] = {}
    for item in items:
        k, size = key(item), 0 if weight is None else weight(item).nbytes
        sizes[k] = sizes.get(k, 0) + size
        cuts = groups.setdefault(k, [[]])
        if cuts[-1] and sizes[k] > _most[0]:
            cuts.append([])
            sizes[k] = size
        cuts[-1].append(item)
    return [group for cuts in groups.values() for group in cuts]


def stack(layouts: Sequence[Layout], tensors: Sequence[Tensor], *, scaled: bool, copy: bool = False) -> Tensor:
    """Read tensors as one batch ``(Σb, p, n)``: as points where ``scaled``, otherwise as plain matrices.

    A single tensor that needs no rearranging is only viewed, unless a ``copy`` is asked for.
    """
    if len(tensors) == 1:
        part = layouts[0].points(tensors[0]) if scaled else layouts[0].matrices(tensors[0])
        return part.clone(memory_format=torch.contiguous_format) if copy else part
    # Alike, all are stacked and scaled at once; otherwise each is read by its own layout.
    if _alike(layouts):
        batch = torch.stack(list(tensors)).reshape(-1, *layouts[0].matrix_shape[1:])  # (Σb, p, n)
        return batch / layouts[0].scale if scaled and layouts[0].scale != 1 else batch
    return torch.cat([lay.points(t) if scaled else lay.matrices(t) for lay, t in zip(layouts, tensors, strict=True)])


def unstack(layouts: Sequence[Layout], batch: Tensor, *, scaled: bool) -> list[Tensor]:
    """Inverse of :func:`stack`: one tensor per weight, in the weight's own shape."""
    if len(layouts) > 1 and _alike(layouts):
        weights = batch * layouts[0].scale if scaled and layouts[0].scale != 1 else batch
        return list(weights.reshape(-1, *layouts[0].shape).unbind())
    # Each weight has b matrices in a row.
    parts = batch.split([lay.matrix_shape[0] for lay in layouts])
    return [lay.weight(x) if scaled else lay.tensor(x) for lay, x in zip(layouts, parts, strict=True)]


def _alike(layouts: Sequence[Layout]) -> bool:
    """Whether the weights have one shape and scale and hold their matrices in order: one view then reads them all."""
    shape, scale = layouts[0].shape, layouts[0].scale
    return all(lay.in_order and lay.shape == shape and lay.scale == scale for lay in layouts)


def dense(gradient: Tensor) -> Tensor:
    """A gradient with all its entries: that of an embedding may be sparse."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def laid_out_as(value: Tensor, gradient: Tensor) -> Tensor:
    """A value in the strides of the gradient that it replaces: kernels over lists of tensors want them alike."""
    alike = gradient.is_sparse or value.stride() == gradient.stride()
    return value if alike else torch.empty_like(gradient).copy_(value)  # channels_last
