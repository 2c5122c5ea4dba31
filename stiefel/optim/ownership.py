"""Which parameters are constrained, and by what: the one thing that optimizers know of a model.

A parameter carries its :class:`Ownership` as an attribute. Its class would not do: a sharded parameter (a ``DTensor``)
cannot have another class, and compilers and exporters treat subclasses of parameters apart. The attribute is lost where
a parameter is made anew: by copies, for which a :class:`Mark` brings it back, and by conversions and by
``fully_shard``, after which :func:`on_unknown` asks those who know the model. Imports ``compat`` and ``constraint``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable
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
    """

    binding: Binding
    part: bool = False

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
    def counts(self) -> bool:
        """Whether what its method does depends on the steps taken: draws, or a schedule of a penalty's strength."""
        method = self.binding.constraint
        return not self.part and (getattr(method, "counts", False) or getattr(method, "scheduled", False))


_ATTRIBUTE = "_stiefel_ownership"  # on the parameter itself: a weak reference to it would forbid torch to swap it


def ownership(parameter: Tensor) -> Ownership | None:
    """What is known of a parameter; None of one that is free, or that was made anew since."""
    return getattr(parameter, _ATTRIBUTE, None)


def stepped_by(parameter: Tensor) -> Binding | None:
    """The binding of a parameter that a method moves in the step; None of any other."""
    found = ownership(parameter)
    return found.binding if found is not None and found.lifts else None


def mark(parameter: Tensor, binding: Binding, *, part: bool = False) -> Mark:
    """Make a parameter known to optimizers.

    Returns:
        A mark to keep on the parameter's module, so that in a copy of the module the parameter's copy is known.
    """
    return Mark(parameter, Ownership(binding, part))


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


STEPS = "steps_taken"
"""Where an optimizer's state has them too: formats that keep tensors alone lose a model's metadata."""


def note_count(optimizer: torch.optim.Optimizer, parameter: Tensor, owned: Ownership) -> None:
    """Note the steps of a weight whose method depends on them.

    Args:
        optimizer: which has just stepped the parameter, so that its own state of it is there already.
        parameter: the weight, or its proxy.
        owned: what is known of it.
    """
    optimizer.state[parameter][STEPS] = owned.binding.tally.steps


def restore_counts(optimizer: torch.optim.Optimizer) -> None:
    """Let weights go on from the steps that a loaded state has."""
    for parameter, state in optimizer.state.items():
        owned = ownership(parameter)
        if owned is not None and owned.counts and STEPS in state:
            owned.binding.tally.steps = owned.binding.tally.resumed = int(state[STEPS])
