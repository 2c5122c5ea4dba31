"""Making parameters known to optimizers, by the classes and marks that they carry. Imports ``weights``, ``optim``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stiefel.attach.weights import ConstrainedWeight, bindings_of
from stiefel.compat.geoopt import tag as tag_manifold
from stiefel.compat.geoopt import untag as untag_manifold
from stiefel.constraint import ManifoldMethod, Reparameterization
from stiefel.optim import SteppedParameter, is_watched, tag_stepped, untag, unwatch, watch


def tag_weight(found: ConstrainedWeight) -> None:
    """Make a weight's parameter known to optimizers, in place; also after a copy or a conversion that lost the mark."""
    binding, parameter = found.binding, found.parameter
    method = binding.constraint
    if isinstance(method, ManifoldMethod) and not hasattr(parameter, "manifold"):
        manifold = method.manifold(binding.layout)
        manifold.binding = binding
        tag_manifold(parameter, manifold)
    elif method.lifts:
        tag_stepped(parameter, binding)
    marks = [watch(parameter, binding)]
    # Gains and other trained parts are checked for divergence too, but count no steps.
    if isinstance(method, Reparameterization):
        parts = found.owner.parametrizations[found.tensor].parameters()  # type: ignore[index, union-attr]
        marks += [watch(part, binding, part=True) for part in parts if part is not parameter]
    found.keep(marks)


def retag(owner: nn.Module, args: Any) -> None:
    """Tag parameters that a copy or a conversion (``torch.__future__``'s flags) has made, before they train.

    A forward pre-hook of modules with constrained weights.
    """
    if not torch.is_grad_enabled():  # nothing trains, and inference should cost what it does with plain layers
        return
    for tensor, binding in bindings_of(owner).items():
        found = ConstrainedWeight(binding.label, owner, tensor, binding)
        parameter = found.parameter
        # Replicas of a module (DataParallel) hold plain tensors.
        if isinstance(parameter, nn.Parameter) and not is_watched(parameter):
            tag_weight(found)


def untag_weight(found: ConstrainedWeight) -> None:
    """Make its parameter an ordinary one again, which any optimizer may step."""
    parameter = found.parameter
    if isinstance(found.binding.constraint, ManifoldMethod) and hasattr(parameter, "manifold"):
        untag_manifold(parameter)
    elif isinstance(parameter, SteppedParameter):
        untag(parameter)
    unwatch(parameter)
