"""The one import of geoopt, with its warnings silenced, and checks for what is an instance of its classes.

Importing geoopt takes half a second, so it happens when ``from stiefel.compat.geoopt import geoopt`` first runs. The
other functions do not import it before a weight is on a manifold. Imports torch alone.
"""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from stiefel.compat.sharding import is_sharded

if TYPE_CHECKING:
    import geoopt
    import torch

__all__ = ["geoopt", "is_on_manifold", "is_riemannian", "tag", "untag"]


def __getattr__(name: str) -> Any:
    # PEP 562: called whenever the name is taken from this module, which never binds it.
    if name != "geoopt":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # geoopt compiles helpers with torch.jit, which torch deprecates
        import geoopt
    return geoopt


def tag(parameter: nn.Parameter, manifold: geoopt.Manifold) -> None:
    """Make a parameter a ``geoopt.ManifoldParameter`` in place, so that ties and optimizers stay valid.

    A sharded one keeps its class, and is on the manifold for the optimizers of this library alone.
    """
    from stiefel.compat.geoopt import geoopt

    if not is_sharded(parameter):
        parameter.__class__ = geoopt.ManifoldParameter
    parameter.manifold = manifold  # type: ignore[attr-defined]


def untag(parameter: nn.Parameter) -> None:
    """Make a parameter that was tagged an ordinary one again, in place."""
    del parameter.manifold  # type: ignore[attr-defined]
    if not is_sharded(parameter):
        parameter.__class__ = nn.Parameter


def is_on_manifold(tensor: Tensor) -> bool:
    """Whether a tensor is on a geoopt manifold, so that geoopt's own optimizers may step it."""
    # As long as nothing has imported geoopt, no tensor is on its manifolds.
    geoopt = sys.modules.get("geoopt")
    return geoopt is not None and isinstance(tensor, geoopt.ManifoldTensor)


def is_riemannian(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer is one of geoopt's, or derived from one."""
    geoopt = sys.modules.get("geoopt")
    return geoopt is not None and isinstance(optimizer, geoopt.optim.mixin.OptimMixin)
