"""Whether a model still is as it was constrained: its layers, and what its weights are. Imports ``weights``."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from stiefel.attach.weights import ConstrainedWeight, binding_of, bindings_of
from stiefel.compat.sharding import is_sharded
from stiefel.compat.torch_private import parameters_of
from stiefel.constraint import Reparameterization
from stiefel.errors import WeightError
from stiefel.linalg import is_capturing, is_traced
from stiefel.optim.ownership import ownership, quoted, state_of

# Entries of a module's __dict__, which copies have too.
_NAMES = "_stiefel_names"
_RELEASED = "_stiefel_released"
_WAITING = "_stiefel_waiting"


def note_names(root: nn.Module, names: Iterable[str]) -> None:
    """Note which weights were constrained below a module."""
    known = root.__dict__.setdefault(_NAMES, [])
    known.extend(name for name in names if name not in known)


def note_release(module: nn.Module, released: Iterable[tuple[nn.Module, str]]) -> None:
    """Forget what was noted in a module, whose weights are free from now on.

    A weight that was constrained through a larger module is noted there; its own layer tells that it is free on
    purpose.

    Args:
        module: what has been released.
        released: each layer and its tensor.
    """
    noted = set()
    for root in module.modules():
        for name in root.__dict__.pop(_NAMES, ()):
            path, _, tensor = name.rpartition(".")
            with suppress(AttributeError):  # a layer taken out of the model
                noted.add((root.get_submodule(path), tensor))
    for owner, tensor in released:
        if (owner, tensor) not in noted:
            owner.__dict__.setdefault(_RELEASED, []).append(tensor)


def waiting_in(owner: nn.Module) -> dict[str, tuple[str, Any]]:
    """The tensors of a lazy layer that will be constrained when they have a shape: name and wish of each."""
    return owner.__dict__.setdefault(_WAITING, {})


def is_waiting(owner: nn.Module, tensor: str) -> bool:
    """Whether a tensor is one of those."""
    return tensor in owner.__dict__.get(_WAITING, {})


def stop_waiting(owner: nn.Module) -> list[str]:
    """Let no tensor of a lazy layer wait any longer; returns those that did."""
    return list(owner.__dict__.pop(_WAITING, ()))


def refuse_waiting(module: nn.Module) -> None:
    """Refuse what needs all weights where some are not constrained yet, since they have no shape.

    Raises:
        WeightError: there are such.
    """
    names = [name for each in module.modules() for name, _ in each.__dict__.get(_WAITING, {}).values()]
    if names:
        raise WeightError(
            f"weight {quoted(names)} will be constrained when it has a shape (a lazy layer); run one forward pass of "
            "the model first"
        )


def warn_of_replaced(module: nn.Module) -> None:
    """Warn of layers that have been replaced since they were constrained: the new ones are free."""
    replaced = []
    for prefix, root in module.named_modules():
        for name in root.__dict__.get(_NAMES, ()):
            path, _, tensor = name.rpartition(".")
            try:
                owner = root.get_submodule(path)
            except AttributeError:
                continue  # taken out of the model: nothing trains in its place
            told = (*owner.__dict__.get(_WAITING, ()), *owner.__dict__.get(_RELEASED, ()))
            if binding_of(owner, tensor) is None and tensor not in told:
                replaced.append(f"{prefix}.{name}" if prefix else name)
    if replaced:
        warnings.warn(
            f"the layers of {', '.join(map(repr, replaced))} have been replaced since they were constrained, and the "
            f"new weights are free; constrain them: stiefel.constrain(model, ..., layers={replaced!r})",
            stacklevel=3,
        )


def refuse_taken_over(owner: nn.Module) -> None:
    """Refuse to go on where something else computes a weight that a method holds: pruning, another parametrization.

    Raises:
        WeightError: something does.
    """
    for tensor, binding in bindings_of(owner).items():
        if isinstance(binding.constraint, Reparameterization) or getattr(owner, "_is_replica", False):
            continue
        if parametrize.is_parametrized(owner, tensor) or parameters_of(owner).get(tensor) is None:
            raise WeightError(
                f"weight '{binding.label}' is no longer a parameter of its layer: pruning, weight_norm or another "
                "parametrization that was applied after constrain computes it, and takes it off its constraint's set; "
                "undo that, or call stiefel.release(model) before it"
            )


def warn_of_changes(owner: nn.Module) -> None:
    """Warn in evaluation of weights that something but an optimizer or this library has taken off their sets.

    A weight that has not changed since its last step, or since it was looked at, costs no more than a comparison.
    """
    for tensor, binding in bindings_of(owner).items():
        weight = parameters_of(owner).get(tensor)
        if weight is None or not binding.constraint.moves or binding.tally.left == (state := state_of(weight)):
            continue
        # It has no values, or not all of them, or is another tensor for this pass alone (functional_call).
        if is_traced() or is_sharded(weight) or ownership(weight) is None or is_capturing(weight):
            continue
        binding.tally.left = state
        found = ConstrainedWeight(binding.label, owner, tensor, binding)
        if not binding.allows(found.residual(), torch.float32):  # it may have been in that precision before
            warnings.warn(
                f"weight '{binding.label}' is off its constraint's set where the model is evaluated: something but an "
                "optimizer's step has changed it, as averages of weights do (SWA, EMA); before evaluating and saving "
                "these call stiefel.project(model) on the model that holds them",
                stacklevel=3,
            )


def register_parameter(owner: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    """torch's own, for a layer whose weight is computed from a proxy.

    Raises:
        WeightError: it is tensor parallelism's or pruning's, which cannot act on such a weight.
    """
    if isinstance(getattr(type(owner), name, None), property) and isinstance(parameter, torch.Tensor):
        setattr(owner, name, parameter.detach())  # as an assigned tensor: training goes on from there
        return
    labels = quoted(binding.label for binding in bindings_of(owner).values())
    if name.startswith("parametrizations."):
        raise WeightError(
            f"weight {labels} is computed from a proxy, which parallelize_module cannot cut; leave the layer out of "
            "the plan, use fully_shard, or a method that keeps the weight itself (one on the step, or a penalty)"
        )
    if isinstance(parameter, torch.Tensor) and not isinstance(parameter, nn.Parameter):
        raise WeightError(
            f"weight {labels} is computed from a proxy, and pruning it (registering {name!r}) would take it off its "
            "constraint's set; call stiefel.release(model) first"
        )
    nn.Module.register_parameter(owner, name, parameter)
