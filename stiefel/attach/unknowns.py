"""A module's parameters as unknowns: each constrained weight itself, not its proxy. Imports ``weights``.

While a loss is minimized a weight that is computed from a proxy is a tensor of its own, which its layer uses as it is:
the gradient is the weight's, and no evaluation computes the map. At the end :meth:`Unknowns.keep` moves the proxy.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stiefel.attach.intact import refuse_waiting
from stiefel.attach.weights import ConstrainedWeight, constrained_weights
from stiefel.compat.sharding import is_sharded
from stiefel.constraint import Constraint
from stiefel.errors import ObjectiveError, OptionError, WeightError
from stiefel.layout import Layout
from stiefel.methods import available, get
from stiefel.optim.buckets import bucket, dense, stack, unstack
from stiefel.optim.solve.blocks import Free, Product, Stiefel, Vector


@dataclass(frozen=True)
class Held:
    """A constrained weight, and the tensor that its layer uses in its place."""

    weight: ConstrainedWeight
    leaf: Tensor


class Unknowns:
    """The parameters of a module that require a gradient.

    Args:
        module: with or without constraints.
        strict: refuse weights that a method keeps on no set; otherwise what is trained of them is free.

    Raises:
        OptionError: a weight's method keeps it on no set.
        WeightError: a parameter is sharded.
        ObjectiveError: nothing requires a gradient.
    """

    def __init__(self, module: nn.Module, *, strict: bool = True) -> None:
        refuse_waiting(module)
        weights = [w for w in constrained_weights(module) if w.parameter.requires_grad]
        weights = weights if strict else [w for w in weights if w.binding.constraint.claim is not None]
        for w in weights:
            _refuse(w)
        self.held = [_held(w) for w in weights]
        covered = {id(w.parameter) for w in weights}
        self.free: list[Tensor] = [p for p in module.parameters() if p.requires_grad and id(p) not in covered]
        if not self.held and not self.free:
            raise ObjectiveError("nothing to minimize over: no parameter of the module requires a gradient")
        if any(map(is_sharded, self.free)):
            raise WeightError("a parameter is sharded: minimize() works on whole models, in one process")
        self.groups = bucket(self.held, _stacked_together)
        self.sets = Product([*map(_set_of, self.groups), *(Free() for _ in self.free)])
        self.leaves = [h.leaf for g in self.groups for h in g] + self.free

    def read(self) -> Vector:
        """Where the parameters are."""
        stacked = [stack(_layouts(g), [h.leaf.detach() for h in g], scaled=False, copy=True) for g in self.groups]
        return [*stacked, *(p.detach().clone() for p in self.free)]

    @torch.no_grad()
    def place(self, point: Vector) -> None:
        """Put the parameters there."""
        for group, matrices in zip(self.groups, point, strict=False):
            for h, value in zip(group, unstack(_layouts(group), matrices, scaled=False), strict=True):
                h.leaf.copy_(value)
        for p, value in zip(self.free, point[len(self.groups) :], strict=True):
            p.copy_(value)

    def gradients(self, loss: Tensor, *, twice: bool = False) -> Vector:
        """The loss's gradient, stacked as the point is.

        Raises:
            ObjectiveError: the loss depends on no parameter.
        """
        if not loss.requires_grad:
            raise ObjectiveError(
                "the loss depends on no parameter that requires a gradient: it was computed from detached tensors, "
                "under no_grad, or from copies of the weights made outside of the function"
            )
        found = torch.autograd.grad(loss, self.leaves, allow_unused=True, create_graph=twice)
        if all(g is None for g in found):
            raise ObjectiveError(
                "the loss depends on none of the module's parameters: compute it from the module's weights inside the "
                "function, which is called anew at each point"
            )
        return self.stacked([torch.zeros_like(p) if g is None else g for g, p in zip(found, self.leaves, strict=True)])

    def stacked(self, tensors: list[Tensor]) -> Vector:
        """Tensors of the leaves' shapes as a vector."""
        each = iter(tensors)
        stacked = [stack(_layouts(g), [_resolved(next(each)) for _ in g], scaled=False) for g in self.groups]
        return [*stacked, *map(_resolved, each)]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let layers use the leaves."""
        proxied = [(h.weight.parametrization, h.leaf) for h in self.held if h.weight.parametrization is not None]
        try:
            for parametrization, leaf in proxied:
                parametrization.held = leaf
            yield
        finally:
            for parametrization, _ in proxied:
                parametrization.held = None

    @torch.no_grad()
    def keep(self) -> None:
        """Give proxies the values of their weights."""
        for h in self.held:
            if h.weight.parametrization is not None:
                setattr(h.weight.owner, h.weight.tensor, h.weight.parametrization.with_gain(h.leaf))


def _held(w: ConstrainedWeight) -> Held:
    if w.parametrization is None:
        return Held(w, w.parameter)
    # Without the gain, which is an unknown of its own.
    with torch.no_grad():
        leaf = w.binding.layout.weight(w.points()).detach().clone()
    return Held(w, leaf.requires_grad_())


def _refuse(w: ConstrainedWeight) -> None:
    method = w.binding.constraint
    if method.claim is None:
        exact = [name for name in available() if get(name).feasible]
        raise OptionError(
            f"weight '{w.name}' is held by {method.name!r}, which keeps it on no set to minimize over; constrain it by "
            f"one of {', '.join(exact)}"
        )
    if is_sharded(w.parameter):
        raise WeightError(f"weight '{w.name}' is sharded: minimize() works on whole models, in one process")


def _set_of(group: list[Held]) -> Stiefel:
    method, layout = group[0].weight.binding.constraint, group[0].weight.binding.layout
    return Stiefel(layout.scale, lambda u: method.within(u, layout), method.subspace)


def _layouts(group: list[Held]) -> list[Layout]:
    return [h.weight.binding.layout for h in group]


def _stacked_together(h: Held) -> Hashable:
    method, layout = h.weight.binding.constraint, h.weight.binding.layout
    # A set of centred rows is another one, and depends on how the rows are read.
    space = None if type(method).within is Constraint.within else (method, layout.columns)
    return layout.matrix_shape[1:], layout.scale, space, method.subspace, h.leaf.dtype, h.leaf.device


def _resolved(gradient: Tensor) -> Tensor:
    return dense(gradient).resolve_conj()
