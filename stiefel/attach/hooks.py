"""What keeps a constrained module in order between calls: parameter classes, and hooks for loading and saving.

Hooks are functions of this file that look their module's bindings up, so that copies and pickles keep working.
Imports ``binding``, ``optim`` and below.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from stiefel.attach.binding import ConstrainedWeight, bindings_of
from stiefel.constraint import Constraint, ManifoldMethod, Penalty, Reparameterization, StepMethod
from stiefel.errors import WeightError
from stiefel.linalg import gram_residual
from stiefel.optim import SteppedParameter, install_guard, watch_steps
from stiefel.optim.lift import Ownership, own


def take_over(found: ConstrainedWeight) -> None:
    """Make a weight's parameter known to optimizers, in place; again where a copy or a conversion has lost that."""
    method, layout, label = found.binding.constraint, found.binding.layout, found.binding.label
    parameter = found.parameter
    if isinstance(method, ManifoldMethod) and not hasattr(parameter, "manifold"):
        from stiefel._geoopt import geoopt

        manifold = method.manifold(layout)
        manifold.label = label
        parameter.__class__ = geoopt.ManifoldParameter
        parameter.manifold = manifold  # type: ignore[attr-defined]
        install_guard()
    elif isinstance(method, StepMethod) and not isinstance(parameter, SteppedParameter):
        own(parameter, Ownership(method, layout, label))
        install_guard()
    elif _is_scheduled(method):
        watch_steps(parameter, found.binding)


def add_hooks(owner: nn.Module, method: Constraint) -> None:
    """Give a module the hooks that a method on one of its tensors needs, each once."""
    stepped = isinstance(method, (ManifoldMethod, StepMethod))
    if stepped and _after_load not in owner._load_state_dict_post_hooks.values():
        owner.register_load_state_dict_post_hook(_after_load)
    if _is_scheduled(method) and _save_steps not in owner._state_dict_hooks.values():
        owner.register_state_dict_post_hook(_save_steps)
        owner.register_load_state_dict_pre_hook(_load_steps)
    recomputed = isinstance(owner, nn.RNNBase) and isinstance(method, Reparameterization)
    if recomputed and _drop_flat_weights not in owner._forward_hooks.values():
        owner.register_forward_hook(_drop_flat_weights, always_call=True)


def remove_hooks(owner: nn.Module) -> None:
    """Take all of them off a module that has no binding left."""
    ours = (_after_load, _save_steps, _load_steps, _drop_flat_weights)
    for hooks in (
        owner._load_state_dict_post_hooks,
        owner._state_dict_hooks,
        owner._load_state_dict_pre_hooks,
        owner._forward_hooks,
    ):
        for key, hook in list(hooks.items()):
            if getattr(hook, "hook", hook) in ours:
                del hooks[key]
                owner._forward_hooks_always_called.pop(key, None)
    if isinstance(owner, nn.RNNBase):
        owner._init_flat_weights()


def _is_scheduled(method: Constraint) -> bool:
    return isinstance(method, Penalty) and callable(method.strength)


@torch.no_grad()
def _after_load(owner: nn.Module, incompatible_keys: Any) -> None:
    """Take loaded weights over, and project those that the method needs on its set and are off it."""
    for tensor, binding in bindings_of(owner).items():
        found = ConstrainedWeight(binding.label, owner, tensor, binding)
        if not isinstance(binding.constraint, (ManifoldMethod, StepMethod)):
            continue
        take_over(found)
        if not binding.constraint.feasible:
            continue
        residual = gram_residual(found.points()).abs().max().item()
        tolerance = 1e3 * torch.finfo(found.parameter.dtype).eps * binding.layout.matrix_shape[1]
        if residual != residual:
            raise WeightError(f"weight '{binding.label}' was loaded with entries that are NaN or infinite")
        if residual > tolerance:
            found.parameter.copy_(binding.nearest(found.parameter))
            warnings.warn(
                f"weight '{binding.label}' was loaded off its constraint's set (an entry of W Wᵀ/s² − I is "
                f"{residual:.1e}) and has been moved to the nearest point of it",
                stacklevel=2,
            )


def _drop_flat_weights(owner: nn.Module, *args: Any) -> None:
    """Let go of the computed weights that a recurrent module keeps, which are no leaves and hold their graph.

    They are computed anew at the next forward pass anyway, but would make ``copy.deepcopy(model)`` fail.
    """
    if not parametrize._cache_enabled:
        owner._flat_weights = []  # type: ignore[assignment]


def _save_steps(owner: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Keep step counts in the state dict's metadata, so that its keys stay those of a plain module."""
    metadata["penalty_steps"] = {
        tensor: binding.steps for tensor, binding in bindings_of(owner).items() if _is_scheduled(binding.constraint)
    }


def _load_steps(owner: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *args: Any) -> None:
    for tensor, steps in metadata.get("penalty_steps", {}).items():  # none in a plain checkpoint
        if tensor in bindings_of(owner):
            bindings_of(owner)[tensor].steps = steps
