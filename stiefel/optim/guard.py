"""Global optimizer hooks on constrained weights: refuse steps that would ruin them, and count the others.

Imports ``optim.lift``, ``decay``; geoopt only where it was imported already.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from stiefel.compat.geoopt import is_on_manifold, is_riemannian
from stiefel.compat.torch_private import norms_of_all
from stiefel.constraint import Binding, Decay
from stiefel.errors import DivergenceError, OptimizerError
from stiefel.linalg import is_capturing, may_wait
from stiefel.optim.bases import decays, refuse_late_start
from stiefel.optim.decay import unwelcome
from stiefel.optim.divergence import raise_later, raise_pending
from stiefel.optim.lift import Lift, quoted, skipped
from stiefel.optim.stepped_parameter import SteppedParameter


@dataclass(frozen=True)
class Watched:
    """What the step hooks need to know of a constrained parameter.

    Args:
        binding: of its weight.
        part: whether it is another trained part of a weight whose own parameter is watched: a learnable gain.
    """

    binding: Binding
    part: bool = False

    @property
    def label(self) -> str:
        """Its weight's name."""
        return self.binding.label

    @property
    def decay(self) -> Decay:
        """What weight decay does to its weight."""
        return "acts" if self.part else self.binding.constraint.decay


_ATTRIBUTE = "_stiefel_watched"  # on the parameter itself: a weak reference to it would forbid torch to swap it


