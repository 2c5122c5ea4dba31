"""Orthogonal weights for PyTorch networks by one word: constrain, train, compare.

stiefel.constrain(model, "own")
optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.1)
loss = F.cross_entropy(model(x), y) + stiefel.penalty(model)
print(stiefel.report(model))

Names are resolved on first use: reading the records of a comparison needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from stiefel.errors import (
    BatchError,
    DataError,
    DivergenceError,
    LayoutError,
    ObjectiveError,
    OptimizerError,
    OptionError,
    ProblemError,
    RecordError,
    SelectionError,
    StiefelError,
    StorageError,
    UncountedOperatorError,
    UnknownMethodError,
    WeightError,
)

if TYPE_CHECKING:
    from stiefel import nn
    from stiefel.attach import (
        Minimum,
        constrain,
        gradient_norm,
        minimize,
        optimizer,
        orthogonalize,
        penalty,
        project,
        refresh,
        release,
    )
    from stiefel.constraint import Claim, Constraint, ManifoldMethod, Penalty, Reparameterization, StepMethod
    from stiefel.measure import Monitor, OrthogonalityReport, report
    from stiefel.methods import available, get, register

__version__ = "0.1.0"

__all__ = [
    "BatchError",
    "Claim",
    "Constraint",
    "DataError",
    "DivergenceError",
    "LayoutError",
    "ManifoldMethod",
    "Minimum",
    "Monitor",
    "ObjectiveError",
    "OptimizerError",
    "OptionError",
    "OrthogonalityReport",
    "Penalty",
    "ProblemError",
    "RecordError",
    "Reparameterization",
    "SelectionError",
    "StepMethod",
    "StiefelError",
    "StorageError",
    "UncountedOperatorError",
    "UnknownMethodError",
    "WeightError",
    "available",
    "bucket_bytes",
    "constrain",
    "get",
    "gradient_norm",
    "minimize",
    "nn",
    "optimizer",
    "orthogonalize",
    "penalty",
    "project",
    "refresh",
    "register",
    "release",
    "report",
    "use_double",
]

_ROOMS = {
    "attach": (
        "Minimum",
        "bucket_bytes",
        "constrain",
        "gradient_norm",
        "minimize",
        "optimizer",
        "orthogonalize",
        "penalty",
        "project",
        "refresh",
        "release",
        "use_double",
    ),
    "constraint": ("Claim", "Constraint", "ManifoldMethod", "Penalty", "Reparameterization", "StepMethod"),
    "measure": ("Monitor", "OrthogonalityReport", "report"),
    "methods": ("available", "get", "register"),
}
"""The subpackage that defines each public name."""
_HOME = {name: room for room, names in _ROOMS.items() for name in names}
_MODULES = (*_ROOMS, "nn", "optim")
"""Subpackages that are attributes of the package without an explicit import."""


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        # The next look-up finds the name without a call of __getattr__.
        globals()[name] = value
        return value
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
