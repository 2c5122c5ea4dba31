"""What a method is, and the catalogue of methods by name."""

from stiefel.constraint.base import (
    RELU_SCALE,
    Constraint,
    Control,
    Decay,
    ManifoldMethod,
    Reparameterization,
    StepMethod,
)
from stiefel.constraint.binding import Binding, Tally, residual_of
from stiefel.constraint.catalogue import available, control, get, method_class, register
from stiefel.constraint.centred import Centred
from stiefel.constraint.claim import ROUNDING, Claim
from stiefel.constraint.options import is_count, is_number
from stiefel.constraint.penalty import Penalized, Penalty, Schedule
from stiefel.constraint.transport import TransportMethod
from stiefel.constraint.trivialization import Trivialization

__all__ = [
    "RELU_SCALE",
    "ROUNDING",
    "Binding",
    "Centred",
    "Claim",
    "Constraint",
    "Control",
    "Decay",
    "ManifoldMethod",
    "Penalized",
    "Penalty",
    "Reparameterization",
    "Schedule",
    "StepMethod",
    "Tally",
    "TransportMethod",
    "Trivialization",
    "available",
    "control",
    "get",
    "is_count",
    "is_number",
    "method_class",
    "register",
    "residual_of",
]
