"""What a constrained module carries: which method holds which of its tensors, and how. Imports ``constraint``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stiefel.attach.deposits import deposited
from stiefel.attach.snapshot import Snapshot, can_be_watched
from stiefel.compat.torch_private import Convertible, parameters_of, submodules_of, version
from stiefel.constraint import Constraint, Reparameterization
from stiefel.errors import DivergenceError, StiefelError, WeightError
from stiefel.layout import Layout
from stiefel.linalg import EXACT_DTYPES, full_precision, gram_residual, in_double, is_traced
from stiefel.optim import Mark, Tally
from stiefel.optim.buckets import stack, unstack

_ATTRIBUTE = "_stiefel"


@dataclass
class Binding:
    """One method on one tensor of one module. It holds no reference to the module, which copies freely.

    Args:
        constraint: the method with its options.
        layout: how the tensor is read.
        label: the tensor's name when it was constrained, for messages.
        position: the tensor's place among its module's parameters, which a reparameterization gives up and release
            restores, so that the order of ``parameters()`` is the plain module's again.
        tally: optimizer steps taken, and how many of them were shortened.
        marks: what lets optimizers know the parameters that the tensor is made of, in copies of the module too.
    """

    constraint: Constraint
    layout: Layout
    label: str
    position: int = 0
    tally: Tally = field(default_factory=Tally)
    marks: list[Mark] = field(default_factory=list, repr=False, compare=False)

    @torch.no_grad()
    def nearest(self, weight: Tensor) -> Tensor:
        """The weight of the method's set nearest to a given one."""
        return self.layout.weight(self.constraint.nearest(self.layout.points(weight), self.layout))


class Kept:
    """A weight computed where nothing needed its graph, and what it was computed from."""

    def __init__(self, snapshot: Snapshot, weight: Tensor) -> None:
        self.snapshot, self.weight, self.version = snapshot, weight, version(weight)

    def holds_for(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the weight is still a function of these tensors, and was not edited itself."""
        return version(self.weight) == self.version and self.snapshot.holds_for(tensors)


class Reparametrized(Convertible):
    """torch's parametrization of a weight by a method: ``weight = gain · s · method(proxy / s)``.

    The proxy starts at s times the method's own start, so that one small step moves the weight as far at every scale.
    What else the method needs beside the proxy is in ``parts``.
    """

    kept: Kept | None = None

    def __init__(self, binding: Binding, weight: Tensor) -> None:
        super().__init__()
        self.binding = binding
        self.parts = nn.Module()
        self.gain: nn.Parameter | None = None
        if binding.constraint.scale == "learnable":
            b, p, _ = binding.layout.matrix_shape
            self.gain = nn.Parameter(torch.ones(b * p, dtype=weight.dtype.to_real(), device=weight.device))
        proxy, parts = self._start(weight)
        self.names = tuple(parts)  # a replica of a module (DataParallel) has no dictionary of its parameters
        for name, part in parts.items():
            if not part.ndim or len(part) != binding.layout.matrix_shape[0]:
                raise StiefelError(
                    f"{binding.constraint.name!r} starts with {name!r} of shape {tuple(part.shape)}: its first "
                    f"dimension must be that of the batch of matrices, here {binding.layout.matrix_shape[0]}"
                )
            if isinstance(part, nn.Parameter):
                self.parts.register_parameter(name, part)
            else:
                self.parts.register_buffer(name, part)
        self.first: Tensor | None = proxy  # what right_inverse returns while torch registers the parametrization

    def forward(self, proxy: Tensor) -> Tensor:
        """The constrained weight of a proxy: one computed already where that is valid, a new one otherwise.

        Raises:
            WeightError: the model was converted to a precision in which no weight is orthogonal.
        """
        tensors = self.tensors(proxy)
        if not is_traced():
            ready = self.ready(proxy)
            if ready is not None:
                return ready
            self.kept = None
            if not needs_graph(tensors) and can_be_watched(tensors):
                return self._keep(tensors)
        return self._computed(tensors)

    def _computed(self, tensors: Sequence[Tensor]) -> Tensor:
        return Bucket([self]).weights(tensors)[0]

    def _keep(self, tensors: Sequence[Tensor]) -> Tensor:
        snapshot = Snapshot(tensors, hold=True)  # before the weight: another thread may change the proxy meanwhile
        with torch.inference_mode(False), torch.no_grad():  # so that the weight has a version, and can be used anywhere
            weight = self._computed(tensors)
        self.kept = Kept(snapshot, weight)
        return weight

    def ready(self, proxy: Tensor) -> Tensor | None:
        """The weight of a proxy where it need not be computed: this pass has done so, or it was kept from before."""
        tensors, kept = self.tensors(proxy), self.kept
        if needs_graph(tensors):
            return deposited(self, tensors)
        return kept.weight if kept is not None and kept.holds_for(tensors) else None

    def tensors(self, proxy: Tensor) -> tuple[Tensor, ...]:
        """What the weight is a function of: the proxy, a learnable gain, and the method's parts, in this order."""
        gains = () if self.gain is None else (self.gain,)
        return proxy, *gains, *(getattr(self.parts, name) for name in self.names)

    def train(self, mode: bool = True) -> Self:
        """As for every module; a weight kept from before is computed anew."""
        self.kept = None
        return super().train(mode)

    def before_conversion(self) -> None:
        """As for :meth:`train`."""
        self.kept = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "kept"}

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

    def without_gains(self, points: Tensor) -> Tensor:
        """Points without each output's learnable factor, where there is one and it is not 0."""
        if self.gain is None:
            return points
        gain = self.gain.reshape(*points.shape[:2], 1)
        return points / torch.where(gain == 0, 1, gain)


