"""Optimizers of constrained weights: lifted steps, checks, weight decay. Imports ``constraint`` and ``manifold``."""

from stiefel.optim.decay import keep_decay_off
from stiefel.optim.guard import Mark, is_watched, steps_seen, unwatch, watch
from stiefel.optim.lift import lift
from stiefel.optim.stepped_parameter import SteppedParameter, tag_stepped, untag

__all__ = [
    "Mark",
    "SteppedParameter",
    "is_watched",
    "keep_decay_off",
    "lift",
    "steps_seen",
    "tag_stepped",
    "untag",
    "unwatch",
    "watch",
]
