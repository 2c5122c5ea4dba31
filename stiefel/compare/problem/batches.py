"""Batches of a run: the same, in the same order, for every method of a seed. Imports torch and numpy."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stiefel.compat.torch_private import tree_leaves, tree_map

Batch = Any
"""Whatever the problem's loss takes: usually a pair (inputs, targets), or a dictionary of tensors."""
Part = tuple[Tensor, ...] | Iterable[Batch]
"""A part of the data: tensors with equal first dimension, or an iterable that gives its batches each time anew."""


class Batches:
    """Epochs of one part of the data.

    Tensors are shuffled and cut by a generator of this object's own. An iterable gives its own batches; while it does,
    the global generators of Python, numpy and torch are in a state of this object's own, so that shuffling and
    augmentation are the same for a method that draws random numbers and for one that does not.

    Args:
        part: the data.
        size: examples per batch of tensors.
        seed: of the order.
        prepare: applied to each batch, e.g. to move it to a device.
        limit: batches per epoch at most; needed where an iterable never ends.
    """

    def __init__(
        self,
        part: Part,
        size: int,
        seed: int,
        prepare: Callable[[Batch], Batch] = lambda batch: batch,
        limit: int | None = None,
    ) -> None:
        self.part, self.size, self.prepare, self.limit = part, size, prepare, limit
        self._order = torch.Generator().manual_seed(seed)
        self._randomness = Randomness(seed)

    def epoch(self) -> Iterator[Batch]:
        """The batches of the next epoch, shuffled; of tensors, a last partial batch is dropped."""
        if isinstance(self.part, tuple):
            # Drawn on the CPU, so that the order is the same whatever device the data are on.
            order = torch.randperm(len(self.part[0]), generator=self._order)
            batches = (tuple(t[rows.to(t.device)] for t in self.part) for rows in _slices(order, self.size, whole=True))
            yield from map(self.prepare, islice(batches, self.limit))
        else:
            with self._randomness.use():  # a DataLoader draws its seed here
                stream = iter(self.part)
            # Own random state while a batch is made, the run's between batches. iter(int, 1) never ends (int() is 0);
            # self, which is never a batch, marks the end of the stream.
            for _ in range(self.limit) if self.limit is not None else iter(int, 1):
                with self._randomness.use():
                    batch = next(stream, self)
                if batch is self:
                    return
                yield self.prepare(batch)

    def all(self, most: int | None = None) -> Iterator[Batch]:
        """Every batch once, in the given order, a last partial one included: for evaluation.

        Args:
            most: examples per batch of tensors; default: ``size``.
        """
        if isinstance(self.part, tuple):
            rows = torch.arange(len(self.part[0]))
            yield from (
                self.prepare(tuple(t[r.to(t.device)] for t in self.part)) for r in _slices(rows, most or self.size)
            )
        else:
            yield from map(self.prepare, islice(iter(self.part), self.limit))


class Randomness:
    """A second state of the global generators of Python, numpy and torch, beside the one in use."""

    def __init__(self, seed: int) -> None:
        outer = _states()
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        # Not torch.manual_seed, which seeds CUDA too: `_restore` would not undo that.
        torch.default_generator.manual_seed(seed)
        self._state = _states()
        _restore(outer)

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Draw from this state inside, and leave the one in use untouched."""
        outer = _states()
        _restore(self._state)
        try:
            yield
        finally:
            self._state = _states()
            _restore(outer)


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  a user's model or data may use the global generator
    torch.manual_seed(seed)


def mover(device: torch.device, dtype: torch.dtype) -> Callable[[Batch], Batch]:
    """A function that moves a batch's tensors, however nested, to a device, real floating-point ones to a dtype."""

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device, dtype) if leaf.is_floating_point() else leaf.to(device)

    return lambda batch: tree_map(move, batch)


def examples(batch: Batch) -> int:
    """How many examples a batch holds: the length of its first tensor, 1 where that has none or there is no tensor."""
    first = next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)), None)
    return len(first) if first is not None and first.ndim else 1


def share(batch: Batch, rank: int, of: int) -> Batch:
    """One process's part of a batch: every ``of``-th example from ``rank`` on."""
    return tree_map(lambda t: t[rank::of] if isinstance(t, Tensor) and t.ndim else t, batch)


def size_of(part: Part) -> str:
    """A part's size in words."""
    if isinstance(part, tuple):
        return f"{len(part[0])} examples"
    return f"{len(part)} batches" if isinstance(part, Sized) else "an iterable of batches"


def _slices(rows: Tensor, size: int, *, whole: bool = False) -> Iterator[Tensor]:
    end = len(rows) - size + 1 if whole else len(rows)  # `whole`: the last start leaves room for a full slice
    return (rows[start : start + size] for start in range(0, end, size))


def _states() -> tuple[Any, Any, Tensor]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002


def _restore(states: tuple[Any, Any, Tensor]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])
