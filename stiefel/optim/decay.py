"""Weight decay kept off the weights that it would move along their set. Imports ``constraint``, ``bases``, the errors.

The decay term λW is normal to the set {W : W Wᵀ = s² I}: it has no meaning there, and an optimizer that mixes it with
gradients moves weights that are at rest. Such weights go to parameter groups of their own without decay.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stiefel.constraint import Decay
from stiefel.errors import OptimizerError
from stiefel.optim.bases import decay_only_rescales, decays, own_class

NAMES = "param_names"
"""Where torch keeps the names of a group's parameters, if it was given any."""
KEY = "stiefel"
"""Where a checkpoint has the places of its parameters in the groups that the user gave."""


def unwelcome(optimizer: torch.optim.Optimizer, group: dict[str, Any], decay: Decay) -> list[str]:
    """Options of a group that would decay a weight of that kind, and must be off for it."""
    if decay == "acts" or (decay == "rescales" and decay_only_rescales(optimizer, group)):
        return []
    return decays(group)


def keep_decay_off(optimizer: torch.optim.Optimizer, kind: Mapping[Tensor, Decay]) -> None:
    """Split each group in which some parameters must not decay into one with decay and one without, in place.

    The new groups follow those that the user gave, with the same settings. The optimizer's checkpoints say where each
    parameter was before, so that they can be loaded where the groups are split in another way, or not.

    Args:
        optimizer: just made.
        kind: what decay does to the weight of each constrained parameter.
    """
    given = [list(group["params"]) for group in optimizer.param_groups]
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
    place = {id(p): (number, i) for number, group in enumerate(given) for i, p in enumerate(group)}
    places = [[place[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    optimizer.register_state_dict_post_hook(partial(_note_places, places))
    # Also where no group was split: the checkpoint may come from an optimizer whose groups were.
    optimizer.register_load_state_dict_pre_hook(partial(_regroup, places))


_Places = list[list[tuple[int, int]]]
"""Of each group and parameter: the number of the group that the user gave it in, and its place there."""


def _note_places(places: _Places, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    state[KEY] = _with_added(places, optimizer)


def _with_added(places: _Places, optimizer: torch.optim.Optimizer) -> _Places:
    """The places of all groups, also of those that were added since: each is one that the user gave."""
    count = 1 + max((number for each in places for number, _ in each), default=-1)
    added = optimizer.param_groups[len(places) :]
    return places + [[(count + k, i) for i in range(len(group["params"]))] for k, group in enumerate(added)]


def _regroup(places: _Places, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
    """A checkpoint in the groups of this optimizer; where they are others, weight decay stays as this optimizer has it.

    Raises:
        OptimizerError: it is of other parameters.
    """
    groups = state["param_groups"]
    places = _with_added(places, optimizer)
    if KEY not in state and [len(g["params"]) for g in groups] == list(map(len, places)):
        return None  # of a copy of such an optimizer, which notes no places, or of one whose groups were not split
    known = state.get(KEY) or [[(number, i) for i in range(len(g["params"]))] for number, g in enumerate(groups)]
    mine, theirs = (sorted(place for group in each for place in group) for each in (places, known))
    if mine != theirs:
        raise OptimizerError(
            f"this checkpoint of {type(optimizer).__name__} has {len(theirs)} parameters in "
            f"{len({number for number, _ in theirs})} groups, and the optimizer has {len(mine)} in "
            f"{len({number for number, _ in mine})}: it is of another model, or of other groups. Load the model's "
            "state alone, and let the optimizer start without a state"
        )
    index = {
        place: i for ids, each in zip(groups, known, strict=True) for place, i in zip(each, ids["params"], strict=True)
    }
    for group, each in zip(optimizer.param_groups, places, strict=True):
        for p, place in zip(group["params"], each, strict=True):
            _refuse_other_shapes(optimizer, p, state["state"].get(index[place], {}))
    if known == places:
        return None
    of_place = {place: group for group, each in zip(groups, known, strict=True) for place in each}
    order = [place for each in places for place in each]
    moved = {i: state["state"][index[place]] for i, place in enumerate(order) if index[place] in state["state"]}
    count, regrouped = 0, []
    for group, each in zip(optimizer.param_groups, places, strict=True):
        first = of_place[each[0]] if each else group
        decay = {name: group[name] for name in decays(first) + decays(group)}
        names = {NAMES: group[NAMES]} if NAMES in group else {}
        regrouped.append({**first, **decay, **names, "params": list(range(count, count + len(each)))})
        count += len(each)
    return {**state, "state": moved, "param_groups": regrouped}


def _refuse_other_shapes(optimizer: torch.optim.Optimizer, parameter: Tensor, state: dict[str, Any]) -> None:
    if not own_class(type(optimizer)).__module__.startswith("torch.optim"):
        return  # a class of somebody else's may keep tensors of any shape
    for name, value in state.items():
        # Of the parameter's shape, or with 1 in place of some sizes (Adafactor); or a count.
        sizes = value.shape if isinstance(value, Tensor) else ()
        if sizes and (
            len(sizes) != parameter.ndim or any(a not in (1, b) for a, b in zip(sizes, parameter.shape, strict=True))
        ):
            raise OptimizerError(
                f"{name} of this checkpoint of {type(optimizer).__name__} has the shape {tuple(value.shape)}, and its "
                f"parameter has {tuple(parameter.shape)}: parameters come in another order in a model whose weights "
                "have proxies (reparameterizations) and one whose weights have none. Load the model's state alone, and "
                "let the optimizer start without a state"
            )
