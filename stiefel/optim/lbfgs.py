"""torch's L-BFGS with weights that stay on their sets between the evaluations of a step, too.

    p ← nearest point of the set to p + t d,   g = the tangent part of the gradient

It sees tangent gradients, and each of its moves ends on the set. Its history is one of the flat space around: no vector
is transported. :func:`stiefel.minimize` is for those who want the minimum; this, for loops that are there already.

Imports ``moves``, ``ownership`` and below.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stiefel.constraint import Binding
from stiefel.linalg import full_precision
from stiefel.manifold.geometry import tangent_gradient_
from stiefel.optim.buckets import dense
from stiefel.optim.moves import Gradients
from stiefel.optim.ownership import Mark, marks, ownership, state_of


class HeldLBFGS(torch.optim.LBFGS):
    """``torch.optim.LBFGS`` for models with weights that a method moves."""

    holds = True  # what tells it from torch's own
    base = torch.optim.LBFGS

    def _gather_flat_grad(self) -> Tensor:
        handed = Gradients()
        for p, binding in self._held():
            if p.grad is not None:
                handed.replace(p, _tangent(p, binding))
        try:
            return super()._gather_flat_grad()
        finally:
            handed.restore()

    def _add_grad(self, step_size: float, update: Tensor) -> None:
        super()._add_grad(step_size, update)
        for p, binding in self._held():
            with full_precision(p.device):
                p.copy_(binding.nearest(p))
            binding.tally.left = state_of(p)

    def _set_param(self, params_data: list[Tensor]) -> None:
        super()._set_param(params_data)
        for p, binding in self._held():
            binding.tally.left = state_of(p)

    def _held(self) -> list[tuple[Tensor, Binding]]:
        known = [(p, ownership(p)) for p in self._params]
        return [(p, o.binding) for p, o in known if o is not None and not o.part and o.binding.constraint.moves]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # As a lifted class: marks are copied with the parameters. torch leaves out what is only here.
        rest = {"_params": self._params, "_numel_cache": self._numel_cache}
        return _rebuilt, (marks(self),), {**self.__getstate__(), **rest}


def _rebuilt(owned: list[Mark]) -> HeldLBFGS:
    return object.__new__(HeldLBFGS)


def _tangent(p: Tensor, binding: Binding) -> Tensor:
    layout, gradient = binding.layout, p.grad
    assert gradient is not None
    with full_precision(p.device):
        g = layout.matrices(dense(gradient))
        horizontal = binding.constraint.subspace
        return layout.tensor(tangent_gradient_(layout.points(p), g.resolve_conj().clone(), horizontal=horizontal))
