"""What a base optimizer becomes for weights that a method moves itself. Imports ``constraint`` and ``manifold``."""

from stiefel.optim.decay import keep_decay_off
from stiefel.optim.guard import Mark, Watched, is_watched, steps_seen, unwatch, watch
from stiefel.optim.lift import lift
from stiefel.optim.stepped_parameter import Ownership, SteppedParameter, Tally, hand_over, take_back

__all__ = [
    "Mark",
    "Ownership",
    "SteppedParameter",
    "Tally",
    "Watched",
    "hand_over",
    "is_watched",
    "keep_decay_off",
    "lift",
    "steps_seen",
    "take_back",
    "unwatch",
    "watch",
]
