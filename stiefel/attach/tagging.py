"""Making parameters known to optimizers, by their ownership and geoopt manifolds. Imports ``weights``, ``optim``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from stiefel.attach.weights import ConstrainedWeight, bindings_of
from stiefel.compat.geoopt import tag as tag_manifold
from stiefel.compat.geoopt import untag as untag_manifold
from stiefel.constraint import ManifoldMethod, Reparameterization
from stiefel.optim import mark, on_unknown, unmark

_owners: WeakSet[nn.Module] = WeakSet()
"""Modules with constrained weights: all that were constrained, loaded, or trained in this process."""


def tag_weight(found: ConstrainedWeight) -> None:
    """Make a weight's parameter known to optimizers, in place; also after a conversion that made another parameter."""
    binding, parameter = found.binding, found.parameter
    method = binding.constraint
    if isinstance(method, ManifoldMethod) and not hasattr(parameter, "manifold"):
        manifold = method.manifold(binding.layout)
        manifold.binding = binding
        tag_manifold(parameter, manifold)
    marks = [mark(parameter, binding)]
    # Gains and other trained parts are checked for divergence too, but count no steps.
    if isinstance(method, Reparameterization):
        parts = found.owner.parametrizations[found.tensor].parameters()  # type: ignore[index, union-attr]
        marks += [mark(part, binding, part=True) for part in parts if part is not parameter]
    found.keep(marks)
    _owners.add(found.owner)


def remember(owner: nn.Module, args: Any) -> None:
    """Remember a module, which may be a copy: a forward pre-hook of modules with constrained weights."""
    # Nothing trains without gradients, and inference should cost what it does with plain layers. A compiled pass must
    # not depend on a set that other models change.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _owners.add(owner)


def _tag_unknown(parameters: Iterable[Tensor]) -> None:
    """Tag those of some parameters that are constrained: a conversion or ``fully_shard`` has made them anew."""
    sought = set(map(id, parameters))
    for owner in list(_owners):
        for tensor, binding in bindings_of(owner).items():
            found = ConstrainedWeight(binding.label, owner, tensor, binding)
            if not sought.isdisjoint(map(id, found.trained())):
                tag_weight(found)


on_unknown(_tag_unknown)


def untag_weight(found: ConstrainedWeight) -> None:
    """Make its parameter an ordinary one again, which any optimizer may step."""
    parameter = found.parameter
    if isinstance(found.binding.constraint, ManifoldMethod) and hasattr(parameter, "manifold"):
        untag_manifold(parameter)
    unmark(parameter)
