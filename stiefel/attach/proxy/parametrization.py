"""torch's parametrization of a weight by a method. Imports ``bucket``, ``compiled``, ``prefetched``, ``snapshot``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from stiefel.attach.proxy import compiled
from stiefel.attach.proxy.bucket import Bucket, Formula
from stiefel.attach.proxy.prefetched import prefetched_weight
from stiefel.attach.proxy.snapshot import Snapshot, can_be_watched
from stiefel.compat.sharding import whole, write
from stiefel.compat.torch_private import Convertible, is_in_onnx_export, version
from stiefel.constraint import Binding, Reparameterization
from stiefel.errors import StiefelError, WeightError
from stiefel.linalg import is_traced
from stiefel.optim import is_lent


class CachedWeight:
    """A weight computed without a graph, and a snapshot of the tensors that it was computed from."""

    def __init__(self, snapshot: Snapshot, weight: Tensor) -> None:
        self.snapshot, self.weight, self.version = snapshot, weight, version(weight)

    def holds_for(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the weight is still a function of these tensors, and was not edited itself."""
        return version(self.weight) == self.version and self.snapshot.holds_for(tensors)


class Reparametrized(Convertible):
    """torch's parametrization of a weight by a method: ``weight = gain · s · method(proxy / s)``.

    The proxy starts at s times the method's own start, so that one small step moves the weight as far at every scale.
    Other tensors that the method needs are in ``parts``.
    """

    cached: CachedWeight | None = None
    held: Tensor | None = None
    """What the layer uses instead of a function of the proxy, while a loss is minimized over the weight itself."""

    def __init__(self, binding: Binding, weight: Tensor, start: Tensor) -> None:
        super().__init__()
        self.binding = binding
        self.parts = nn.Module()
        self.gain: nn.Parameter | None = None
        if binding.constraint.scale == "learnable":
            b, p, _ = binding.layout.matrix_shape
            self.gain = nn.Parameter(torch.ones(b * p, dtype=weight.dtype.to_real(), device=weight.device))
        proxy, parts = self.started(start)
        self.names = tuple(parts)  # a replica of a module (DataParallel) has no dictionary of its parameters
        for name, part in parts.items():
            # A bucket concatenates the parts of several weights along that dimension.
            if not part.ndim or len(part) != binding.layout.matrix_shape[0]:
                raise StiefelError(
                    f"start() of {binding.constraint.name!r} returned {name!r} of shape {tuple(part.shape)}: its first "
                    f"dimension must be the number of matrices, here {binding.layout.matrix_shape[0]}"
                )
            if isinstance(part, nn.Parameter):
                self.parts.register_parameter(name, part)
            else:
                self.parts.register_buffer(name, part)
        self.formula = Formula(binding, self.names, self.gain is not None)
        self.text = compiled.text_of(self.formula)
        self.first: Tensor | None = proxy  # what right_inverse returns while torch registers the parametrization

    def forward(self, proxy: Tensor) -> Tensor:
        """The constrained weight of a proxy: one computed already where that is valid, a new one otherwise.

        Raises:
            WeightError: the model was converted to a precision in which no weight is orthogonal, or is on its way to
                ONNX.
        """
        if self.held is not None:
            return self.with_gain(self.held)
        tensors = self.tensors(proxy)
        if torch.compiler.is_exporting() and is_in_onnx_export():
            raise WeightError(
                f"weight '{self.binding.label}' is computed from a proxy, by operations that ONNX does not have, and "
                "that would be done at each inference; call stiefel.release(model), or on a copy, before the export"
            )
        # An exported program has to run where this library is not.
        if self.text is not None and torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            return compiled.weight_of(self.formula, self.text, tensors)
        if not is_traced():
            ready = self.ready(proxy)
            if ready is not None:
                return ready
            self.cached = None  # out of date, or of no use while gradients are recorded
            if not needs_graph(tensors) and not is_lent(proxy) and can_be_watched(tensors):
                return self._cache(tensors)
        return self._computed(tensors)

    def _computed(self, tensors: Sequence[Tensor]) -> Tensor:
        return Bucket([self.formula]).weights(tensors)[0]

    def _cache(self, tensors: Sequence[Tensor]) -> Tensor:
        snapshot = Snapshot(tensors, hold=True)  # before the weight: another thread may change the proxy meanwhile
        with torch.inference_mode(False), torch.no_grad():  # so that the weight has a version, and can be used anywhere
            weight = self._computed(tensors)
        self.cached = CachedWeight(snapshot, weight)
        return weight

    def ready(self, proxy: Tensor) -> Tensor | None:
        """The weight of a proxy where it is known already: prefetched in this pass, or cached."""
        if self.held is not None:
            return self.with_gain(self.held)
        tensors, cached = self.tensors(proxy), self.cached
        if needs_graph(tensors):
            return prefetched_weight(self, tensors)
        return cached.weight if cached is not None and cached.holds_for(tensors) else None

    def tensors(self, proxy: Tensor) -> tuple[Tensor, ...]:
        """The arguments of the weight: the proxy, a learnable gain, and the method's parts, in this order."""
        gains = () if self.gain is None else (self.gain,)
        return proxy, *gains, *(getattr(self.parts, name) for name in self.names)

    def train(self, mode: bool = True) -> Self:
        """Set the mode as every module does, and drop the cached weight."""
        self.cached = None
        return super().train(mode)

    def before_conversion(self) -> None:
        """Drop the cached weight before the tensors are moved or converted."""
        self.cached = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "cached"}

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> Tensor:
        """The proxy that an assigned weight starts from: that of the nearest point of the set."""
        if self.first is not None:
            return self.first
        layout, points = self.binding.layout, self.binding.layout.points(weight)
        proxy, parts = self.started(self.binding.constraint.closest(self.without_gains(points), layout))
        for name, part in parts.items():
            write(getattr(self.parts, name), part)
        return proxy

    @torch.no_grad()
    def entries(self, weight: Tensor, gain: Tensor | None = None) -> dict[str, Tensor]:
        """What a state dict has, below the tensor's name, where training starts from a weight.

        Args:
            weight: the whole weight.
            gain: the learnable factors that the weight has been multiplied by; default 1.
        """
        found: dict[str, Tensor] = {}
        layout, points = self.binding.layout, self.binding.layout.points(weight)
        if self.gain is not None:
            real = points.dtype.to_real()
            given = torch.ones(self.gain.shape) if gain is None else whole(gain)
            factors = given.to(points.device, real)
            found["0.gain"] = factors
            factors = factors.reshape(*points.shape[:2], 1)
            points = points / torch.where(factors == 0, 1, factors)
        proxy, parts = self.started(self.binding.constraint.closest(points, layout))
        return {"original": proxy, **found, **{f"0.parts.{name}": part for name, part in parts.items()}}

    def entry(self, name: str, proxy: Tensor) -> Tensor:
        """The tensor that a state dict has under a name of :meth:`entries`."""
        if name == "original":
            return proxy
        return self.gain if name == "0.gain" and self.gain is not None else getattr(self.parts, name.rpartition(".")[2])

    @torch.no_grad()
    def started(self, closest: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The proxy, in the weight's shape, and the parts that give a point of the set."""
        method, layout = self.binding.constraint, self.binding.layout
        assert isinstance(method, Reparameterization)
        proxy, parts = method.start(closest, layout)
        return layout.weight(proxy), parts

    def with_gain(self, weight: Tensor) -> Tensor:
        """A weight times each output's learnable factor, where there is one."""
        if self.gain is None:
            return weight
        layout = self.binding.layout
        matrices = layout.matrices(weight)
        return layout.tensor(matrices * whole(self.gain).reshape(*matrices.shape[:2], 1))

    def without_gains(self, points: Tensor) -> Tensor:
        """Points without each output's learnable factor, where there is one and it is not 0."""
        if self.gain is None:
            return points
        gain = whole(self.gain).reshape(*points.shape[:2], 1)
        return points / torch.where(gain == 0, 1, gain)


def needs_graph(tensors: Sequence[Tensor]) -> bool:
    """Whether autograd records what is computed from these tensors now."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
