"""Lifting: any dense first-order optimizer, fed tangent gradients, with a step method applied to its displacement.

    T = P_X(G),   U = the base optimizer's displacement for the gradient T,   X ← method(X, U)

The lifted form is a subclass of the base, made on demand, not a wrapper or a set of hooks. Learning-rate schedulers,
GradScaler, checkpoints and users' code expect a ``torch.optim.Optimizer`` with ``param_groups`` of its own: a subclass
is one, and leaves all of that to torch. Hooks of an optimizer are lost silently when it is copied or pickled, and its
steps would then be Euclidean and leave the set; a class is not lost. For the same reason a class (``SteppedParameter``)
marks the weights that a method moves.

A step evaluates the closure, replaces gradients by their tangent parts, takes the base step, lets the method step from
the old weight by the base's displacement, and restores the user's gradients. If anything raises, the weights are reset.

Imports ``constraint``, ``geometry``, ``linalg``, ``bases``, ``buckets``, ``stepped_parameter`` and the errors.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stiefel.compat.torch_private import copy_all_, zero_all_
from stiefel.constraint import Binding, Constraint, Penalty, StepMethod
from stiefel.errors import DivergenceError
from stiefel.linalg import full_precision, is_capturing, may_wait, require_exact
from stiefel.manifold.geometry import tangent_gradient_
from stiefel.optim.bases import is_additive, keeps_nothing, refuse
from stiefel.optim.buckets import bucket, stack, unstack
from stiefel.optim.divergence import raise_later
from stiefel.optim.stepped_parameter import SteppedParameter

if TYPE_CHECKING:
    _Base = torch.optim.Optimizer
else:
    _Base = object


class Lift(_Base):
    """Mixin before an optimizer class: the base steps, then each owned weight's method gets the displacement."""

    base: type[torch.optim.Optimizer]
    stepping = False  # true inside the base step, where torch may run the global hooks again

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the base optimizer, followed by the methods' own."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Each move copies its weights as they are before the base step, so that undo() can put them back.
        moves = [_Move(members) for members in bucket(self._owned(), _moves_together)]
        handed = _Gradients()
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

    def _owned(self) -> list[_Owned]:
        owned = []
        for group in self.param_groups:
            forgets, additive = keeps_nothing(self.base, group), is_additive(self.base, group)
            for p in group["params"]:
                if not isinstance(p, SteppedParameter) or p.grad is None:
                    continue
                require_exact(p.dtype, p.binding.label)
                owned.append(_Owned(p, float(group["lr"]), _wants_tangent(p.binding.constraint, forgets), additive))
        return owned

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # pickle finds classes by name, and a lifted class is made at run time: it is made again from its base.
        return _rebuild_optimizer, (self.base,), self.__getstate__()


def skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a fused optimizer skips this step, because torch.amp.GradScaler found infinities or NaN."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def quoted(labels: Iterable[str]) -> str:
    """Names of weights, for a message."""
    return ", ".join(f"'{label}'" for label in dict.fromkeys(labels))


class _Gradients:
    """Gradients that are replaced while the base optimizer steps, and put back as the user left them."""

    def __init__(self) -> None:
        self._given: list[tuple[Tensor, Tensor | None]] = []

    def replace(self, parameter: Tensor, gradient: Tensor) -> None:
        """Let the base optimizer see another gradient of a parameter."""
        self._given.append((parameter, parameter.grad))
        parameter.grad = gradient

    def restore(self) -> None:
        """Put back what was there."""
        for parameter, gradient in reversed(self._given):
            parameter.grad = gradient


@dataclass(frozen=True)
class _Owned:
    """A parameter that a method moves, its lr, and whether its base gets the tangent gradient and is additive."""

    parameter: SteppedParameter
    lr: float
    tangent: bool
    additive: bool


