"""Binding methods to modules: ``constrain``, ``optimizer``, ``penalty``, ``project``, ``refresh``, ``release``,
``orthogonalize``.

The only package that knows the insides of torch.nn. Imports ``methods``, ``optim``, ``layout`` and below.
"""

from stiefel.attach.constrain import constrain, project, refresh, release
from stiefel.attach.function import orthogonalize
from stiefel.attach.train import optimizer, penalty
from stiefel.attach.weights import ConstrainedWeight, constrained_weights
from stiefel.constraint.binding import Binding

__all__ = [
    "Binding",
    "ConstrainedWeight",
    "constrain",
    "constrained_weights",
    "optimizer",
    "orthogonalize",
    "penalty",
    "project",
    "refresh",
    "release",
]
