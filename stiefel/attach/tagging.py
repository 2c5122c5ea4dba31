"""Making parameters known to optimizers, by their ownership and geoopt manifolds. Imports ``weights``, ``optim``."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from stiefel.attach.intact import refuse_taken_over, warn_of_changes
from stiefel.attach.proxy.rebase import move_starts
from stiefel.attach.weights import ConstrainedWeight, bindings_of
from stiefel.compat.geoopt import tag as tag_manifold
from stiefel.compat.geoopt import untag as untag_manifold
from stiefel.constraint import ManifoldMethod, Reparameterization
from stiefel.errors import WeightError
from stiefel.optim import mark, on_due, on_unknown, ownership, unmark

ASSIGNED, LOADED = "assigned", "loaded"
"""How a weight got its value, for a warning."""

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
    moving = getattr(method, "rebase", None) is not None
    marks = [mark(parameter, binding, computed=found.parametrization if moving else None)]
    # Gains and other trained parts are checked for divergence too, but count no steps.
    if isinstance(method, Reparameterization):
        parts = found.owner.parametrizations[found.tensor].parameters()  # type: ignore[index, union-attr]
        marks += [mark(part, binding, part=True) for part in parts if part is not parameter]
    found.keep(marks)
    _owners.add(found.owner)


def remember(owner: nn.Module, args: Any) -> None:
    """Remember a module, which may be a copy, and check it: a forward pre-hook of modules with constrained weights."""
    if torch.compiler.is_compiling():
        return  # a compiled pass must not depend on a set that other models change
    if torch.is_grad_enabled():  # nothing trains without, and inference should cost what it does with plain layers
        refuse_taken_over(owner)
        _owners.add(owner)
    if not (owner.training and torch.is_grad_enabled()):
        warn_of_changes(owner)


@torch.no_grad()
def recognize(found: ConstrainedWeight) -> None:
    """Tag a weight; one whose parameter is another than before, by an assignment or a conversion, is put on its set."""
    known = ownership(found.parameter) is not None
    tag_weight(found)
    if not known:
        put_on_set(found, ASSIGNED)


def put_on_set(found: ConstrainedWeight, how: str) -> None:
    """Move a weight that breaks its method's claim to the nearest point of its set, with a warning if it was far off.

    Args:
        found: the weight. With a proxy alone it is on the set; a trivialization's base point may be off it.
        how: it got its value, for the warning.

    Raises:
        WeightError: it has entries that are NaN or infinite: no point of the set is the nearest.
    """
    if found.binding.constraint.claim is None or not found.may_be_off_set or found.parameter.is_meta:
        return
    residual = found.residual()
    if residual != residual:  # NaN
        raise WeightError(
            f"weight '{found.binding.label}' was {how} with entries that are NaN or infinite; load "
            "a checkpoint from before the loss diverged"
        )
    # What is off by no more than single precision has come from there (a conversion, a file): nothing to tell of, and
    # the next step takes it to the set.
    far = not (found.binding.allows(residual, torch.float32) and found.has_determinant())
    if far or (how == LOADED and not found.allows(residual)):
        found.move_to_nearest()
    if far:
        warnings.warn(
            f"weight '{found.binding.label}' was {how} off its constraint's set (‖W Wᵀ/s² − I‖_F/√p is "
            f"{residual:.1e}) and has been moved to the nearest point of it",
            stacklevel=3,
        )


@torch.no_grad()
def _tag_unknown(parameters: Iterable[Tensor]) -> None:
    """Tag those of some parameters that are constrained: a conversion or ``fully_shard`` has made them anew."""
    holders: dict[int, list[ConstrainedWeight]] = {id(p): [] for p in parameters}
    for owner in list(_owners):
        for tensor, binding in bindings_of(owner).items():
            found = ConstrainedWeight(binding.label, owner, tensor, binding)
            for p in found.trained():
                holders.get(id(p), []).append(found)
    # In the order of the parameters, which all processes share: that of a set of modules is each one's own, and to look
    # at a sharded weight they must meet.
    for found in (weight for weights in holders.values() for weight in weights):
        recognize(found)


on_unknown(_tag_unknown)
on_due(move_starts)


def untag_weight(found: ConstrainedWeight) -> None:
    """Make its parameter an ordinary one again, which any optimizer may step."""
    parameter = found.parameter
    if isinstance(found.binding.constraint, ManifoldMethod) and hasattr(parameter, "manifold"):
        untag_manifold(parameter)
    unmark(parameter)
