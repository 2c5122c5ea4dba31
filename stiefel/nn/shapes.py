"""Batches of activations as matrices of samples, and the checks of batches and options. Imports ``constraint``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stiefel.constraint import is_count, is_number
from stiefel.errors import BatchError, OptionError, nearest_names


def pooled(x: Tensor, groups: int) -> tuple[Tensor, bool]:
    """A batch (N, C, …) as ``(groups, C/groups, samples)``, and whether a sample's features lie side by side."""
    features = x.shape[1]
    if x.ndim == 2:
        return x.mT.unflatten(0, (groups, features // groups)), True
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        rows = x.movedim(1, -1).reshape(-1, features)
        return rows.mT.unflatten(0, (groups, features // groups)), True
    return x.transpose(0, 1).reshape(groups, features // groups, -1), False


def unpooled(y: Tensor, x: Tensor, in_rows: bool) -> Tensor:
    """Inverse of :func:`pooled`, in the shape and memory format of the batch x."""
    if x.ndim == 2:
        return y.permute(2, 0, 1).reshape(x.shape).contiguous()
    if in_rows:
        return y.permute(2, 0, 1).reshape(x.movedim(1, -1).shape).contiguous().movedim(-1, 1)
    return y.reshape(x.transpose(0, 1).shape).transpose(0, 1).contiguous()


def check_shape(x: Tensor, name: str, shapes: dict[int, str], features: int) -> None:
    """Refuse a batch that the layer does not take.

    Args:
        x: the batch.
        name: of the layer.
        shapes: the shapes that it takes, by their number of dimensions.
        features: C.
    """
    expected = " or ".join(shapes.values())
    if x.ndim not in shapes or x.shape[1] != features:
        raise BatchError(
            f"{name} takes batches of shape {expected} with C = {features}, and got one of shape {tuple(x.shape)}; "
            "Whitening1d takes two or three dimensions, Whitening2d four"
        )
    if not x.is_floating_point():
        raise BatchError(f"{name} whitens real numbers, and got {x.dtype}; convert the batch to float32")


def check_number(count: int, features: int, group_size: int, least: int) -> None:
    """Refuse a batch with too few samples.

    Centred, m ≤ p samples span m − 1 directions. Whitened in these they are the corners of a regular simplex, whatever
    they were: all that told one batch from another is gone, and eps changes that by eps/λ only.
    """
    if count >= least:
        return
    sizes = [d for d in range(1, group_size) if features % d == 0 and d < count]
    smaller = f"group_size={sizes[-1]} or less, " if sizes else ""
    raise BatchError(
        f"a batch of {count} samples cannot be whitened in groups of {group_size} features: less its mean it spans at "
        f"most {max(count - 1, 0)} directions, and whitened samples would have the same distances from each other "
        f"whatever they were, with any eps; use {smaller}a batch of {least} samples or more (drop_last=True for the "
        "last one of an epoch), or eval() to apply the running statistics"
    )


def check_options(
    num_features: Any, eps: Any, momentum: Any, kind: Any, iterations: Any, kinds: tuple[str, ...]
) -> None:
    """Raise :class:`OptionError` for what is not a value of its option."""
    for name, count in (("num_features", num_features), ("iterations", iterations)):
        if not is_count(count):
            raise OptionError(f"{name}={count!r}: expected a positive whole number")
    if not (is_number(eps) and eps >= 0):
        raise OptionError(f"eps={eps!r}: expected a number of at least 0")
    if momentum is not None and not (is_number(momentum) and 0 <= momentum <= 1):
        raise OptionError(f"momentum={momentum!r}: expected a number from 0 to 1, or None for the plain average")
    if kind not in kinds:
        raise OptionError(f"kind={kind!r}: {nearest_names(str(kind), kinds)}")


def number_of_groups(features: int, groups: int | None, group_size: int | None) -> int:
    """The number of groups, of which that or their size is given, or neither."""
    if groups is not None and group_size is not None:
        raise OptionError(f"groups={groups!r} and group_size={group_size!r}: expected one of the two")
    for name, value in (("groups", groups), ("group_size", group_size)):
        if value is not None and not (is_count(value) and features % value == 0):
            divisors = [d for d in range(1, features + 1) if features % d == 0]
            raise OptionError(f"{name}={value!r}: expected a divisor of the {features} features, one of {divisors}")
    if group_size is not None:
        return features // group_size
    return 1 if groups is None else groups
