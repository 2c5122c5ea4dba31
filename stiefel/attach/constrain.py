"""``constrain`` and ``release``: put a method on a module's weights, take it off. Imports ``methods`` and ``optim``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from stiefel.attach.assemble import check_blocks, planned_assembly, release_assembled
from stiefel.attach.attaching import detach, planned
from stiefel.attach.checkpoint import keys_of_proxy
from stiefel.attach.intact import is_waiting, note_names, note_release, stop_waiting, waiting_in
from stiefel.attach.prefetch import forget_places, prefetch_below, stop_prefetch
from stiefel.attach.proxy.parametrization import Reparametrized
from stiefel.attach.select import Target, select
from stiefel.attach.weights import constrained_weights
from stiefel.compat.sharding import is_sharded, write
from stiefel.compat.torch_private import has_hook, remove_hooks
from stiefel.constraint import ROUNDING, Constraint, Reparameterization
from stiefel.errors import OptionError, SelectionError, WeightError
from stiefel.methods import get


def constrain(
    module: nn.Module,
    constraint: str | Constraint = "own",
    *,
    layers: str | Iterable[str] | Callable[[str, nn.Module], bool] | None = None,
    exclude: str | Iterable[str] = (),
    axes: str | None = None,
    blocks: Sequence[int] | None = None,
    inner: Tensor | None = None,
    **options: Any,
) -> nn.Module:
    """Constrain weights of a module, in place, to ``{W : W Wᵀ = scale² I}``.

        stiefel.constrain(model, "own", exclude=["head"], scale="relu")

    A weight of shape (out, in) gets orthonormal rows where out ≤ in and orthonormal columns otherwise; a convolution
    kernel is read as (out, in/groups · k…) per group, packed recurrent and attention weights per gate and per q, k, v.
    Training starts at the nearest point of the set. If an error is raised, nothing has been changed. Lazy layers are
    constrained when a forward pass gives them a shape.

    Args:
        module, constraint: any module; a name from :func:`stiefel.available`, or a :class:`Constraint`.
        layers: names of layers (their ``weight``, or all layers below a container), of tensors
            (``"rnn.weight_hh_l0"``), of lists of parameters, or a predicate ``(name, layer) -> bool`` over the Linear
            and convolution layers. Default: all of these; all members of a list or dictionary of parameters.
        exclude: names of layers, containers or tensors to leave out.
        axes: how to read a tensor otherwise than its layer would, one letter per dimension: ``o`` outputs, ``i``
            inputs, ``b`` a batch of matrices; ``"ibo"`` for (model, heads, head).
        blocks: the outputs of each of several matrices that make up the weight, as in ``[16, 16, 24]``.
        inner: a positive definite B, for ``W B Wᵀ = scale² I`` (``WᵀBW`` where out > in).
        options: the method's options, where ``constraint`` is a name.

    Returns:
        ``module``.

    Raises:
        UnknownMethodError, OptionError: no such method or option, a value out of range, or options beside an object.
        SelectionError: nothing selected, an unknown name, or a weight that is constrained already.
        WeightError: a weight is not finite, has one dimension, or a precision or field that the method cannot hold.
        LayoutError: the set is empty at a weight's shape, for instance a group size that does not divide.
    """
    wish = Wish(_method(constraint, options), axes, check_blocks(blocks), inner)
    targets = select(_required(module), layers, exclude)
    # All checks run in the list, before the loop makes the first change.
    for attach in wish.planned(targets):
        attach()
    note_names(module, (name for target in targets for name in target.names))
    if isinstance(wish.method, Reparameterization):
        prefetch_below(module)
    return module


@dataclass(frozen=True)
class Wish:
    """What a weight is to be: held by a method, and read otherwise than its layer would."""

    method: Constraint
    axes: str | None
    blocks: tuple[int, ...] | None
    inner: Tensor | None

    def planned(self, targets: Sequence[Target]) -> list[Callable[[], None]]:
        """Check targets, and return the functions that attach the method, or let lazy layers wait."""
        here = [target for target in targets if not is_lazy(target.parameter)]
        waiting = [_waiting(target, self) for target in targets if is_lazy(target.parameter)]
        if self.blocks is None and self.inner is None:
            return planned(here, self.method, self.axes) + waiting
        assembled = [planned_assembly(target, self.method, self.axes, self.blocks, self.inner) for target in here]
        return assembled + waiting


def _waiting(target: Target, wish: Wish) -> Callable[[], None]:
    """A function that lets a lazy layer wait for its shape."""
    if is_waiting(target.owner, target.tensor):
        raise SelectionError(
            f"weight '{target.name}' is constrained already, as soon as it has a shape (a lazy layer); call "
            "stiefel.release(model) first to constrain it anew"
        )
    if target.ties:
        raise WeightError(
            f"weight '{target.name}' has no shape yet (a lazy layer), and other layers share it; run one forward pass "
            "before constraining it"
        )

    def wait() -> None:
        waiting_in(target.owner)[target.tensor] = (target.name, wish)
        if not has_hook(target.owner, _constrain_shaped):
            target.owner.register_forward_pre_hook(_constrain_shaped)
            target.owner.register_load_state_dict_pre_hook(_refuse_proxies)

    return wait


def _constrain_shaped(owner: nn.Module, args: Any) -> None:
    """Constrain what has got its shape: a forward pre-hook, which runs after the one that gives it."""
    waiting = waiting_in(owner)
    for tensor, (name, wish) in list(waiting.items()):
        target = Target(name, owner, tensor)
        if not is_lazy(target.parameter):
            for attach in wish.planned([target]):
                attach()
            del waiting[tensor]
            forget_places()
    if not waiting:
        stop_waiting(owner)
        remove_hooks(owner, _constrain_shaped, _refuse_proxies)


def _refuse_proxies(owner: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """Refuse a checkpoint whose weight is a proxy, which a lazy layer has no place for: a load-state-dict pre-hook."""
    for tensor, (name, _) in waiting_in(owner).items():
        if keys_of_proxy(state, prefix, tensor):
            raise WeightError(
                f"weight '{name}' has no shape yet (a lazy layer), and the checkpoint holds what it is computed from; "
                "run one forward pass of the model, then load"
            )


def _required(given: object) -> nn.Module:
    if isinstance(given, nn.Module):
        return given
    what = f"a tensor of shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
    raise SelectionError(
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


@torch.no_grad()
def release(module: nn.Module, *, whole: bool = True) -> nn.Module:
    """Take all constraints off a module, in place: ordinary layers and parameters with the current weights remain.

    For saving, export and inference. A module without constraints is returned as it is.

    Args:
        module: a model.
        whole: put weights of ``blocks`` or ``inner`` together; otherwise their matrices remain, as parameters.

    Returns:
        ``module``.

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
        detach(found)
    free = [(found.owner, found.tensor) for found in weights]
    for each in module.modules():  # each submodule on which constrain was called has hooks of its own
        stop_prefetch(each)
        free += [(each, tensor) for tensor in stop_waiting(each)]
    for parameter, value in values.values():
        write(parameter, value)  # with tied layers, releasing the first has changed what the others compute
    if whole:
        free += release_assembled(module)
    note_release(module, free)
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
