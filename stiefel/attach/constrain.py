"""``constrain`` and ``release``: put a method on a module's weights, take it off. Imports ``methods`` and ``optim``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from stiefel.attach.hooks import add_weight_hooks, remove_weight_hooks
from stiefel.attach.intact import note_names, note_release, register_parameter
from stiefel.attach.parallel import refuse_held
from stiefel.attach.prefetch import prefetch_below, prefetch_list, stop_prefetch
from stiefel.attach.proxy.parametrization import Reparametrized
from stiefel.attach.select import LISTS, Target, layout_of, select
from stiefel.attach.tagging import tag_weight, untag_weight
from stiefel.attach.weights import ConstrainedWeight, add_quick_access, bind, bindings_of, constrained_weights, unbind
from stiefel.compat.sharding import is_sharded, write
from stiefel.compat.torch_private import parameters_of
from stiefel.constraint import ROUNDING, Binding, Constraint, Reparameterization
from stiefel.errors import LayoutError, OptionError, SelectionError, WeightError
from stiefel.methods import get


def constrain(
    module: nn.Module,
    constraint: str | Constraint = "own",
    *,
    layers: str | Iterable[str] | Callable[[str, nn.Module], bool] | None = None,
    exclude: str | Iterable[str] = (),
    axes: str | None = None,
    **options: Any,
) -> nn.Module:
    """Constrain weights of a module, in place, to ``{W : W Wᵀ = scale² I}``.

        stiefel.constrain(model, "own", exclude=["head"], scale="relu")

    A weight of shape (out, in) gets orthonormal rows where out ≤ in and orthonormal columns otherwise; a convolution
    kernel is read as (out, in/groups · k…) per group, packed recurrent and attention weights per gate and per q, k, v.
    Training starts at the nearest point of the set. If an error is raised, nothing has been changed.

    Args:
        module: any module.
        constraint: a name from :func:`stiefel.available`, or a :class:`Constraint`.
        layers: what to constrain: names of layers (their ``weight``, or all layers below a container), of tensors
            (``"rnn.weight_hh_l0"``), of lists of parameters, or a predicate ``(name, layer) -> bool`` over the Linear
            and convolution layers. Default: all of these; all members of a ParameterList or ParameterDict.
        exclude: names of layers, containers or tensors to leave out.
        axes: how to read a tensor otherwise than its layer would, one letter per dimension: ``o`` outputs, ``i``
            inputs, ``b`` a batch of matrices; ``"ibo"`` for (model, heads, head).
        options: the method's options, where ``constraint`` is a name.

    Returns:
        ``module``.

    Raises:
        UnknownMethodError, OptionError: no such method or option, a value out of range, or options beside an object.
        SelectionError: nothing selected, an unknown name, or a weight that is constrained already.
        WeightError: a weight is not a finite tensor of at least two dimensions, in float32 or float64, or in complex64
            or complex128 where the method holds unitary weights.
        LayoutError: the set is empty at a weight's shape, for instance a group size that does not divide.
    """
    if not isinstance(module, nn.Module):
        raise SelectionError(_no_module(module))
    method = _method(constraint, options)
    # All checks run here, before the loop below makes the first change.
    targets = select(module, layers, exclude)
    plan = [_planned(target, method, axes) for target in targets]
    for attach in plan:
        attach()
    note_names(module, (name for target in targets for name in target.names))
    if isinstance(method, Reparameterization):
        prefetch_below(module)
    return module


def _no_module(given: object) -> str:
    what = f"a tensor of shape {tuple(given.shape)}" if isinstance(given, torch.Tensor) else type(given).__name__
    return (
        f"constrain() takes a module, in which it can replace a weight, and got {what}; put a tensor into one:\n"
        '    w = nn.ParameterDict({"W": tensor})\n'
        '    stiefel.constrain(w, "own")      # from then on w["W"] is the orthogonal weight'
    )


def _method(constraint: str | Constraint, options: dict[str, Any]) -> Constraint:
    if isinstance(constraint, str):
        return get(constraint, **options)
    if not isinstance(constraint, Constraint):
        raise OptionError(f"constraint={constraint!r}: expected a method's name or a stiefel.Constraint")
    if options:
        raise OptionError(
            f"options {sorted(options)} are given beside a {type(constraint).__name__} object; set them inside it"
        )
    return constraint


def _planned(target: Target, method: Constraint, axes: str | None) -> Callable[[], None]:
    """Check a target, and return the function that attaches the method; all errors are raised before any change."""
    layout = layout_of(target, method, axes)
    try:
        method.check(layout)
    except LayoutError as error:
        raise LayoutError(f"weight '{target.name}': {error}") from None
    binding = Binding(method, layout, target.name)
    if not isinstance(method, Reparameterization):
        return partial(_attach_in_place, target, binding, binding.nearest(target.parameter))
    refuse_held(target.name, target.parameter)
    if any(getattr(place.owner, "sparse", False) is True for place in target.places):
        raise WeightError(
            f"weight '{target.name}' is of {type(target.owner).__name__}(sparse=True), whose gradients are sparse, and "
            f"{method.name!r} computes it from a proxy that needs whole ones; make the layer with sparse=False, or use "
            "a method on the step, such as 'retraction'"
        )
    parametrization = Reparametrized(binding, target.parameter)
    with torch.no_grad():  # a trial, so that a method that fails here fails before any layer is changed
        parametrization(parametrization.first)
    return partial(_attach_forward, target, binding, parametrization)


@torch.no_grad()
def release(module: nn.Module) -> nn.Module:
    """Take all constraints off a module, in place: ordinary layers and parameters with the current weights remain.

    For saving, export and inference. A module without constraints is returned as it is.

    Raises:
        WeightError: a weight is computed from a proxy that is sharded.
    """
    weights = list(constrained_weights(module, ties=True))
    for found in weights:
        if found.parametrization is not None and is_sharded(found.parameter):
            raise WeightError(
                f"weight '{found.name}' is computed from a sharded proxy, which fully_shard holds on to; collect the "
                "whole state (torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True), "
                "load it into a constrained model that is not sharded, and release that"
            )
    values = {id(found.parameter): (found.parameter, found.value.detach().clone()) for found in weights}
    # In reverse: each position was counted after the tensors attached before had left the list of parameters.
    for found in reversed(weights):
        owner, tensor = found.owner, found.tensor
        if isinstance(found.binding.constraint, Reparameterization):
            _give_own_class(owner)
            parametrize.remove_parametrizations(owner, tensor, leave_parametrized=True)
            _restore_order(owner, tensor, found.binding.position)
        untag_weight(found)
        unbind(owner, tensor)
        if not bindings_of(owner):
            remove_weight_hooks(owner)
    for each in module.modules():  # each submodule on which constrain was called has hooks of its own
        stop_prefetch(each)
    note_release(module, [(found.owner, found.tensor) for found in weights])
    for parameter, value in values.values():
        write(parameter, value)  # with tied layers, releasing the first has changed what the others compute
    return module


@torch.no_grad()
def project(module: nn.Module) -> nn.Module:
    """Move each constrained weight to the nearest point of its method's set, in place.

    For changes that the library does not see: averages of weights (SWA, EMA: call it on the averaged model), a
    conversion to bfloat16 and back, an assignment to ``weight.data``. Weights that are on the set to rounding are left
    as they are. So are weights computed from a proxy alone: no change of the proxy takes them off. No optimizer needs
    this.

    Args:
        module: a model with constraints, or a copy of one, as ``AveragedModel(model).module`` is.

    Returns:
        ``module``.

    Raises:
        WeightError: a weight has entries that are NaN or infinite.
    """
    for found in constrained_weights(module):
        if not found.value.isfinite().all():
            raise WeightError(
                f"weight '{found.binding.label}' has entries that are NaN or infinite, and therefore "
                "no nearest point on its set; load a checkpoint from before the loss diverged"
            )
        rounding = ROUNDING * torch.finfo(found.parameter.dtype).eps
        if found.may_be_off_set and (found.residual() > rounding or not found.has_determinant()):
            found.move_to_nearest()
    return module


def refresh(module: nn.Module) -> nn.Module:
    """Compute the weights of reparameterizations anew at their next use.

    Where no gradients are recorded a weight is computed once and kept until its proxy may have changed: after any
    optimizer step, ``train()``, ``eval()``, ``to()``, loading, and in-place changes of the proxy. Changes through
    ``proxy.data``, numpy, or a vector that the parameters are views of are not detected: call this after them.

    Returns:
        ``module``.
    """
    for each in module.modules():
        if isinstance(each, Reparametrized):
            each.cached = None
    return module


@torch.no_grad()
def _attach_forward(target: Target, binding: Binding, parametrization: Reparametrized) -> None:
    owners = (target, *target.ties)
    parameter, trained = target.parameter, target.parameter.requires_grad
    for each in owners:  # tied layers share the parametrization, and with it a learnable scale
        # Before torch takes the tensor from the module's own parameters.
        position = list(parameters_of(each.owner)).index(each.tensor)
        parametrize.register_parametrization(each.owner, each.tensor, parametrization)
        # On the class that torch has made for this layer alone.
        add_quick_access(each.owner, each.tensor, prefetch_list if isinstance(each.owner, LISTS) else None)
        type(each.owner).register_parameter = register_parameter  # type: ignore[method-assign, assignment]
        bind(each.owner, each.tensor, replace(binding, label=each.name, position=position))
        add_weight_hooks(each.owner, binding.constraint)
    parametrization.first = parametrization.cached = None  # from now on right_inverse starts from the assigned weight
    parameter.requires_grad_(trained)  # torch keeps the Parameter object as the proxy
    parametrization.requires_grad_(trained)
    for each in owners:
        tag_weight(ConstrainedWeight(each.name, each.owner, each.tensor, bindings_of(each.owner)[each.tensor]))


@torch.no_grad()
def _attach_in_place(target: Target, binding: Binding, start: torch.Tensor) -> None:
    target.parameter.copy_(start)
    for each in (target, *target.ties):
        bind(each.owner, each.tensor, binding)
        tag_weight(ConstrainedWeight(each.name, each.owner, each.tensor, binding))
        add_weight_hooks(each.owner, binding.constraint)


def _give_own_class(owner: nn.Module) -> None:
    """Give a parametrized module a class of its own, apart from that of its deep copies.

    torch keeps the tensor's property on a class that deep copies share, and removing a parametrization deletes it
    there: releasing a copy would take the weight away from the original.
    """
    shared = type(owner)
    owner.__class__ = type(shared.__name__, shared.__bases__, dict(shared.__dict__))


def _restore_order(owner: nn.Module, tensor: str, position: int) -> None:
    parameters = parameters_of(owner)
    names = [name for name in parameters if name != tensor]
    # Popped and inserted again, an entry is last: first the tensor, then those that come after it.
    for name in [tensor, *names[position:]]:
        parameters[name] = parameters.pop(name)
