"""Hooks of constrained modules: they remember copies, adapt checkpoints, and check loaded weights.

Each hook is a function of this file that looks up its module's bindings, so that copies and pickles keep working.
Imports ``binding``, ``optim`` and below.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stiefel.attach.checkpoint import adapt, describe
from stiefel.attach.tagging import LOADED, put_on_set, remember, tag_weight
from stiefel.attach.weights import ConstrainedWeight, bindings_of
from stiefel.compat.torch_private import drop_flat_weights, has_hook, on_conversion, remove_hooks, restore_flat_weights
from stiefel.constraint import Constraint, Reparameterization
from stiefel.optim.ownership import state_of


def add_weight_hooks(owner: nn.Module, method: Constraint) -> None:
    """Give a module the hooks that a method on one of its tensors needs, each once."""
    if not has_hook(owner, describe):
        owner.register_load_state_dict_post_hook(_after_load)
        owner.register_state_dict_post_hook(describe)
        owner.register_load_state_dict_pre_hook(adapt)
    if not has_hook(owner, remember):
        owner.register_forward_pre_hook(remember)
    if isinstance(method, Reparameterization):
        add_recurrent_hooks(owner)


def add_recurrent_hooks(owner: nn.Module) -> None:
    """Give a recurrent module the hooks that it needs where its weights are computed."""
    if isinstance(owner, nn.RNNBase) and not has_hook(owner, _drop_flat_weights):
        owner.register_forward_hook(_drop_flat_weights, always_call=True)
        on_conversion(type(owner), _drop_flat_weights)  # torch has given it a class of its own


def remove_weight_hooks(owner: nn.Module) -> None:
    """Remove all these hooks from a module that has no binding left."""
    remove_hooks(owner, _after_load, describe, adapt, remember, _drop_flat_weights)
    if isinstance(owner, nn.RNNBase):
        restore_flat_weights(owner)


@torch.no_grad()
def _after_load(owner: nn.Module, incompatible_keys: Any) -> None:
    """Tag loaded weights, and move those that break the method's claim to the nearest point of its set.

    With a proxy alone the weight is on the set whatever was loaded; a trivialization's base point may be off it.
    """
    for tensor, binding in bindings_of(owner).items():
        found = ConstrainedWeight(binding.label, owner, tensor, binding)
        if found.parametrization is not None:
            found.parametrization.cached = None
        tag_weight(found)
        put_on_set(found, LOADED)
        binding.tally.left = state_of(found.parameter)


def _drop_flat_weights(owner: nn.Module, *args: Any) -> None:
    """Drop the computed weights that a recurrent module keeps: they are not leaves, and hold their graph.

    The next forward pass computes them again; kept, they would make ``copy.deepcopy(model)`` fail.
    """
    assert isinstance(owner, nn.RNNBase)
    drop_flat_weights(owner)
