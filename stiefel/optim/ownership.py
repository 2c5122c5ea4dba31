"""Which parameters are constrained, and by what: the one thing that optimizers know of a model.

A parameter carries its :class:`Ownership` as an attribute. Its class would not do: a sharded parameter (a ``DTensor``)
cannot have another class, and compilers and exporters treat subclasses of parameters apart. The attribute is lost where
a parameter is made anew: by copies, for which a :class:`Mark` brings it back, and by conversions and by
``fully_shard``, after which :func:`on_unknown` asks those who know the model. Imports ``compat`` and ``constraint``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from stiefel.compat.torch_private import version
from stiefel.constraint import Binding, Decay


@dataclass(frozen=True)
class Ownership:
    """What optimizers need to know of a constrained parameter.

    Args:
        binding: of its weight.
        part: whether it is another trained part of a weight whose own parameter is owned: a learnable gain.
        computed: the module that computes the weight from the parameter, where the start of its map moves.
    """

    binding: Binding
    part: bool = False
    computed: Any = None

    @property
    def label(self) -> str:
        """Its weight's name."""
        return self.binding.label

    @property
    def decay(self) -> Decay:
        """What weight decay does to its weight."""
        return "acts" if self.part else self.binding.constraint.decay

    @property
    def lifts(self) -> bool:
        """Whether the parameter is a weight that its method moves, given the displacement of a base optimizer."""
        return not self.part and self.binding.constraint.lifts

    @property
    def rebase(self) -> int | None:
        """After how many steps the start of its weight's map moves to the weight; None for never."""
        return None if self.part else getattr(self.binding.constraint, "rebase", None)

    @property
    def is_due(self) -> bool:
        """Whether the step just taken was the last of so many."""
        return self.rebase is not None and self.binding.tally.stepped % self.rebase == 0

    @property
    def counts(self) -> bool:
        """Whether what its method does depends on the steps taken: draws, a moving start, a penalty's schedule."""
        method = self.binding.constraint
        counted = getattr(method, "counts", False) or getattr(method, "scheduled", False)
        return not self.part and (counted or self.rebase is not None)


_ATTRIBUTE = "_stiefel_ownership"  # on the parameter itself: a weak reference to it would forbid torch to swap it


def ownership(parameter: Tensor) -> Ownership | None:
    """What is known of a parameter; None of one that is free, or that was made anew since."""
    return getattr(parameter, _ATTRIBUTE, None)


def stepped_by(parameter: Tensor) -> Binding | None:
    """The binding of a parameter that a method moves in the step; None of any other."""
    found = ownership(parameter)
    return found.binding if found is not None and found.lifts else None


def mark(parameter: Tensor, binding: Binding, *, part: bool = False, computed: Any = None) -> Mark:
    """Make a parameter known to optimizers, as an :class:`Ownership` has it.

    Returns:
        A mark to keep on the parameter's module, so that in a copy of the module the parameter's copy is known.
    """
    return Mark(parameter, Ownership(binding, part, computed))


def unmark(parameter: Tensor) -> None:
    """Make it an ordinary parameter again."""
    if hasattr(parameter, _ATTRIBUTE):
        delattr(parameter, _ATTRIBUTE)


def state_of(parameter: Tensor) -> Hashable:
    """What changes whenever a parameter's value is written, and is another one's in a copy."""
    return id(parameter), version(parameter)


def is_lent(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter that nobody owns, as ``fully_shard`` lends it to a layer while that runs.

    Its memory is taken back afterwards. Replicas of a module (DataParallel) have plain tensors.
    """
    return isinstance(tensor, nn.Parameter) and ownership(tensor) is None


def quoted(labels: Iterable[str]) -> str:
    """Names of weights, for a message."""
    return ", ".join(f"'{label}'" for label in dict.fromkeys(labels))


class Mark:
    """Keeps a parameter owned through copies and pickles of its holder, which drop a parameter's attributes."""

    def __init__(self, parameter: Tensor, owned: Ownership) -> None:
        self.parameter, self.owned = parameter, owned
        setattr(parameter, _ATTRIBUTE, owned)

    def __deepcopy__(self, memo: dict[int, Any]) -> Mark:
        return Mark(copy.deepcopy(self.parameter, memo), copy.deepcopy(self.owned, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return Mark, (self.parameter, self.owned)


def marks(optimizer: torch.optim.Optimizer) -> list[Mark]:
    """A mark for each owned parameter of an optimizer, to be copied with it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [Mark(p, found) for p in parameters if (found := ownership(p)) is not None]


_finders: list[Callable[[Iterable[Tensor]], None]] = []
_free: WeakKeyDictionary[torch.optim.Optimizer, list[Tensor]] = WeakKeyDictionary()


def on_unknown(finder: Callable[[Iterable[Tensor]], None]) -> None:
    """Register a function that gets the parameters of which nothing is known, and owns those that it knows."""
    _finders.append(finder)


def recognize(optimizer: torch.optim.Optimizer) -> None:
    """Let the finders look at those parameters of an optimizer that are new and of which nothing is known."""
    free = _free.get(optimizer, [])
    known = set(map(id, free))  # the list keeps them alive, so that no other parameter can have one of these ids
    unknown = [
        p for group in optimizer.param_groups for p in group["params"] if id(p) not in known and ownership(p) is None
    ]
    if unknown:
        for finder in _finders:
            finder(unknown)
        _free[optimizer] = free + [p for p in unknown if ownership(p) is None]


_movers: list[Callable[[Sequence[tuple[Any, Tensor]]], None]] = []


def on_due(mover: Callable[[Sequence[tuple[Any, Tensor]]], None]) -> None:
    """Register the function that moves starts: it gets what computes each weight, and the parameter that it is of."""
    _movers.append(mover)


def move_starts(due: Sequence[tuple[Any, Tensor]]) -> None:
    """Move the start of each weight to where it is."""
    for mover in _movers:
        mover(due)


STEPS, STEPPED = "steps_taken", "steps_with_gradient"
"""Where an optimizer's state has them too: formats that keep tensors alone lose a model's metadata."""


def note_count(optimizer: torch.optim.Optimizer, parameter: Tensor, owned: Ownership) -> None:
    """Note the steps of a weight whose method depends on them.

    Args:
        optimizer: which has just stepped the parameter, so that its own state of it is there already.
        parameter: the weight, or its proxy.
        owned: what is known of it.
    """
    tally = owned.binding.tally
    optimizer.state[parameter][STEPS] = tally.steps
    if owned.rebase is not None:
        optimizer.state[parameter][STEPPED] = tally.stepped


def restore_counts(optimizer: torch.optim.Optimizer) -> None:
    """Let weights go on from the steps that a loaded state has."""
    for parameter, state in optimizer.state.items():
        owned = ownership(parameter)
        if owned is not None and owned.counts and STEPS in state:
            tally = owned.binding.tally
            tally.steps = tally.resumed = int(state[STEPS])
            tally.stepped = int(state.get(STEPPED, tally.stepped))