def needs_graph(tensors: Sequence[Tensor]) -> bool:
    """Whether what is computed from these tensors here and now is to be differentiated."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


class Bucket:
    """Parametrizations by one method and of one layout, whose weights are computed as one batch.

    Args:
        parametrizations: one or more, with equally many tensors each.
    """

    def __init__(self, parametrizations: Sequence[Reparametrized]) -> None:
        self.parametrizations, self.first = parametrizations, parametrizations[0]
        self.layouts = [p.binding.layout for p in parametrizations]

    def stack(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What :meth:`Reparametrized.tensors` gives for each, one after the other, as one tensor per kind.

        Raises:
            WeightError: the model was converted to a precision in which no weight is orthogonal.
        """
        width = len(tensors) // len(self.parametrizations)
        proxies, *others = [tensors[i::width] for i in range(width)]
        for p, proxy in zip(self.parametrizations, proxies, strict=True):
            if proxy.dtype not in EXACT_DTYPES:
                raise WeightError(
                    f"weight '{p.binding.label}' is {proxy.dtype}, in which it cannot be orthogonal; keep the "
                    "model in float32 and use torch.autocast, or stiefel.release(model) before converting it"
                )
        return [
            stack(self.layouts, proxies, scaled=True),
            *(o[0] if len(o) == 1 else torch.cat(list(o)) for o in others),
        ]

    def points(self, stacked: Sequence[Tensor]) -> Tensor:
        """The weights, in units of X but with their gains, as functions of the stacked tensors."""
        x = self.held(stacked)
        with full_precision(x.device):
            return x if self.first.gain is None else x * stacked[1].reshape(*x.shape[:2], 1)

    def held(self, stacked: Sequence[Tensor]) -> Tensor:
        """The same without gains: what the method holds on its set.

        Raises:
            DivergenceError: a proxy is beyond what can be factorized.
        """
        method, names = self.first.binding.constraint, self.first.names
        assert isinstance(method, Reparameterization)
        with full_precision(stacked[0].device):
            parts = dict(zip(names, stacked[len(stacked) - len(names) :], strict=True))
            try:
                return method.forward(stacked[0], self.layouts[0], **parts)
            except torch.linalg.LinAlgError as error:
                labels = ", ".join(f"'{p.binding.label}'" for p in self.parametrizations)
                raise DivergenceError(
                    f"no weight can be computed from the proxy of {labels}: {error} Its entries are NaN, infinite or "
                    "too large; lower the learning rate"
                ) from error

    def weights(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """All in one: the weights in their own shapes."""
        return unstack(self.layouts, self.points(self.stack(tensors)), scaled=True)


@dataclass(frozen=True)
class ConstrainedWeight:
    """A constrained tensor found in a module: ``owner.tensor``, by its name from the module searched."""

    name: str
    owner: nn.Module
    tensor: str
    binding: Binding

    @property
    def value(self) -> Tensor:
        """The weight as the layer uses it, computed anew: what is measured and saved must not rest on a kept one."""
        if self.parametrization is not None:
            self.parametrization.kept = None
        return getattr(self.owner, self.tensor)

    @property
    def parametrization(self) -> Reparametrized | None:
        """What computes the weight from its proxy; None where nothing does."""
        if not isinstance(self.binding.constraint, Reparameterization):
            return None
        return self.owner.parametrizations[self.tensor][0]  # type: ignore[index, return-value]

    @property
    def parameter(self) -> nn.Parameter:
        """What the optimizer trains: the weight itself, or its proxy."""
        if parametrize.is_parametrized(self.owner, self.tensor):
            return self.owner.parametrizations[self.tensor].original  # type: ignore[index, union-attr]
        return getattr(self.owner, self.tensor)

    @property
    def gains(self) -> Tensor | None:
        """The learnable factors of its rows, ``(b, p, 1)``, where its scale is learnable: what points are without."""
        gain = None if self.parametrization is None else self.parametrization.gain
        return None if gain is None else gain.reshape(*self.binding.layout.matrix_shape[:2], 1)

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
        if self.parametrization is not None:
            setattr(self.owner, self.tensor, self.value)  # the proxy then starts from the nearest point
        else:
            self.parameter.copy_(self.binding.nearest(self.value))

    def points(self) -> Tensor:
        """The weight as ``(b, p, n)`` in units in which the constraint is X Xᵀ = I."""
        parametrization = self.parametrization
        if parametrization is None or parametrization.gain is None:
            return self.binding.layout.points(self.value)
        bucket = Bucket([parametrization])  # a value cannot be divided by a gain that has become 0
        return bucket.held(bucket.stack(parametrization.tensors(self.parameter)))


def first_parametrization(
    owner: nn.Module | None, tensor: str, *, only: bool = False
) -> tuple[nn.Module | None, Tensor | None]:
    """The first parametrization of ``owner.tensor`` and its proxy, past torch's containers, which take their time.

    Args:
        owner: the module; None gives None.
        tensor: the weight's name.
        only: none where there is a second one.
    """
    group: Any = None if owner is None else submodules_of(owner).get("parametrizations")
    listed = None if group is None else submodules_of(group).get(tensor)
    if listed is None or (only and len(submodules_of(listed)) > 1):
        return None, None
    # A replica of a module (DataParallel) has plain attributes instead of parameters.
    return submodules_of(listed).get("0"), parameters_of(listed).get("original", listed.__dict__.get("original"))


def add_quick_access(owner: nn.Module, tensor: str) -> None:
    """Put a short way to a weight that is ready before torch's property, which calls two modules at each access."""
    torchs = vars(type(owner))[tensor]

    def weight(self: nn.Module) -> Tensor:
        """The weight that is ready, or what torch's property gives."""
        if not is_traced():
            parametrization, proxy = first_parametrization(self, tensor, only=True)
            if parametrization is not None and proxy is not None:
                ready = parametrization.ready(proxy)  # type: ignore[operator]
                if ready is not None:
                    return ready
        return torchs.fget(self)

    setattr(type(owner), tensor, property(weight, torchs.fset))


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
