"""What a base optimizer becomes for weights that a method moves itself. Imports ``constraint`` and ``manifold``."""

from stiefel.optim.guard import install_guard, watch_steps
from stiefel.optim.lift import SteppedParameter, lift

__all__ = ["SteppedParameter", "install_guard", "lift", "watch_steps"]
