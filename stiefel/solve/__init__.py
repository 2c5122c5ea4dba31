"""The minimum of a loss that is a function of a module's parameters: no rate, and a stopping rule."""

from stiefel.solve.minimum import Minimum
from stiefel.solve.solving import gradient_norm, minimize

__all__ = ["Minimum", "gradient_norm", "minimize"]
