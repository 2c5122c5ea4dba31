"""Weights that a thread's forward passes have computed ahead of their layers. Imports ``snapshot`` and torch."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from stiefel.attach.proxy.snapshot import Snapshot
from stiefel.compat.torch_private import saves_tensors_elsewhere


@dataclass(frozen=True)
class PrefetchedWeight:
    """A weight with its graph, the parametrization that it belongs to, and what it was computed from."""

    parametrization: nn.Module
    snapshot: Snapshot
    weight: Tensor


class _Passes(threading.local):
    """One entry per forward pass under way in this thread, the innermost last; and weights of lists."""

    def __init__(self) -> None:
        self.stack: list[tuple[ref[nn.Module], dict[int, PrefetchedWeight]]] = []
        self.lists: WeakKeyDictionary[nn.Module, tuple[Snapshot, Tensor]] = WeakKeyDictionary()


_passes = _Passes()


def begin(root: nn.Module, weights: Iterable[PrefetchedWeight]) -> None:
    """Offer weights to the layers below ``root`` until :func:`end`."""
    # The entry keeps the parametrizations alive, so that no other object can get their ids.
    _passes.stack.append((ref(root), {id(w.parametrization): w for w in weights}))


def end(root: nn.Module) -> None:
    """Withdraw what the innermost pass offered, if it is ``root``'s."""
    if _passes.stack and _passes.stack[-1][0]() is root:
        _passes.stack.pop()


def offer(weights: Iterable[PrefetchedWeight]) -> None:
    """Offer weights of a list, which has no passes, until others are offered in their place."""
    for w in weights:
        _passes.lists[w.parametrization] = (w.snapshot, w.weight)


def forget(root: nn.Module) -> None:
    """Withdraw the weights of passes of ``root`` that were interrupted, or that called ``root`` again."""
    if _passes.stack:
        _passes.stack = [entry for entry in _passes.stack if entry[0]() is not root]


def prefetched_weight(parametrization: nn.Module, tensors: Sequence[Tensor]) -> Tensor | None:
    """The weight computed ahead for a parametrization, where there is one that is valid here and now."""
    for _, weights in reversed(_passes.stack):
        found = weights.get(id(parametrization))
        if found is not None:
            return _valid(found.snapshot, found.weight, tensors)
    snapshot, weight = _passes.lists.get(parametrization, (None, None))
    return None if snapshot is None or weight is None else _valid(snapshot, weight, tensors)


def _valid(snapshot: Snapshot, weight: Tensor, tensors: Sequence[Tensor]) -> Tensor | None:
    valid = torch.is_grad_enabled() and snapshot.holds_for(tensors) and not saves_tensors_elsewhere()
    return weight if valid else None
