"""What a base optimizer becomes for weights that a method moves itself. Imports ``constraint`` and ``manifold``."""

from stiefel.optim.guard import is_watched, steps_seen, unwatch, watch
from stiefel.optim.lift import Ownership, SteppedParameter, Tally, hand_over, lift, take_back

__all__ = [
    "Ownership",
    "SteppedParameter",
    "Tally",
    "hand_over",
    "is_watched",
    "lift",
    "steps_seen",
    "take_back",
    "unwatch",
    "watch",
]