class Mark:
    """Keeps a parameter watched through copies and pickles of its holder, which drop a parameter's attributes."""

    def __init__(self, parameter: Tensor, watched: Watched) -> None:
        self.parameter, self.watched = parameter, watched
        setattr(parameter, _ATTRIBUTE, watched)

    def __deepcopy__(self, memo: dict[int, Any]) -> Mark:
        return Mark(copy.deepcopy(self.parameter, memo), copy.deepcopy(self.watched, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return _watch_again, (self.parameter, self.watched)


def _watch_again(parameter: Tensor, watched: Watched) -> Mark:
    _install()  # in the process that reads a pickle
    return Mark(parameter, watched)


def watch(parameter: Tensor, binding: Binding, *, part: bool = False) -> Mark:
    """From now on, check every optimizer step of ``parameter``.

    A step raises before anything is changed if a gradient is NaN or infinite, if a plain optimizer steps a weight that
    a method moves (geoopt's Riemannian optimizers may, for weights on a manifold stay on it), or if such a weight has
    weight decay. Decay of a proxy that would turn its weight warns once. Each step taken advances the tally's steps.
    On a GPU, where the host need not wait for numbers, NaN and infinities raise a few steps later.

    Returns:
        A mark to keep on the parameter's module, so that in a copy of the module the parameter's copy is watched.
    """
    return _watch_again(parameter, Watched(binding, part))


def unwatch(parameter: Tensor) -> None:
    """Check the parameter's steps no longer."""
    if hasattr(parameter, _ATTRIBUTE):
        delattr(parameter, _ATTRIBUTE)


@cache  # once per process
def _install() -> None:
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def is_watched(parameter: Tensor) -> bool:
    """Whether :func:`watch` knows this very tensor; a deep copy of it is another one."""
    return hasattr(parameter, _ATTRIBUTE)


def _watched(parameter: Tensor) -> Watched | None:
    if isinstance(parameter, SteppedParameter):  # it keeps its binding through copies and pickles
        return Watched(parameter.binding)
    return getattr(parameter, _ATTRIBUTE, None)


_steps_seen = 0
_told_of_decay: WeakKeyDictionary[torch.optim.Optimizer, set[str]] = WeakKeyDictionary()


def steps_seen() -> int:
    """A counter that each step of any optimizer advances, from the first constrained weight on."""
    return _steps_seen


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
    global _steps_seen
    _steps_seen += 1  # now, not after: an optimizer's own post-step hooks run before our global one
    if getattr(optimizer, "stepping", False):
        return None  # the base step inside a lifted one
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        _check(optimizer)
        return None

    @wraps(closure)
    def checked() -> Any:
        """The closure, then the checks, since the closure computes the gradients."""
        loss = closure()
        _check(optimizer)
        return loss

    if len(args) > 1:
        return (args[0], checked, *args[2:]), kwargs
    return args, {**kwargs, "closure": checked}


def _check(optimizer: torch.optim.Optimizer) -> None:
    known = [(p, _watched(p)) for group in optimizer.param_groups for p in group["params"]]
    stepped = [(p, watched) for p, watched in known if p.grad is not None]
    _refuse_plain_step(optimizer, stepped)
    _refuse_decay(optimizer)
    refuse_late_start(optimizer)
    for p, watched in stepped:
        if watched is not None and p.grad.is_conj() and not isinstance(optimizer, Lift):
            p.grad = p.grad.resolve_conj()  # of weights that were stacked: torch's optimizers refuse such views
    if stepped:
        # Values are checked of all constrained weights, gradients of those that have one.
        _refuse_divergence(optimizer, [(p, watched) for p, watched in known if watched is not None])


def _refuse_plain_step(optimizer: torch.optim.Optimizer, members: list[tuple[Tensor, Watched | None]]) -> None:
    lifted = isinstance(optimizer, Lift)
    riemannian = is_riemannian(optimizer)
    for p, watched in members:
        if lifted and isinstance(p, SteppedParameter):
            continue
        manifold = getattr(p, "manifold", None)
        on_manifold = is_on_manifold(p) and hasattr(manifold, "binding")
        if isinstance(p, SteppedParameter) or (on_manifold and not riemannian):
            label = (p if isinstance(p, SteppedParameter) else manifold).binding.label  # type: ignore[union-attr]
            name = type(optimizer).__name__
            raise OptimizerError(
                f"{name} is about to step weight '{label}' off its constraint's set; create the optimizer with "
                f"stiefel.optimizer(model, {name}, ...), or call stiefel.release(model) first"
            )
        # A copy or a conversion may have lost the class; the step would then be a Euclidean one.
        if (
            watched is not None
            and watched.binding.constraint.moves
            and not isinstance(p, SteppedParameter)
            and not on_manifold
        ):
            raise OptimizerError(
                f"weight '{watched.label}' is no longer marked as constrained, as after a copy or a conversion "
                "of the model; call stiefel.optimizer(model, ...) again, or stiefel.release(model) first"
            )


def _refuse_decay(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        if not decays(group):
            continue
        for p in group["params"]:
            watched = _watched(p)
            options = [] if watched is None or p.grad is None else unwelcome(optimizer, group, watched.decay)
            # A warning once per optimizer and weight. Weights that a method moves are not told, but refused each time.
            if watched is None or not options or watched.label in _told_of_decay.get(optimizer, ()):
                continue
            message = (
                f"{options[0]}={group[options[0]]:g} of {type(optimizer).__name__} would move weight '{watched.label}' "
                "along its set; make the optimizer with stiefel.optimizer(model, ...), which keeps constrained weights "
                f"in groups without it, or set {options[0]}=0 there (a checkpoint from before may have brought it back)"
            )
            if watched.binding.constraint.moves:
                raise OptimizerError(message)
            _told_of_decay.setdefault(optimizer, set()).add(watched.label)
            warnings.warn(message, stacklevel=5)


def _refuse_divergence(optimizer: torch.optim.Optimizer, members: list[tuple[Tensor, Watched]]) -> None:
    if not members or getattr(optimizer, "found_inf", None) is not None:
        return  # under torch.amp.GradScaler a fused optimizer itself skips steps that are not finite
    if torch.compiler.is_compiling() or is_capturing(members[0][0]):
        return  # nothing may be read back here
    raise_pending()
    gradients = [
        (g.coalesce().values() if g.is_sparse else g, w.label) for p, w in members if (g := p.grad) is not None
    ]
    # Entries may overflow with finite gradients, if the loss hardly depends on them; a lifted step checks its own.
    entries = [(p.detach(), w.label) for p, w in members if not isinstance(p, SteppedParameter)]
    values = [value for value, _ in gradients + entries]
    if not values:
        return
    # With one value on a CPU all are checked at once, although the host may then wait for a device.
    on_device = not any(may_wait(v) for v in values)
    # A norm is infinite or NaN if an entry is, or if it overflows. Order 2 overflows for entries from 1e19 on, but
    # takes a quarter of the time on a CPU, where the entries themselves are checked then.
    sizes = norms_of_all(values, 1 if on_device else 2)
    if on_device:
        finite = torch.stack([v.to(sizes[0].device, non_blocking=True) for v in sizes]).isfinite().all()
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
    if torch.stack([v.cpu() for v in sizes]).isfinite().all():
        return
    for what, found in (("the gradient of", gradients), ("the value of", entries)):
        spoilt = [label for value, label in found if not value.isfinite().all()]
        if spoilt:
            raise DivergenceError(
                f"{what} weight {quoted(spoilt)} is NaN or infinite: the loss has diverged. This step changed no "
                "weight; lower the learning rate, or look at the loss before it"
            )


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    global _steps_seen
    _steps_seen += 1  # again: what a closure's forward passes have cached within the step is out of date now
    # The base step inside a lifted one would count twice, and a skipped one has moved nothing.
    if getattr(optimizer, "stepping", False) or skipped(optimizer):
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            watched = _watched(p)
            if watched is not None and not watched.part:
                watched.binding.tally.steps += 1
