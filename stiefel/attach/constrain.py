"""``constrain`` and ``release``: put a method on a module's weights, take it off. Imports ``methods`` and ``optim``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from stiefel.attach.binding import (
    Binding,
    ConstrainedWeight,
    Reparametrized,
    bind,
    bindings_of,
    constrained_weights,
    unbind,
)
from stiefel.attach.select import Target, layout_of, select
from stiefel.constraint import Constraint, ManifoldMethod, Penalty, Reparameterization, StepMethod
from stiefel.errors import LayoutError, OptionError, WeightError
from stiefel.linalg import gram_residual
from stiefel.methods import get
from stiefel.optim import SteppedParameter, install_guard, watch_steps
from stiefel.optim.lift import Ownership, disown, own


def constrain(
    module: nn.Module,
    constraint: str | Constraint = "own",
    *,
    layers: str | Iterable[str] | Callable[[str, nn.Module], bool] | None = None,
    exclude: str | Iterable[str] = (),
    **options: Any,
) -> nn.Module:
    """Constrain weights of a module, in place, to ``{W : W Wᵀ = scale² I}``.

        stiefel.constrain(model, "own", exclude=["head"], scale="relu")

    A weight of shape (out, in) gets orthonormal rows where out ≤ in and orthonormal columns otherwise; a convolution
    kernel is read as (out, in/groups · k…) per group, packed recurrent and attention weights per gate and per q, k, v.
    Training starts at the nearest point of the set. Nothing is changed where an error is raised.

    Args:
        module: any module.
        constraint: a name from :func:`stiefel.available`, or a :class:`Constraint`.
        layers: what to constrain: names of layers (their ``weight``, or all layers below a container), of tensors
            (``"rnn.weight_hh_l0"``, or a bare parameter's own name), or a predicate ``(name, layer) -> bool`` over the
            Linear and convolution layers. Default: all of these.
        exclude: names of layers, containers or tensors to leave out.
        options: the method's options, where ``constraint`` is a name.

    Returns:
        ``module``.

    Raises:
        UnknownMethodError, OptionError: no such method or option, a value out of range, or options beside an object.
        SelectionError: nothing selected, an unknown name, or a weight that is constrained already.
        WeightError: a weight is not a finite float32 or float64 tensor of at least two dimensions.
        LayoutError: the set is empty at a weight's shape, for instance a group size that does not divide.
    """
    if isinstance(constraint, str):
        constraint = get(constraint, **options)
    elif not isinstance(constraint, Constraint):
        raise OptionError(f"constraint={constraint!r}: expected a method's name or a stiefel.Constraint")
    elif options:
        raise OptionError(f"options {sorted(options)} belong inside the {type(constraint).__name__} object given")
    plan = []
    for target in select(module, layers, exclude):
        layout = layout_of(target, constraint.group_size, constraint.fixed_scale)
        try:
            constraint.check(layout)
        except LayoutError as error:
            raise LayoutError(f"weight '{target.name}': {error}") from None
        binding = Binding(constraint, layout, target.name)
        plan.append((target, binding, _nearest(target.parameter, binding)))
    for target, binding, start in plan:
        _attach(target, binding, start)
    return module


@torch.no_grad()
def release(module: nn.Module) -> nn.Module:
    """Take all constraints off a module, in place: ordinary layers and parameters with the current weights remain.

    For saving, export and inference. A module without constraints is returned as it is.
    """
    weights = list(constrained_weights(module, ties=True))
    values = {id(found.parameter): (found.parameter, found.value.detach().clone()) for found in weights}
    for found in reversed(weights):
        owner, tensor = found.owner, found.tensor
        if isinstance(found.binding.constraint, Reparameterization):
            _give_own_class(owner)
            parametrize.remove_parametrizations(owner, tensor, leave_parametrized=True)
            _restore_order(owner, tensor, found.binding.position)
        elif isinstance(found.binding.constraint, ManifoldMethod) and hasattr(found.parameter, "manifold"):
            del found.parameter.manifold
            found.parameter.__class__ = nn.Parameter
        elif isinstance(found.parameter, SteppedParameter):
            disown(found.parameter)
        unbind(owner, tensor)
        if not bindings_of(owner):
            _remove_hooks(owner)
    for parameter, value in values.values():
        parameter.copy_(value)  # with tied layers, taking off the first has changed what the others computed
    return module


@torch.no_grad()
def _attach(target: Target, binding: Binding, start: torch.Tensor) -> None:
    owners = (target, *target.ties)
    if isinstance(binding.constraint, Reparameterization):
        parameter, trained = target.parameter, target.parameter.requires_grad
        parametrization = Reparametrized(binding, start)
        for each in owners:  # tied layers share the parametrization, and with it a learnable scale
            position = list(each.owner._parameters).index(each.tensor)
            parametrize.register_parametrization(each.owner, each.tensor, parametrization)
            bind(each.owner, each.tensor, replace(binding, label=each.name, position=position))
            _add_hooks(each.owner, binding.constraint)
        parametrization.start = None
        parameter.requires_grad_(trained)  # torch keeps the Parameter object as the proxy
        return
    target.parameter.copy_(start)
    for each in owners:
        bind(each.owner, each.tensor, binding)
        take_over(ConstrainedWeight(each.name, each.owner, each.tensor, binding))
        _add_hooks(each.owner, binding.constraint)


def _give_own_class(owner: nn.Module) -> None:
    """Part a parametrized module's class from that of its deep copies.

    torch keeps the tensor's property on a class that deep copies share, and removing a parametrization deletes it
    there: releasing a copy would take the weight away from the original.
    """
    shared = type(owner)
    owner.__class__ = type(shared.__name__, shared.__bases__, dict(shared.__dict__))


def _restore_order(owner: nn.Module, tensor: str, position: int) -> None:
    names = [name for name in owner._parameters if name != tensor]
    for name in [tensor, *names[position:]]:
        owner._parameters[name] = owner._parameters.pop(name)


@torch.no_grad()
def _nearest(parameter: nn.Parameter, binding: Binding) -> torch.Tensor:
    layout = binding.layout
    return layout.weight(binding.constraint.nearest(layout.points(parameter), layout))


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


# --- hooks on modules: module-level functions that find their bindings, so that copies and pickles keep working ---


def _add_hooks(owner: nn.Module, method: Constraint) -> None:
    if (
        isinstance(method, (ManifoldMethod, StepMethod))
        and _after_load not in owner._load_state_dict_post_hooks.values()
    ):
        owner.register_load_state_dict_post_hook(_after_load)
    if _is_scheduled(method) and _save_steps not in owner._state_dict_hooks.values():
        owner.register_state_dict_post_hook(_save_steps)
        owner.register_load_state_dict_pre_hook(_load_steps)
    if isinstance(owner, nn.RNNBase) and isinstance(method, Reparameterization):
        owner.register_forward_hook(_drop_flat_weights, always_call=True)


def _remove_hooks(owner: nn.Module) -> None:
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
            found.parameter.copy_(_nearest(found.parameter, binding))
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
