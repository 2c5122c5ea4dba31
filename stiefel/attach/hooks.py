"""What keeps a constrained module in order between calls: parameter classes, and hooks for loading and saving.

Hooks are functions of this file that look their module's bindings up, so that copies and pickles keep working.
Imports ``binding``, ``optim`` and below.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from stiefel.attach.binding import ConstrainedWeight, bindings_of
from stiefel.compat.geoopt import tag
from stiefel.compat.torch_private import drop_flat_weights, has_hook, on_conversion, remove_hooks, restore_flat_weights
from stiefel.constraint import Constraint, ManifoldMethod, Penalty, Reparameterization, StepMethod
from stiefel.errors import WeightError
from stiefel.optim import Ownership, Watched, hand_over, is_watched, watch


def take_over(found: ConstrainedWeight) -> None:
    """Make a weight's parameter known to optimizers, in place; again where a copy or a conversion has lost that."""
    method, layout, label = found.binding.constraint, found.binding.layout, found.binding.label
    parameter = found.parameter
    if isinstance(method, ManifoldMethod) and not hasattr(parameter, "manifold"):
        manifold = method.manifold(layout)
        manifold.label = label
        tag(parameter, manifold)
    elif method.lifts:
        assert isinstance(method, (StepMethod, Penalty))
        hand_over(parameter, Ownership(method, layout, label, found.binding.tally))
    marks = [watch(parameter, Watched(label, found.binding.tally, _moves(method), method.decay))]
    if isinstance(method, Reparameterization):  # gains and other trained parts: they diverge too, and count no steps
        parts = found.owner.parametrizations[found.tensor].parameters()  # type: ignore[index, union-attr]
        marks += [watch(part, Watched(label, None, False, "acts")) for part in parts if part is not parameter]
    found.binding.marks = marks


def _moves(method: Constraint) -> bool:
    return method.lifts or isinstance(method, ManifoldMethod)


def add_hooks(owner: nn.Module, method: Constraint) -> None:
    """Give a module the hooks that a method on one of its tensors needs, each once."""
    if not has_hook(owner, _save_tally):
        owner.register_load_state_dict_post_hook(_after_load)
        owner.register_state_dict_post_hook(_save_tally)
        owner.register_load_state_dict_pre_hook(_load_tally)
    if not has_hook(owner, _take_over_again):
        owner.register_forward_pre_hook(_take_over_again)
    recomputed = isinstance(owner, nn.RNNBase) and isinstance(method, Reparameterization)
    if recomputed and not has_hook(owner, _drop_flat_weights):
        owner.register_forward_hook(_drop_flat_weights, always_call=True)
        on_conversion(type(owner), _drop_flat_weights)  # torch has given it a class of its own


def take_off_hooks(owner: nn.Module) -> None:
    """Take all of them off a module that has no binding left."""
    remove_hooks(owner, _after_load, _save_tally, _load_tally, _take_over_again, _drop_flat_weights)
    if isinstance(owner, nn.RNNBase):
        restore_flat_weights(owner)


def _take_over_again(owner: nn.Module, args: Any) -> None:
    """Notice parameters that are new, by a copy or a conversion (``torch.__future__``'s flags), before they train."""
    if not torch.is_grad_enabled():  # nothing trains, and layers at rest should cost what plain ones do
        return
    for tensor, binding in bindings_of(owner).items():
        found = ConstrainedWeight(binding.label, owner, tensor, binding)
        parameter = found.parameter
        if isinstance(parameter, nn.Parameter) and not is_watched(parameter):  # a replica's (DataParallel) are none
            take_over(found)


@torch.no_grad()
def _after_load(owner: nn.Module, incompatible_keys: Any) -> None:
    """Take loaded weights over, and move those that are not where the method promises to the nearest point of its set.

    A proxy gives a weight of the set whatever was loaded; the point that a trivialization starts from does not.
    """
    for tensor, binding in bindings_of(owner).items():
        found = ConstrainedWeight(binding.label, owner, tensor, binding)
        if found.parametrization is not None:
            found.parametrization.kept = None
        take_over(found)
        if binding.constraint.claim is None or not found.can_leave:
            continue
        residual = found.residual()
        if residual != residual:
            raise WeightError(f"weight '{binding.label}' was loaded with entries that are NaN or infinite")
        if not found.allows(residual):
            found.move_to_nearest()
            warnings.warn(
                f"weight '{binding.label}' was loaded off its constraint's set (‖W Wᵀ/s² − I‖_F/√p is "
                f"{residual:.1e}) and has been moved to the nearest point of it",
                stacklevel=2,
            )


def _drop_flat_weights(owner: nn.Module, *args: Any) -> None:
    """Let go of the computed weights that a recurrent module keeps, which are no leaves and hold their graph.

    They are computed anew at the next forward pass anyway, but would make ``copy.deepcopy(model)`` fail.
    """
    assert isinstance(owner, nn.RNNBase)
    drop_flat_weights(owner)


def _save_tally(owner: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Keep tallies in the state dict's metadata, so that its keys stay those of a plain module."""
    metadata["stiefel"] = {
        tensor: (b.tally.steps, None if b.tally.shortened is None else int(b.tally.shortened))
        for tensor, b in bindings_of(owner).items()
    }


def _load_tally(owner: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *args: Any) -> None:
    for tensor, tally in metadata.get("stiefel", {}).items():  # none in a plain checkpoint
        if tensor in bindings_of(owner):
            mine = bindings_of(owner)[tensor].tally
            mine.steps, mine.shortened = tally
