"""Optimizers of constrained weights: lifted steps, checks, weight decay. Imports ``constraint`` and ``manifold``."""

from stiefel.optim.decay import keep_decay_off
from stiefel.optim.guard import steps_seen
from stiefel.optim.lift import Lift, lift
from stiefel.optim.ownership import Mark, is_lent, mark, on_due, on_unknown, ownership, unmark

__all__ = [
    "Lift",
    "Mark",
    "is_lent",
    "keep_decay_off",
    "lift",
    "mark",
    "on_due",
    "on_unknown",
    "ownership",
    "steps_seen",
    "unmark",
]
