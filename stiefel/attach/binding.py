"""What a constrained module carries: which method holds which of its tensors, and how. Imports ``constraint``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stiefel.constraint import Constraint, Reparameterization
from stiefel.errors import WeightError
from stiefel.layout import Layout
from stiefel.linalg import EXACT_DTYPES, full_precision, gram_residual, in_double
from stiefel.optim import Tally

_ATTRIBUTE = "_stiefel"


@dataclass
class Binding:
    """One method on one tensor of one module. It holds no reference to either, so that a module copies freely.

    Args:
        constraint: the method with its options.
        layout: how the tensor is read.
        label: the tensor's name when it was constrained, for messages.
        position: the tensor's place among its module's parameters, which a reparameterization gives up and release
            restores, so that the order of ``parameters()`` is the plain module's again.
        tally: optimizer steps taken, and how many of them were shortened.
    """

    constraint: Constraint
    layout: Layout
    label: str
    position: int = 0
    tally: Tally = field(default_factory=Tally)

    @torch.no_grad()
    def nearest(self, weight: Tensor) -> Tensor:
        """The weight of the method's set nearest to a given one."""
        return self.layout.weight(self.constraint.nearest(self.layout.points(weight), self.layout))


class Reparametrized(nn.Module):
    """torch's parametrization of a weight by a method: ``weight = gain · s · method(proxy / s)``.

    The proxy starts at s times the method's own start, so that one small step moves the weight as far at every scale.
    What else the method needs beside the proxy is in ``parts``.
    """

    def __init__(self, binding: Binding, weight: Tensor) -> None:
        super().__init__()
        self.binding = binding
        self.parts = nn.Module()
        self.gain: nn.Parameter | None = None
        if binding.constraint.scale == "learnable":
            b, p, _ = binding.layout.matrix_shape
            self.gain = nn.Parameter(torch.ones(b * p, dtype=weight.dtype.to_real(), device=weight.device))
        proxy, parts = self._start(weight)
        for name, part in parts.items():
            if isinstance(part, nn.Parameter):
                self.parts.register_parameter(name, part)
            else:
                self.parts.register_buffer(name, part)
        self.first: Tensor | None = proxy  # what right_inverse returns while torch registers the parametrization

    def forward(self, proxy: Tensor) -> Tensor:
        """The constrained weight of a proxy.

        Raises:
            WeightError: the model was converted to a precision in which no weight is orthogonal.
        """
        method, layout = self.binding.constraint, self.binding.layout
        assert isinstance(method, Reparameterization)
        if proxy.dtype not in EXACT_DTYPES:
            raise WeightError(
                f"weight '{self.binding.label}' is {proxy.dtype}, in which it cannot be orthogonal; keep the "
                "model in float32 and use torch.autocast, or stiefel.release(model) before converting it"
            )
        parts = {**self.parts._parameters, **self.parts._buffers}
        with full_precision(proxy.device):
            return layout.weight(self.gains(method.forward(layout.points(proxy), layout, **parts)))

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> Tensor:
        """The proxy that an assigned weight starts from: that of the nearest point of the set."""
        if self.first is not None:
            return self.first
        proxy, parts = self._start(weight)
        for name, part in parts.items():
            getattr(self.parts, name).copy_(part)
        return proxy

    @torch.no_grad()
    def _start(self, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        method, layout = self.binding.constraint, self.binding.layout
        assert isinstance(method, Reparameterization)
        proxy, parts = method.start(method.nearest(self.without_gains(layout.points(weight)), layout), layout)
        return layout.weight(proxy), parts

    def gains(self, points: Tensor) -> Tensor:
        """Multiply each output by its learnable factor, where there is one."""
        return points if self.gain is None else points * self.gain.reshape(*points.shape[:2], 1)

    def without_gains(self, points: Tensor) -> Tensor:
        """Inverse of :meth:`gains`."""
        return points if self.gain is None else points / self.gain.reshape(*points.shape[:2], 1)


@dataclass(frozen=True)
class ConstrainedWeight:
    """A constrained tensor found in a module: ``owner.tensor``, by its name from the module searched."""

    name: str
    owner: nn.Module
    tensor: str
    binding: Binding

    @property
    def value(self) -> Tensor:
        """The weight as the layer uses it."""
        return getattr(self.owner, self.tensor)

    @property
    def parameter(self) -> nn.Parameter:
        """What the optimizer trains: the weight itself, or its proxy."""
        if parametrize.is_parametrized(self.owner, self.tensor):
            return self.owner.parametrizations[self.tensor].original  # type: ignore[index, union-attr]
        return self.owner._parameters[self.tensor]  # type: ignore[return-value]

    @property
    def can_leave(self) -> bool:
        """Whether values written from outside can put the weight off its set: a proxy alone cannot."""
        if isinstance(self.binding.constraint, Reparameterization):
            return any(True for _ in self.owner.parametrizations[self.tensor].buffers())  # type: ignore[index, union-attr]
        return True

    @torch.no_grad()
    def residual(self) -> float:
        """``‖XXᵀ − I‖_F/√p``, the largest of the weight's matrices, in double precision."""
        x = in_double(self.points())
        return torch.linalg.matrix_norm(gram_residual(x)).max().item() / x.shape[-2] ** 0.5

    def allows(self, residual: float) -> bool:
        """Whether such a residual is within what the weight's method promises; true where it promises nothing."""
        claim, p = self.binding.constraint.claim, self.binding.layout.matrix_shape[1]
        return claim is None or claim.allows(residual, self.parameter.dtype, p)

    @torch.no_grad()
    def move_to_nearest(self) -> None:
        """Put the weight at the nearest point of its method's set."""
        if isinstance(self.binding.constraint, Reparameterization):
            setattr(self.owner, self.tensor, self.value)  # the proxy then starts from the nearest point
        else:
            self.parameter.copy_(self.binding.nearest(self.value))

    def points(self) -> Tensor:
        """The weight as ``(b, p, n)`` in units in which the constraint is X Xᵀ = I."""
        points = self.binding.layout.points(self.value)
        if isinstance(self.binding.constraint, Reparameterization):
            parametrization = self.owner.parametrizations[self.tensor][0]  # type: ignore[index]
            return parametrization.without_gains(points)  # type: ignore[union-attr]
        return points


def bindings_of(owner: nn.Module) -> dict[str, Binding]:
    """The bindings that this very module carries, by tensor name; empty where it carries none."""
    return owner.__dict__.get(_ATTRIBUTE, {})


def bind(owner: nn.Module, tensor: str, binding: Binding) -> None:
    """Record a binding on its module."""
    owner.__dict__.setdefault(_ATTRIBUTE, {})[tensor] = binding


def unbind(owner: nn.Module, tensor: str) -> None:
    """Remove a binding, and with the last one every trace of it."""
    del owner.__dict__[_ATTRIBUTE][tensor]
    if not owner.__dict__[_ATTRIBUTE]:
        del owner.__dict__[_ATTRIBUTE]


def constrained_weights(module: nn.Module, *, ties: bool = False) -> Iterator[ConstrainedWeight]:
    """All constrained weights of a module and its submodules, in the module's order.

    Args:
        module: where to look.
        ties: whether a parameter that several layers share comes once for each of them, or only once.
    """
    seen = set()
    for prefix, owner in module.named_modules():
        for tensor, binding in bindings_of(owner).items():
            found = ConstrainedWeight(f"{prefix}.{tensor}" if prefix else tensor, owner, tensor, binding)
            if ties or id(found.parameter) not in seen:
                seen.add(id(found.parameter))
                yield found