class _Move:
    """One step of a bucket's weights: their values before the base step, and their method's step from there."""

    def __init__(self, members: list[_Owned]) -> None:
        self.parameters = [m.parameter for m in members]
        self.lr, self.tangent, self.additive = members[0].lr, members[0].tangent, members[0].additive
        self.layouts = [p.binding.layout for p in self.parameters]
        self.before = stack(self.layouts, self.parameters, scaled=False, copy=True)
        self.shortened: Tensor | None = None

    def hand_over_gradients(self, handed: _Gradients) -> None:
        """Give the base optimizer the tangent part of each gradient, where the method wants that."""
        if not self.tangent:
            return
        scale = self.layouts[0].scale
        with full_precision(self.before.device):
            x = self.before / scale if scale != 1 else self.before
            given = [g for p in self.parameters if (g := p.grad) is not None]
            gradients = [g.to_dense() if g.is_sparse else g for g in given]
            # Copied, because the tangent part is computed in place and the user's gradients must stay.
            batch = stack(self.layouts, gradients, scaled=False, copy=True)
            tangents = unstack(self.layouts, tangent_gradient_(x, batch), scaled=False)
        for p, gradient, tangent in zip(self.parameters, gradients, tangents, strict=True):
            # Kernels over lists of tensors want them laid out alike (channels_last).
            alike = tangent.stride() == gradient.stride()
            handed.replace(p, tangent if alike else torch.empty_like(gradient).copy_(tangent))

    def free(self) -> None:
        """Let an additive base step from 0: a displacement much smaller than the weight keeps all its digits."""
        if self.additive:
            zero_all_(self.parameters)

    def finish(self) -> None:
        """Let the method move the weights from their old values by the base step's displacement."""
        scale = self.layouts[0].scale
        with full_precision(self.before.device):
            # An additive base started from 0, so that the parameters hold U itself.
            displacement = stack(self.layouts, self.parameters, scaled=False, copy=True)
            if not self.additive:
                displacement.sub_(self.before)
            displacement = self._finite(displacement, 0)
            before = self.before
            if scale != 1:
                before, displacement = before / scale, displacement.div_(scale)
            x, shortened = _moved(self.parameters[0].binding, before, displacement, self.lr)
            x = self._finite(x, before)  # it may overflow, or a penalty be too strong
        self._write(unstack(self.layouts, x, scaled=True))
        self.shortened = shortened

    def count(self) -> None:
        """Note for each weight whether its step was shortened."""
        if self.shortened is None:
            return
        counts = [layout.matrix_shape[0] for layout in self.layouts]
        if may_wait(self.shortened):
            each = iter(self.shortened.tolist())
            flags = [any(list(islice(each, count))) for count in counts]
        else:  # stays on the GPU, and is read when the tally is
            flags = [flag.any() for flag in self.shortened.split(counts)]
        for p, flag in zip(self.parameters, flags, strict=True):
            tally = p.binding.tally
            tally.shortened = flag + (0 if tally.shortened is None else tally.shortened)

    def undo(self) -> None:
        """Put the weights back."""
        self._write(unstack(self.layouts, self.before, scaled=False))

    def _write(self, weights: list[Tensor]) -> None:
        copy_all_(self.parameters, weights)

    def _finite(self, value: Tensor, otherwise: Tensor | float) -> Tensor:
        """The value if finite, else an error: on a CPU now; on a GPU later, with ``otherwise`` in its place."""
        finite = torch.isfinite(value.sum())  # a NaN or an infinity anywhere shows in the sum
        if is_capturing(value):
            return value
        if not may_wait(value):
            raise_later(finite, self._divergence)
            return torch.where(finite, value, otherwise)
        if not finite and not value.isfinite().all():  # a sum of finite entries may overflow
            raise DivergenceError(self._divergence())
        return value

    def _divergence(self) -> str:
        return (
            f"the optimizer's step of weight {quoted(p.binding.label for p in self.parameters)} is NaN or infinite. "
            "It was not taken, and the weight has the value from before the step; lower the learning rate"
        )


def _wants_tangent(method: Constraint, forgets: bool) -> bool:
    """Whether the base gets P_X(G): where it ``forgets``, a method that projects its step gets the same from G."""
    return isinstance(method, StepMethod) and method.tangent and not (forgets and method.projects)


def _moved(binding: Binding, x: Tensor, displacement: Tensor, lr: float) -> tuple[Tensor, Tensor | None]:
    """The method's step from X, and which matrices' steps it shortened; None for a method that shortens none."""
    method = binding.constraint
    if isinstance(method, Penalty):
        return method.step(x, displacement, lr * method.strength_at(binding.tally.steps), binding.layout), None
    assert isinstance(method, StepMethod)
    result = method.step(x, displacement, lr)
    return result if isinstance(result, tuple) else (result, None)


def _moves_together(member: _Owned) -> Hashable:
    p, binding = member.parameter, member.parameter.binding
    # A penalty may depend on what the kernel does (its stride) and on the number of steps taken.
    method, layout = binding.constraint, binding.layout
    more = (layout, binding.tally.steps) if isinstance(method, Penalty) else layout.matrix_shape[1:]
    return id(method), more, p.dtype, p.device, member.lr, member.tangent, member.additive


def _rebuild_optimizer(base: type[torch.optim.Optimizer]) -> torch.optim.Optimizer:
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
