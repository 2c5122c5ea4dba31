"""A method put on a tensor, and taken off it. Imports ``select``, ``weights``, ``tagging``, ``hooks``."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.nn.utils import parametrize

from stiefel.attach.hooks import add_weight_hooks, remove_weight_hooks
from stiefel.attach.intact import register_parameter
from stiefel.attach.parallel import refuse_held
from stiefel.attach.prefetch import prefetch_list
from stiefel.attach.proxy.parametrization import Reparametrized
from stiefel.attach.select import LISTS, Target, layout_of
from stiefel.attach.tagging import tag_weight, untag_weight
from stiefel.attach.weights import ConstrainedWeight, add_quick_access, bind, bindings_of, unbind
from stiefel.compat.sharding import is_sharded
from stiefel.compat.torch_private import parameters_of
from stiefel.constraint import Binding, Constraint, Reparameterization
from stiefel.errors import LayoutError, WeightError
from stiefel.layout import Layout
from stiefel.optim.buckets import bucket


def planned(
    targets: Sequence[Target], method: Constraint, axes: str | None = None, titles: Sequence[str] = ()
) -> list[Callable[[], None]]:
    """Check targets, and return the functions that attach the method; all errors are raised before any change.

    Args:
        targets: what to constrain; starts of equal layout are computed together.
        method: by what.
        axes: how to read them otherwise than their layers would.
        titles: what to call each in place of its own name below the layer.
    """
    layouts, weights = [_checked(target, method, axes) for target in targets], [t.parameter for t in targets]
    plans: dict[int, Callable[[], None]] = {}
    for group in bucket(range(len(targets)), lambda i: _start_together(weights[i], layouts[i]), weights.__getitem__):
        layout = layouts[group[0]]
        with torch.no_grad():
            points = [layout.points(weights[i]) for i in group]
            # As it is, to the bit, where a method starts anywhere: dividing by the scale would round.
            starts = (
                method.closest(torch.cat(points), layout).split(len(points[0])) if method.orthogonal_start else points
            )
        for i, start in zip(group, starts, strict=True):
            binding = Binding(method, layout, targets[i].name, title=titles[i] if titles else "")
            plans[i] = _planned(targets[i], binding, start, trial=i == group[0])
    return [plans[i] for i in range(len(targets))]


def _start_together(parameter: torch.Tensor, layout: Layout) -> Hashable:
    # A sharded weight is put together by all processes, one after the other.
    return id(parameter) if is_sharded(parameter) else (layout, parameter.dtype, parameter.device)


def _checked(target: Target, method: Constraint, axes: str | None) -> Layout:
    layout = layout_of(target, method, axes)
    try:
        method.check(layout)
    except LayoutError as error:
        raise LayoutError(f"weight '{target.name}': {error}") from None
    if isinstance(method, Reparameterization):
        refuse_held(target.name, target.parameter)
        refuse_sparse(target, method)
    return layout


def _planned(target: Target, binding: Binding, start: torch.Tensor, trial: bool) -> Callable[[], None]:
    if not isinstance(binding.constraint, Reparameterization):
        weight = binding.layout.weight(start) if binding.constraint.orthogonal_start else target.parameter
        return partial(_attach_in_place, target, binding, weight)
    parametrization = Reparametrized(binding, target.parameter, start)
    if trial:  # so that a method that fails here fails before any layer is changed
        with torch.no_grad():
            parametrization(parametrization.first)
    return partial(_attach_forward, target, binding, parametrization)


def refuse_sparse(target: Target, method: Constraint) -> None:
    """Refuse layers with sparse gradients where a weight is computed.

    Raises:
        WeightError: it is of such a layer.
    """
    if any(getattr(place.owner, "sparse", False) is True for place in target.places):
        what = "a proxy that needs" if isinstance(method, Reparameterization) else "several matrices, which need"
        raise WeightError(
            f"weight '{target.name}' is of {type(target.owner).__name__}(sparse=True), whose gradients are sparse, and "
            f"{method.name!r} computes it from {what} whole ones; make the layer with sparse=False, or use "
            "a method on the step, such as 'retraction', on the whole weight"
        )


@torch.no_grad()
def _attach_forward(target: Target, binding: Binding, parametrization: Reparametrized) -> None:
    parameter, trained = target.parameter, target.parameter.requires_grad
    for each in target.places:  # tied layers share the parametrization, and with it a learnable scale
        # Before torch takes the tensor from the module's own parameters.
        position = list(parameters_of(each.owner)).index(each.tensor)
        # Unsafe: without a pass of its own to see whether the shape is right, which the trial has seen.
        parametrize.register_parametrization(each.owner, each.tensor, parametrization, unsafe=True)
        # On the class that torch has made for this layer alone.
        add_quick_access(each.owner, each.tensor, prefetch_list if isinstance(each.owner, LISTS) else None)
        type(each.owner).register_parameter = register_parameter  # type: ignore[method-assign, assignment]
        bind(each.owner, each.tensor, replace(binding, label=each.name, position=position))
        add_weight_hooks(each.owner, binding.constraint)
    parametrization.first = parametrization.cached = None  # from now on right_inverse starts from the assigned weight
    parameter.requires_grad_(trained)  # torch keeps the Parameter object as the proxy
    parametrization.requires_grad_(trained)
    for each in target.places:
        tag_weight(ConstrainedWeight(each.name, each.owner, each.tensor, bindings_of(each.owner)[each.tensor]))


@torch.no_grad()
def _attach_in_place(target: Target, binding: Binding, start: torch.Tensor) -> None:
    target.parameter.copy_(start)
    for each in target.places:
        bind(each.owner, each.tensor, binding)
        tag_weight(ConstrainedWeight(each.name, each.owner, each.tensor, binding))
        add_weight_hooks(each.owner, binding.constraint)


def detach(found: ConstrainedWeight) -> None:
    """Take the method off a weight: an ordinary parameter with some value remains."""
    owner, tensor = found.owner, found.tensor
    if isinstance(found.binding.constraint, Reparameterization):
        give_class(owner)
        parametrize.remove_parametrizations(owner, tensor, leave_parametrized=True)
        restore_order(owner, tensor, found.binding.position)
    untag_weight(found)
    unbind(owner, tensor)
    if not bindings_of(owner):
        remove_weight_hooks(owner)


def give_class(owner: nn.Module) -> None:
    """Give a parametrized module a class of its own, apart from that of its deep copies.

    torch keeps the tensor's property on a class that deep copies share, and removing a parametrization deletes it
    there: releasing a copy would take the weight away from the original.
    """
    shared = type(owner)
    owner.__class__ = type(shared.__name__, shared.__bases__, dict(shared.__dict__))


def restore_order(owner: nn.Module, tensor: str, position: int) -> None:
    """Put a tensor back to where it was among its module's parameters."""
    parameters = parameters_of(owner)
    names = [name for name in parameters if name != tensor]
    # Popped and inserted again, an entry is last: first the tensor, then those that come after it.
    for name in [tensor, *names[position:]]:
        parameters[name] = parameters.pop(name)
