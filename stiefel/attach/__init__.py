"""Binding methods to modules: ``constrain``, ``optimizer``, ``penalty``, ``project``, ``refresh``, ``release``,
``orthogonalize``, ``minimize``, ``gradient_norm``, ``use_double``,
``bucket_bytes``.

The only package that knows the insides of torch.nn. Imports ``methods``, ``optim``, ``layout`` and below.
"""

from stiefel.attach.constrain import constrain, project, refresh, release
from stiefel.attach.minimize import gradient_norm, minimize
from stiefel.attach.proxy.function import orthogonalize
from stiefel.attach.train import optimizer, penalty
from stiefel.attach.weights import ConstrainedWeight, constrained_weights
from stiefel.constraint.binding import Binding
from stiefel.linalg import use_double
from stiefel.optim.buckets import bucket_bytes
from stiefel.optim.solve.minimum import Minimum

__all__ = [
    "Binding",
    "ConstrainedWeight",
    "Minimum",
    "bucket_bytes",
    "constrain",
    "constrained_weights",
    "gradient_norm",
    "minimize",
    "optimizer",
    "orthogonalize",
    "penalty",
    "project",
    "refresh",
    "release",
    "use_double",
]
