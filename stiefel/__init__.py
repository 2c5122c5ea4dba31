"""Orthogonal weights for PyTorch networks by one word: constrain, train, compare.

stiefel.constrain(model, "own")
optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.1)
loss = F.cross_entropy(model(x), y) + stiefel.penalty(model)
print(stiefel.report(model))
"""

from stiefel import nn
from stiefel.attach import constrain, optimizer, penalty, project, refresh, release
from stiefel.constraint import Claim, Constraint, ManifoldMethod, Penalty, Reparameterization, StepMethod
from stiefel.errors import (
    DataError,
    DivergenceError,
    LayoutError,
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
from stiefel.measure import Monitor, OrthogonalityReport, report
from stiefel.methods import available, get, register

__version__ = "0.1.0"

__all__ = [
    "Claim",
    "Constraint",
    "DataError",
    "DivergenceError",
    "LayoutError",
    "ManifoldMethod",
    "Monitor",
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
    "constrain",
    "get",
    "nn",
    "optimizer",
    "penalty",
    "project",
    "refresh",
    "register",
    "release",
    "report",
]
