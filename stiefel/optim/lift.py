"""Lifting: any dense first-order optimizer, fed tangent gradients, with a step method applied to its displacement.

    T = P_X(G),   U = the base optimizer's displacement for the gradient T,   X ← method(X, U)

The lifted form is a subclass of the base, made on demand, not a wrapper or a set of hooks. Learning-rate schedulers,
GradScaler, checkpoints and users' code expect a ``torch.optim.Optimizer`` with ``param_groups`` of its own: a subclass
is one, and leaves all of that to torch. Hooks of an optimizer are lost silently when it is copied or pickled, and its
steps would then be Euclidean and leave the set; a class is not lost. The weights that a method moves are known by their
:mod:`stiefel.optim.ownership`.

A step evaluates the closure, replaces gradients by their tangent parts, takes the base step, lets the method step from
the old weight by the base's displacement (and carry its momentum along, if it does that), and restores the user's
gradients. If anything raises, the weights are reset.

Imports ``moves``, ``ownership``, ``bases`` and below.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from stiefel.compat.torch_private import not_compiled
from stiefel.constraint import Constraint, StepMethod
from stiefel.linalg import require_exact
from stiefel.optim.bases import is_additive, keeps_nothing, refuse
from stiefel.optim.moves import Gradients, Member
from stiefel.optim.ownership import Mark, marks, stepped_by
from stiefel.optim.sharded_moves import moves_of

if TYPE_CHECKING:
    _Base = torch.optim.Optimizer
else:
    _Base = object


class Lift(_Base):
    """Mixin before an optimizer class: the base steps, then each owned weight's method gets the displacement."""

    base: type[torch.optim.Optimizer]
    stepping = False  # true inside the base step, where torch may run the global hooks again
    replicas: Callable[[], Any] = staticmethod(lambda: None)
    """The processes with equal models, which share the work; None for no others. Copies have none."""

    @not_compiled  # it counts steps, on which a compiled one would depend
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the base optimizer, followed by the methods' own."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Each move copies its weights as they are before the base step, so that undo() can put them back.
        moves = moves_of(self._members(), self.replicas())
        handed = Gradients()
        try:
            for p in (p for group in self.param_groups for p in group["params"]):
                if p.grad is not None and p.grad.is_conj():  # torch's optimizers refuse such views
                    handed.replace(p, p.grad.resolve_conj())
            for move in moves:
                move.hand_over_gradients(handed)
                move.free()
            # Owned weights now hold 0 or their old values, and tangent gradients where the method wants these.
            self._base_step()
            if skipped(self):
                for move in moves:
                    move.undo()
            else:
                for move in moves:
                    move.finish()
                for move in moves:
                    move.transport(self.state)
                for move in moves:  # once no step can be undone any more
                    move.count()
        except BaseException:
            for move in moves:  # a base step without the method's own would leave weights off their sets
                move.undo()
            raise
        finally:
            handed.restore()
        return loss

    def _base_step(self) -> None:
        """The base class's step without the hooks that run around this one: they would see unfinished steps."""
        step: Any = super().step.__func__  # type: ignore[attr-defined]
        # torch wraps step() of a class in one that runs the hooks, and marks it as `hooked`.
        while getattr(step, "hooked", False):
            step = step.__wrapped__
        self.stepping = True
        try:
            step(self)
        finally:
            self.stepping = False

    def _members(self) -> list[Member]:
        members = []
        for group in self.param_groups:
            forgets, additive = keeps_nothing(self.base, group), is_additive(self.base, group)
            lr: float | None = None  # read once where it is needed: a tensor may be on a device
            for p in group["params"]:
                binding = stepped_by(p)
                if binding is None or p.grad is None:
                    continue
                require_exact(p.dtype, binding.label)
                tangent = _wants_tangent(binding.constraint, forgets)
                lr = float(group["lr"]) if lr is None else lr
                members.append(Member(p, binding, lr, tangent, additive))
        return members

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # pickle finds classes by name, and a lifted class is made at run time: it is made again from its base.
        # The state comes after the marks, which are copied with the parameters that it holds.
        return _rebuild_optimizer, (self.base, marks(self)), self.__getstate__()


def skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a fused optimizer skips this step, because torch.amp.GradScaler found infinities or NaN."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _wants_tangent(method: Constraint, forgets: bool) -> bool:
    """Whether the base gets P_X(G): where it ``forgets``, a method that projects its step gets the same from G."""
    return isinstance(method, StepMethod) and method.tangent and not (forgets and method.projects)


def _rebuild_optimizer(base: type[torch.optim.Optimizer], owned: list[Mark]) -> torch.optim.Optimizer:
    return object.__new__(lift(base))


def lift(cls: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The lifted form of an optimizer class.

    Raises:
        OptimizerError: the class is one that cannot be lifted.
    """
    if issubclass(cls, Lift):
        return cls
    refuse(cls)
    return _lifted(cls)  # type: ignore[arg-type]


@cache  # one class per base, so that equal optimizers have equal types
def _lifted(cls: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    doc = f"{cls.__name__}, fed tangent gradients and followed by the methods' own steps."
    return type("Lifted" + cls.__name__, (Lift, cls), {"__doc__": doc, "base": cls})
