"""Weight decay kept off the weights that it would move along their set. Imports ``constraint``, ``bases``, the errors.

The decay term λW is normal to the set {W : W Wᵀ = s² I}: it has no meaning there, and an optimizer that mixes it with
gradients moves weights that are at rest. Such weights go to parameter groups of their own without decay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stiefel.constraint import Decay
from stiefel.errors import OptimizerError
from stiefel.optim.bases import decay_only_rescales, decays

NAMES = "param_names"
"""Where torch keeps the names of a group's parameters, if it was given any."""


def unwelcome(optimizer: torch.optim.Optimizer, group: dict[str, Any], decay: Decay) -> list[str]:
    """Options of a group that would decay a weight of that kind, and must be off for it."""
    if decay == "acts" or (decay == "rescales" and decay_only_rescales(optimizer, group)):
        return []
    return decays(group)


def keep_decay_off(optimizer: torch.optim.Optimizer, kind: Mapping[Tensor, Decay]) -> None:
    """Split each group in which some parameters must not decay into one with decay and one without, in place.

    The new groups follow those that the user gave, with the same settings.

    Args:
        optimizer: just made.
        kind: what decay does to the weight of each constrained parameter.
    """
    for group in list(optimizer.param_groups):
        off = [p in kind and bool(unwelcome(optimizer, group, kind[p])) for p in group["params"]]
        if not any(off):
            continue
        none = dict.fromkeys(decays(group), 0)
        if all(off):
            group.update(none)
            continue
        # A tensor lr is copied: a loop that changes each group's lr in place would change a shared one twice.
        without = {key: value.clone() if isinstance(value, Tensor) else value for key, value in group.items()} | none
        # Names are divided as their parameters are.
        for key in ("params", *([NAMES] if NAMES in group else [])):
            without[key] = [value for value, apart in zip(group[key], off, strict=True) if apart]
            group[key] = [value for value, apart in zip(group[key], off, strict=True) if not apart]
        optimizer.param_groups.append(without)
    # Also where no group was split: the checkpoint may come from an optimizer whose groups were.
    optimizer.register_load_state_dict_pre_hook(_refuse_other_groups)


def _refuse_other_groups(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    saved = [len(group["params"]) for group in state["param_groups"]]
    if saved != sizes:
        raise OptimizerError(
            f"this checkpoint of {type(optimizer).__name__} has groups of {saved} parameters, and the optimizer "
            f"has groups of {sizes}: weights that decay would move along their set are in groups of their own without "
            "weight decay, and the checkpoint is of an optimizer without these groups or of other constraints. Load "
            "the model's state alone, and let the optimizer start without a state"
        )
