"""Global optimizer hooks on constrained weights: refuse steps that would ruin them, and count the others.

A step raises before anything is changed if a gradient is NaN or infinite, if a plain optimizer steps a weight that a
method moves (geoopt's Riemannian optimizers may, for weights on a manifold stay on it), or if such a weight has weight
decay. Decay of a proxy that would turn its weight warns once. Each step taken advances the tally's steps, and after it
the starts of trivializations move for which it is time. On a GPU, where the host need not wait for numbers, NaN and
infinities raise a few steps later.

Imports ``optim.lift``, ``ownership``, ``decay``; geoopt only where it was imported already.
"""

from __future__ import annotations

import warnings
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from stiefel.compat.geoopt import is_on_manifold, is_riemannian
from stiefel.compat.sharding import agree_on_least, is_sharded, local_of
from stiefel.compat.torch_private import norms_of_all, not_compiled
from stiefel.constraint import residual_of
from stiefel.errors import DivergenceError, OptimizerError
from stiefel.linalg import are_finite, is_capturing, may_wait, refuse_capture
from stiefel.optim.bases import acting, decays, forget_curvature, refuse_late_start
from stiefel.optim.decay import unwelcome
from stiefel.optim.divergence import raise_later, raise_pending
from stiefel.optim.lift import Lift, skipped
from stiefel.optim.ownership import (
    Ownership,
    move_starts,
    note_count,
    ownership,
    quoted,
    recognize,
    state_of,
    stepped_by,
)

_steps_seen = 0
_told_of_changes: WeakKeyDictionary[torch.optim.Optimizer, set[str]] = WeakKeyDictionary()
_told_of_decay: WeakKeyDictionary[torch.optim.Optimizer, set[str]] = WeakKeyDictionary()
_inside: WeakSet[torch.optim.Optimizer] = WeakSet()
"""Optimizers whose steps are a part of another one's."""


def steps_seen() -> int:
    """A counter that each step of any optimizer advances."""
    return _steps_seen


@not_compiled
def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
    global _steps_seen
    _steps_seen += 1  # now, not after: an optimizer's own post-step hooks run before our global one
    if getattr(optimizer, "stepping", False):
        return None  # the base step inside a lifted one
    if acting(optimizer) is not optimizer:
        _inside.add(acting(optimizer))
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        _check(optimizer)
        return None

    evaluated = False

    @wraps(closure)
    def checked() -> Any:
        """The closure, then the checks, since the closure computes the gradients."""
        nonlocal evaluated
        loss = closure()
        _check(optimizer, evaluated)
        evaluated = True
        return loss

    if len(args) > 1:
        return (args[0], checked, *args[2:]), kwargs
    return args, {**kwargs, "closure": checked}


def _check(optimizer: torch.optim.Optimizer, under_way: bool = False) -> None:
    """The checks before a step, or within one that is under way: its closure has been evaluated before."""
    recognize(optimizer)
    known = [(p, ownership(p)) for group in optimizer.param_groups for p in group["params"]]
    stepped = [(p, owned) for p, owned in known if p.grad is not None]
    _refuse_plain_step(acting(optimizer), stepped)
    _refuse_decay(optimizer)
    refuse_late_start(optimizer)
    _tell_of_changes(optimizer, stepped)
    _refuse_moving_start(stepped)
    for p, owned in stepped:
        if owned is not None and p.grad.is_conj() and not isinstance(optimizer, Lift):
            p.grad = p.grad.resolve_conj()  # of weights that were stacked: torch's optimizers refuse such views
    if stepped:
        # An optimizer that evaluates its closure again has moved weights in between.
        moved = "The weights are where this step tried them last" if under_way else "This step changed no weight"
        # Values are checked of all constrained weights, gradients of those that have one.
        _refuse_divergence(optimizer, [(p, owned) for p, owned in known if owned is not None], moved)


def _refuse_plain_step(optimizer: torch.optim.Optimizer, members: list[tuple[Tensor, Ownership | None]]) -> None:
    # geoopt's own optimizers know a weight on a manifold by its class, which a sharded one has not.
    batched, holds = getattr(optimizer, "batched", False), getattr(optimizer, "holds", False)
    for p, owned in members:
        if holds or owned is None or owned.part or not owned.binding.constraint.moves:
            continue
        if isinstance(optimizer, Lift) if owned.lifts else batched or (is_riemannian(optimizer) and is_on_manifold(p)):
            continue
        name = type(optimizer).__name__
        raise OptimizerError(
            f"{name} is about to step weight '{owned.label}' off its constraint's set; create the optimizer with "
            f"stiefel.optimizer(model, {name}, ...), or call stiefel.release(model) first"
        )


