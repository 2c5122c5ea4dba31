"""One step of a bucket's weights: whole ones, and sharded ones, of which each process steps a part.

Both do the same in the same order: tangent gradients are handed over, the base steps, the method moves the weights from
their old values by the base's displacement, and carries the base's momentum along if it is one that does. Imports
``constraint``, ``geometry``, ``linalg``, ``bases``, ``buckets``, ``exchange``, ``ownership`` and the errors.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from stiefel.compat.torch_private import copy_all_, zero_all_
from stiefel.constraint import Binding, Penalty, StepMethod, TransportMethod
from stiefel.errors import DivergenceError
from stiefel.linalg import (
    are_finite,
    full_precision,
    is_capturing,
    may_wait,
    project_horizontal,
    refuse_capture,
    with_determinant,
)
from stiefel.manifold.geometry import tangent_gradient_
from stiefel.optim.bases import momentum_of
from stiefel.optim.buckets import dense, laid_out_as, stack, unstack
from stiefel.optim.divergence import raise_later
from stiefel.optim.ownership import quoted


@dataclass(frozen=True)
class Member:
    """A parameter that a method moves, its lr, and whether its base gets the tangent gradient and is additive."""

    parameter: Tensor
    binding: Binding
    lr: float
    tangent: bool
    additive: bool


class Gradients:
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


class Batch:
    """The weights of a bucket as they were before the base step, and their method's step from there."""

    def __init__(self, members: Sequence[Member], weights: Sequence[Tensor]) -> None:
        self.bindings = [m.binding for m in members]
        self.lr, self.tangent, self.additive = members[0].lr, members[0].tangent, members[0].additive
        self.layouts = [b.layout for b in self.bindings]
        self.before = stack(self.layouts, weights, scaled=False, copy=True)
        self.shortened: Tensor | None = None
        self.finite: Tensor | None = None
        self.path: tuple[Tensor, Tensor] | None = None

    def tangents(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """The tangent part of each gradient."""
        scale = self.layouts[0].scale
        with full_precision(self.before.device):
            x = self.before / scale if scale != 1 else self.before
            # Copied, because the tangent part is computed in place and the user's gradients must stay.
            batch = stack(self.layouts, gradients, scaled=False, copy=True)
            tangents = tangent_gradient_(x, batch, horizontal=self.bindings[0].constraint.subspace)
            return unstack(self.layouts, tangents, scaled=False)

    def moved(self, ends: Sequence[Tensor]) -> list[Tensor]:
        """The weights after the method's step.

        Args:
            ends: where the base step has taken the weights; from 0 where the base is additive, so that it is U itself.
        """
        scale = self.layouts[0].scale
        with full_precision(self.before.device):
            displacement = stack(self.layouts, ends, scaled=False, copy=True)
            if not self.additive:
                displacement.sub_(self.before)
            displacement = self._finite(displacement, 0)
            before = self.before
            if scale != 1:
                before, displacement = before / scale, displacement.div_(scale)
            method = self.bindings[0].constraint
            if method.subspace:
                displacement = project_horizontal(before, displacement)
            x, self.shortened = _moved(self.bindings[0], before, displacement, self.lr)
            sign = method.determinant
            if sign is not None:  # a long step may have changed it
                x = with_determinant(x, before + displacement, sign)
            x = self._finite(x, before)  # it may overflow, or a penalty be too strong
            if isinstance(method, TransportMethod):
                self.path = before, x
        if self.finite is not None and not is_capturing(self.finite):  # the replays of a graph tell nobody
            raise_later(self.finite, self._divergence)
        return unstack(self.layouts, x, scaled=True)

    def transported(self, momenta: Sequence[Tensor | None]) -> list[Tensor]:
        """Each weight's momentum at the point that the weight has moved to; 0 where it has none."""
        method = self.bindings[0].constraint
        assert isinstance(method, TransportMethod)
        assert self.path is not None
        # Of weights in one batch some may have none, in a group with other settings.
        given = [
            self.before.new_zeros(layout.shape) if m is None else m.to(self.before)
            for m, layout in zip(momenta, self.layouts, strict=True)
        ]
        with full_precision(self.before.device):
            moved = method.transport(*self.path, stack(self.layouts, given, scaled=False))
            if method.subspace:
                moved = project_horizontal(self.path[1], moved)
        return unstack(self.layouts, moved, scaled=False)

    def old(self) -> list[Tensor]:
        """The weights before the step."""
        return unstack(self.layouts, self.before, scaled=False)

    def count(self) -> None:
        """Note for each weight whether its step was shortened."""
        for binding, flag in zip(self.bindings, self.shortened_steps(), strict=False):
            note(binding, flag)

    def shortened_steps(self) -> Sequence[Tensor | bool]:
        """Whether each weight's step was shortened; none where the method shortens none."""
        if self.shortened is None:
            return []
        counts = [layout.matrix_shape[0] for layout in self.layouts]
        if not may_wait(self.shortened):  # stays on the GPU, and is read when the tally is
            return [flag.any() for flag in self.shortened.split(counts)]
        each = iter(self.shortened.tolist())
        return [any(list(islice(each, count))) for count in counts]

    def _finite(self, value: Tensor, otherwise: Tensor | float) -> Tensor:
        """The value if finite, else an error: on a CPU now; on a GPU later, with ``otherwise`` in its place."""
        finite = are_finite(value.sum())  # a NaN or an infinity anywhere shows in the sum
        if not may_wait(value):
            self.finite = finite if self.finite is None else self.finite & finite
            return torch.where(finite, value, otherwise)
        if not finite and not value.isfinite().all():  # a sum of finite entries may overflow
            raise DivergenceError(self._divergence())
        return value

    def _divergence(self) -> str:
        return (
            f"the optimizer's step of weight {quoted(b.label for b in self.bindings)} is NaN or infinite. "
            "It was not taken, and the weight has the value from before the step; lower the learning rate"
        )


def write_momenta(momenta: Sequence[Tensor | None], values: Sequence[Tensor]) -> None:
    """Write momenta into the optimizer's own tensors: the replays of a captured step read those again."""
    pairs = [(m, value) for m, value in zip(momenta, values, strict=True) if m is not None]
    copy_all_([m for m, _ in pairs], [value for _, value in pairs])


def note(binding: Binding, shortened: Tensor | bool) -> None:
    """Count a step that was shortened, or was not."""
    tally = binding.tally
    tally.shortened = shortened + (0 if tally.shortened is None else tally.shortened)


class Move:
    """The step of whole weights."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.parameters = [m.parameter for m in members]
        self.batch = Batch(members, self.parameters)

    def hand_over_gradients(self, handed: Gradients) -> None:
        """Give the base optimizer the tangent part of each gradient, where the method wants that."""
        if not self.batch.tangent:
            return
        given = [g for p in self.parameters if (g := p.grad) is not None]
        tangents = self.batch.tangents(list(map(dense, given)))
        for p, gradient, tangent in zip(self.parameters, given, tangents, strict=True):
            handed.replace(p, laid_out_as(tangent, gradient))

    def free(self) -> None:
        """Let an additive base step from 0: a displacement much smaller than the weight keeps all its digits."""
        if self.batch.additive:
            zero_all_(self.parameters)

    def finish(self) -> None:
        """Let the method move the weights from their old values by the base step's displacement."""
        copy_all_(self.parameters, self.batch.moved(self.parameters))

    def transport(self, states: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Carry along the momenta in the base optimizer's states, where the method does that."""
        if self.batch.path is None:
            return
        momenta = [momentum_of(states.get(p, {}), p) for p in self.parameters]
        if any(m is not None for m in momenta):
            write_momenta(momenta, self.batch.transported(momenta))

    def count(self) -> None:
        """Note for each weight whether its step was shortened."""
        self.batch.count()

    def undo(self) -> None:
        """Put the weights back."""
        copy_all_(self.parameters, self.batch.old())


def moves_together(member: Member) -> Hashable:
    """What weights have in common that one batch steps."""
    p, binding = member.parameter, member.binding
    method, layout = binding.constraint, binding.layout
    penalty = isinstance(method, Penalty)  # may depend on what the kernel does (its stride)
    more = layout if penalty else layout.matrix_shape[1:]
    taken = binding.tally.steps if penalty or getattr(method, "counts", False) else None
    return id(method), more, taken, p.dtype, p.device, member.lr, member.tangent, member.additive


def _moved(binding: Binding, x: Tensor, displacement: Tensor, lr: float) -> tuple[Tensor, Tensor | None]:
    """The method's step from X, and which matrices' steps it shortened; None for a method that shortens none."""
    method = binding.constraint
    if isinstance(method, Penalty):
        if method.scheduled:
            refuse_capture(x, f"the strength of '{method.name}'")
        return method.step(x, displacement, lr * method.strength_at(binding.tally.steps), binding.layout), None
    assert isinstance(method, StepMethod)
    count: dict[str, Any] = {}
    if method.counts:
        refuse_capture(x, f"the step of '{method.name}'")
        count["taken"] = binding.tally.steps
    result = method.step(x, displacement, lr, **count)
    return result if isinstance(result, tuple) else (result, None)
