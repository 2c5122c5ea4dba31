"""How much weights on several manifolds depend on each other: how far a step of one turns another's gradient.

Imports ``attach`` and below.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stiefel.attach import ConstrainedWeight, constrained_weights, release
from stiefel.errors import OptionError
from stiefel.linalg import in_double, nearest_orthonormal
from stiefel.manifold.geometry import project_tangent
from stiefel.manifold.retractions import retract_polar
from stiefel.measure.cost.accelerator import is_accelerator

if TYPE_CHECKING:
    from jaxtyping import Float

Loss = Callable[[nn.Module], Tensor]
"""Takes a model like the one measured, calls it on a batch that is always the same, and returns the loss."""


@dataclass(frozen=True)
class Dependence:
    """How far a step of layer m turns the gradient of layer l, for each pair of layers.

    Let ξ_l = P_l(∂L/∂W_l) be the tangent part of layer l's gradient, and let W_m alone go along the manifold by
    ``ΔW_m ≈ −t ‖W_m‖ ξ_m/‖ξ_m‖``, which is t of its own length. Then

        turn[l, m] = ∠(ξ_l before, ξ_l after) / t  →  ‖W_m‖ ‖Q_l P_l H_lm ξ_m‖ / (‖ξ_l‖ ‖ξ_m‖)  for t → 0,

    in radians per relative length, with H_lm = ∂²L/∂W_l∂W_m the Hessian's block of both layers, and Q_l the projection
    that removes the part along ξ_l. On the diagonal P_l H_ll is the Riemannian Hessian, since ξ_l after the step is
    projected onto the tangent space before it: how a step changes the gradient that it follows. Off the diagonal are
    the terms ignored by methods that treat each manifold alone; 0 where L is a sum of functions of one layer each.

    Args:
        layers: names of the weights, in the model's order.
        turn: (L, L), row l and column m; NaN where ξ_l or ξ_m is zero.
        gradient: (L,), ‖ξ_m‖/‖W_m‖: a plain SGD step of rate lr is of relative length lr · gradient[m].
        length: t.
    """

    layers: tuple[str, ...]
    turn: Float[Tensor, "l l"]
    gradient: Float[Tensor, " l"]
    length: float

    def per_step(self, lr: float) -> Float[Tensor, "l l"]:
        """Radians by which a plain SGD step of layer m at this rate turns ξ_l, to first order."""
        return self.turn * (lr * self.gradient)

    def to_dict(self) -> dict[str, Any]:
        """Lists, for JSON."""
        return {
            "layers": list(self.layers),
            "turn": self.turn.tolist(),
            "gradient": self.gradient.tolist(),
            "length": self.length,
        }


def dependence(model: nn.Module, loss: Loss, *, length: float = 0.01, most: int | None = None) -> Dependence:
    """How far a small step of each constrained layer, by itself, turns the gradients of all constrained layers.

    ``dependence(model, lambda model: F.cross_entropy(model(x), y))``

    It takes one gradient for each layer and one more, of a copy: the model keeps its weights, gradients, statistics and
    mode (BatchNorm and dropout act as in that mode, with the same random numbers each time); the random state stays.
    For every method a step goes along the manifold through the nearest orthogonal point, even where the weights are
    off it, so that methods differ by where their weights are and not by how they step. Gradients have the
    model's precision: in float32 a turn below about 1e-4 is rounding at the default length.

    Args:
        model: with constrained weights. It must be one that can be copied.
        loss: of a model, on one batch.
        length: t, of a step, relative to the weight. Shorter steps come nearer to the Hessian; longer ones also see
            units that switch on and off.
        most: measure only so many layers, spread evenly over the model; default all.

    Raises:
        OptionError: ``length`` or ``most`` is not positive, or the loss is not a number that depends on a weight.

    Source: Santurkar, Tsipras, Ilyas and Mądry, *How Does Batch Normalization Help Optimization?*, NeurIPS 2018,
    definition 2.1 (a layer's gradient before and after the steps of those below it, by difference and by angle), here
    of tangent gradients, for each pair of layers and per length of the step. The blocks H_lm of different layers are
    those that layerwise methods leave out, as Martens and Grosse, ICML 2015, section 4. The Riemannian Hessian is by
    projection: Absil, Mahony and Sepulchre 2008, proposition 5.3.2. Dependent manifolds: Huang et al., AAAI 2018.
    """
    if not (length > 0 and math.isfinite(length)):
        raise OptionError(f"length={length!r}: expected a positive finite number, for example 0.01")
    if most is not None and most < 1:
        raise OptionError(f"most={most!r}: expected a number of layers of at least 1, or None for all")
    points = [Point(weight) for weight in _spread(list(constrained_weights(model)), most)]
    plain = PlainCopy(model, points, loss)
    before = plain.tangents()  # ξ_l of each layer l
    turn = torch.full((len(points), len(points)), math.nan, dtype=torch.float64)
    for m, (point, own) in enumerate(zip(points, before, strict=True)):
        norm = torch.linalg.vector_norm(own)
        if not norm > 0:
            continue  # column m stays NaN
        x = retract_polar(point.x, -length * point.norm / norm * own)
        with plain.moved(m, x):
            after = plain.tangents({m: x})
        # Onto the tangent space before the step, so that the diagonal is the Riemannian Hessian.
        after[m] = point.project(point.x, after[m])
        for n, (a, b) in enumerate(zip(before, after, strict=True)):
            turn[n, m] = _angle(a, b) / length
    gradient = [(torch.linalg.vector_norm(g) / p.norm / p.scale**2).item() for g, p in zip(before, points, strict=True)]
    layers = tuple(point.name for point in points)
    return Dependence(layers, turn, torch.tensor(gradient, dtype=torch.float64), length)


class Point:
    """A weight seen from the nearest point X of the Stiefel manifold: ``W = g s X + rest``, g factors of its rows.

    Vectors are in the coordinates of X, in double precision: there ``∂L/∂X = s g ∂L/∂W``, and a plain SGD step of
    ``s X`` at rate lr moves X by ``−lr ∂L/∂X / s²``.
    """

    @torch.no_grad()
    def __init__(self, weight: ConstrainedWeight) -> None:
        self.name, self.path, self.layout = weight.name, weight.path, weight.binding.layout
        self.scale, self.subspace = self.layout.scale, weight.binding.constraint.subspace
        points = in_double(weight.points())
        self.weight = weight.value.detach().clone()
        self.gains = None if weight.gains is None else in_double(weight.gains.detach()).clone()
        self.x = nearest_orthonormal(points)
        self.norm = torch.linalg.vector_norm(points).item()

    def project(self, x: Float[Tensor, "b p n"], u: Float[Tensor, "b p n"]) -> Float[Tensor, "b p n"]:
        """The tangent part of U at x; without what turns within the span, where only that matters."""
        return project_tangent(x, u, horizontal=self.subspace)

    def tangent(self, gradient: Tensor | None, x: Float[Tensor, "b p n"] | None = None) -> Float[Tensor, "b p n"]:
        """ξ = P(∂L/∂X) from ∂L/∂W, at X or another x; exactly 0 where that is rounding, or without a gradient."""
        x = self.x if x is None else x
        if gradient is None:
            return torch.zeros_like(x)
        # The chain rule of W = g s X
        found = self.scale * self.layout.matrices(in_double(gradient.detach()))
        found = found if self.gains is None else self.gains * found
        tangent = self.project(x, found)
        # The projection's rounding error in the gradient's precision: a tangent part below it has no direction.
        rounding = 4 * x.shape[-1] * torch.finfo(gradient.dtype).eps * torch.linalg.vector_norm(found)
        return torch.zeros_like(x) if torch.linalg.vector_norm(tangent) <= rounding else tangent

    def coordinates(self, weight: Tensor) -> Float[Tensor, "b p n"]:
        """A weight, or a displacement of it, without scale and factors."""
        found = self.layout.points(in_double(weight.detach()))
        return found if self.gains is None else found / self.gains

    def at(self, x: Float[Tensor, "b p n"]) -> Tensor:
        """The weight moved as the nearest point moves to x."""
        moved = x - self.x
        change = self.layout.weight(moved if self.gains is None else self.gains * moved)
        # The change is added to W rather than computed from x, so that the part off the set stays as it is.
        return (in_double(self.weight) + change).to(self.weight.dtype)


class PlainCopy:
    """A copy of a model with its constraints taken off, whose loss is differentiated with respect to the weights."""

    def __init__(self, model: nn.Module, points: Sequence[Point], loss: Loss) -> None:
        self.points, self.loss = points, loss
        # Released, a weight is a plain parameter: its gradient is ∂L/∂W, not that of a proxy.
        self.model = release(copy.deepcopy(model), whole=False).requires_grad_(False)
        self.weights = [self.model.get_parameter(point.path).requires_grad_() for point in points]

    def gradients(self) -> list[Tensor | None]:
        """∂L/∂W of each, None where the loss does not depend on it; from the current random state."""
        if not self.weights:
            return []
        # The same dropout masks in every call, or turns would be those of the noise.
        with frozen_random_state(self.model), torch.enable_grad():
            loss = self.loss(self.model)
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                came = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise OptionError(
                    f"loss(model) returned {came}; it has to return a tensor of one element that depends on the "
                    "weights of the model passed to it (a copy of yours), with requires_grad"
                )
            return list(torch.autograd.grad(loss.reshape(()), self.weights, allow_unused=True))

    def tangents(self, moved: dict[int, Tensor] | None = None) -> list[Float[Tensor, "b p n"]]:
        """ξ of each, at its point or the one that it has moved to."""
        to = moved or {}
        return [p.tangent(g, to.get(i)) for i, (p, g) in enumerate(zip(self.points, self.gradients(), strict=True))]

    @contextmanager
    def moved(self, index: int, x: Float[Tensor, "b p n"]) -> Iterator[None]:
        """While it is entered, one weight has moved as its nearest point moves to x."""
        parameter, before = self.weights[index], self.weights[index].detach().clone()
        with torch.no_grad():
            parameter.copy_(self.points[index].at(x))
        try:
            yield
        finally:
            with torch.no_grad():
                parameter.copy_(before)


def frozen_random_state(model: nn.Module) -> Any:
    """A context that leaves torch's generators, of the CPU and of the model's devices, as it finds them."""
    kinds: dict[str, set[int]] = {"cuda": set()}
    for p in model.parameters():
        if is_accelerator(p.device):
            kinds.setdefault(p.device.type, set()).add(p.device.index or 0)
    stack = ExitStack()
    for kind, devices in kinds.items():
        stack.enter_context(torch.random.fork_rng(devices=sorted(devices), device_type=kind))
    return stack


def _spread(weights: list[ConstrainedWeight], most: int | None) -> list[ConstrainedWeight]:
    if most is None or len(weights) <= most:
        return weights
    last = len(weights) - 1
    return [weights[round(i * last / max(1, most - 1))] for i in range(most)]


def _angle(a: Tensor, b: Tensor) -> float:
    """The angle between two tensors, NaN where one is zero: accurate also where it is small (Kahan)."""
    lengths = torch.linalg.vector_norm(a), torch.linalg.vector_norm(b)
    if not (lengths[0] > 0 and lengths[1] > 0):
        return math.nan
    # Not acos⟨a, b⟩, which has an error of √ε at small angles.
    a, b = a / lengths[0], b / lengths[1]
    return 2 * math.atan2(torch.linalg.vector_norm(a - b).item(), torch.linalg.vector_norm(a + b).item())