def _refuse_decay(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        if not decays(group):
            continue
        for p in group["params"]:
            owned = ownership(p)
            options = [] if owned is None or p.grad is None else unwelcome(optimizer, group, owned.decay)
            # A warning once per optimizer and weight. Weights that a method moves are not told, but refused each time.
            if owned is None or not options or owned.label in _told_of_decay.get(optimizer, ()):
                continue
            message = (
                f"{options[0]}={group[options[0]]:g} of {type(optimizer).__name__} would move weight '{owned.label}' "
                "along its set; make the optimizer with stiefel.optimizer(model, ...), which keeps constrained weights "
                f"in groups without it, or set {options[0]}=0 there (a checkpoint from before may have brought it back)"
            )
            if owned.binding.constraint.moves:
                raise OptimizerError(message)
            _told_of_decay.setdefault(optimizer, set()).add(owned.label)
            warnings.warn(message, stacklevel=5)


def _refuse_moving_start(members: list[tuple[Tensor, Ownership | None]]) -> None:
    for p, owned in members:
        if owned is None or owned.rebase is None:
            continue
        if owned.rebase > 1:  # at every step the start moves without a count
            refuse_capture(p, f"the start of '{owned.binding.constraint.name}'")
        if p.device.type == "cpu" and p.is_shared():
            raise OptimizerError(
                f"weight '{owned.label}' is in memory that processes share, and each would move its start (rebase="
                f"{owned.rebase}) while others compute from it; use rebase=None there, or a method on the step"
            )


def _tell_of_changes(optimizer: torch.optim.Optimizer, members: list[tuple[Tensor, Ownership | None]]) -> None:
    """Warn where something else has taken a weight off its set since its last step, as wrappers that average do."""
    for p, owned in members:
        if owned is None or owned.part or not owned.binding.constraint.moves or is_sharded(p) or is_capturing(p):
            continue
        binding = owned.binding
        if binding.tally.left in (None, state_of(p)) or owned.label in _told_of_changes.get(optimizer, ()):
            continue
        residual = residual_of(binding.layout.points(p.detach()))
        if not binding.allows(residual, torch.float32):  # it may have been in that precision before
            _told_of_changes.setdefault(optimizer, set()).add(owned.label)
            warnings.warn(
                f"weight '{owned.label}' has been taken off its constraint's set since its last step (its residual "
                f"‖W Wᵀ/s² − I‖_F/√p is {residual:.1e}) by something but {type(optimizer).__name__}: an average, an "
                "assignment, or an optimizer around this one; use a reparameterization with those, or call "
                "stiefel.project(model) after a change",
                stacklevel=5,
            )


def _refuse_divergence(optimizer: torch.optim.Optimizer, members: list[tuple[Tensor, Ownership]], moved: str) -> None:
    if not members or getattr(optimizer, "found_inf", None) is not None:
        return  # under torch.amp.GradScaler a fused optimizer itself skips steps that are not finite
    if torch.compiler.is_compiling() or is_capturing(members[0][0]):
        return  # nothing may be read back here
    raise_pending()
    gradients = [(_values(g), w.label) for p, w in members if (g := p.grad) is not None]
    # Entries may overflow with finite gradients, if the loss hardly depends on them; a lifted step checks its own.
    entries = [(local_of(p), w.label) for p, w in members if stepped_by(p) is None]
    sharded = next((p for p, _ in members if is_sharded(p)), None)
    values = [value for value, _ in gradients + entries]
    if not values:
        return
    # With one value on a CPU all are checked at once, although the host may then wait for a device.
    on_device = not any(may_wait(v) for v in values)
    # A norm is infinite or NaN if an entry is, or if it overflows. Order 2 overflows for entries from 1e19 on, but
    # takes a quarter of the time on a CPU, where the entries themselves are checked then.
    sizes = norms_of_all(values, 1 if on_device else 2)
    if on_device:
        finite = are_finite(torch.stack([v.to(sizes[0].device, non_blocking=True) for v in sizes])).all()
        if sharded is not None:
            finite = agree_on_least(finite.float(), sharded).bool()
        labels = [w.label for _, w in members]
        what = "a gradient or an entry of weights"
        raise_later(
            finite,
            lambda: (
                f"{what} {quoted(labels)} was NaN or infinite in an earlier step: the loss has diverged; lower the "
                "learning rate, or look at the loss before that step"
            ),
        )
        return
    finite = torch.stack([v.cpu() for v in sizes]).isfinite().all()
    spoilt = {} if finite else {"the gradient of": _not_finite(gradients), "the value of": _not_finite(entries)}
    fine = torch.tensor(float(not any(spoilt.values())))  # a norm of finite entries may have overflowed
    # One process alone may hold the part that is not finite: all of them stop, since a step is taken by all or none.
    if fine if sharded is None else agree_on_least(fine, sharded):
        return
    for what, labels in spoilt.items():
        if labels:
            raise DivergenceError(
                f"{what} weight {quoted(labels)} is NaN or infinite: the loss has diverged. {moved}; lower the "
                "learning rate, or look at the loss before it"
            )
    if sharded is not None:
        raise DivergenceError(
            f"the part of weight {quoted(w.label for _, w in members)} or of its gradient that another process holds "
            f"is NaN or infinite: the loss has diverged. {moved}"
        )


def _not_finite(values: list[tuple[Tensor, str]]) -> list[str]:
    return [label for value, label in values if not value.isfinite().all()]


def _values(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else local_of(gradient)


@not_compiled
def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    global _steps_seen
    _steps_seen += 1  # again: what a closure's forward passes have cached within the step is out of date now
    # The base step inside a lifted one would count twice, and a skipped one has moved nothing.
    if getattr(optimizer, "stepping", False) or skipped(optimizer):
        return
    # The steps of an optimizer inside of another one are counted by themselves.
    inner = [] if acting(optimizer) is optimizer else acting(optimizer).param_groups
    counted = {id(p) for group in inner for p in group["params"]}
    due = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            owned = ownership(p)
            if owned is None or owned.part:
                continue
            if id(p) not in counted:
                _count(optimizer, p, owned)
            if p.grad is not None and owned.is_due:
                due.append((owned.computed, p))
    # Not within another one's step, which may yet send to all processes what each has stepped.
    if due and optimizer not in _inside:
        move_starts(due)
        forget_curvature(acting(optimizer))


def _count(optimizer: torch.optim.Optimizer, p: Tensor, owned: Ownership) -> None:
    tally = owned.binding.tally
    tally.steps += 1
    if p.grad is None:
        return  # not stepped
    tally.stepped += 1
    tally.left = state_of(p)
    if owned.counts:
        note_count(optimizer, p, owned)


# At import, so that also a process that only reads a pickle of a constrained model has them.
register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
