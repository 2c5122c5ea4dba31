"""The effective learning rate of a weight: a step's length relative to the projected step's. Imports ``attach``."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from stiefel.attach import ConstrainedWeight, constrained_weights, optimizer
from stiefel.measure.model.dependence import Loss, PlainCopy, Point, frozen_random_state


def effective_rates(model: nn.Module, loss: Loss) -> dict[str, float | None]:
    """How far one small plain SGD step takes each weight along its manifold, relative to the projected step.

    ``effective_rates(model, lambda model: F.cross_entropy(model(x), y))``

        rate = ‖P(ΔW)‖_F / (lr ‖P(G)‖_F),  lr → 0,

    with G = ∂L/∂W, P the projection onto the tangent space at the nearest orthogonal point, and ΔW what a step of
    torch.optim.SGD without momentum, through the method, does to the weight. The first-order step of a method with
    coefficients (a, b) has a rate between them (where they are 1, exactly 1), at the common start for all methods.
    A reparameterization ``W = φ(V)`` has ΔW = −lr J Jᵀ G with J = ∂φ/∂V, which depends on where the proxy V is. For a
    function of its direction alone, as the polar factor or v/‖v‖, the rate falls with the square of the proxy's norm.
    SGD's steps are orthogonal to V, so that norm only grows, and the effective learning rate decays by itself, layer by
    layer; measured alike for every method, the rate says by how much.

    It takes one gradient, of a copy of the model, and two steps of another copy in double precision, along G and −G.
    Half their difference is ΔW to second order, without what a step does at zero gradient (penalties, attraction).
    Random methods draw the same numbers in both. The model and the random state stay as they are.

    Args:
        model: with constrained weights. It must be one that can be copied.
        loss: of a model, on a batch.

    Returns:
        By the weights' names; None where the tangent gradient is zero or the weight is not trained, and for methods
        whose step length does not depend on the gradient's, which have no such rate.

    Source: for weight normalization, Salimans and Kingma, NeurIPS 2016, section 2.1 (the norm grows, the rate falls);
    van Laarhoven, *L2 Regularization versus Batch and Weight Normalization*, 2017 (1/‖v‖²).
    """
    weights = list(constrained_weights(model))
    points = [Point(weight) for weight in weights]
    plain = PlainCopy(model, points, loss)
    gradients = plain.gradients()
    del plain
    lengths = [torch.linalg.vector_norm(p.tangent(g)).item() for p, g in zip(points, gradients, strict=True)]
    steepest = max((n / p.norm / p.scale**2 for n, p in zip(lengths, points, strict=True)), default=0.0)
    rates: dict[str, float | None] = {weight.name: None for weight in weights}
    trained = [w.parameter.requires_grad and g is not None for w, g in zip(weights, gradients, strict=True)]
    if not (any(trained) and 0 < steepest < float("inf")):
        return rates
    directions = [g / steepest if g is not None and t else None for g, t in zip(gradients, trained, strict=True)]
    size = _difference(weights)  # relative length of the longest step; its rate is size / steepest
    downhill, uphill = (_after(model, directions, way * size) for way in (1.0, -1.0))
    for weight, point, length, one, other in zip(weights, points, lengths, downhill, uphill, strict=True):
        if length > 0 and weight.parameter.requires_grad and not weight.binding.constraint.step_length:
            moved = point.project(point.x, point.coordinates(one) - point.coordinates(other)) / 2
            projected = size / steepest * length / point.scale**2  # lr ‖P(G)‖ in X's coordinates
            rates[weight.name] = torch.linalg.vector_norm(moved).item() / projected
    return rates


def _difference(weights: Iterable[ConstrainedWeight]) -> float:
    """The best step of a central difference in units of a weight: the cube root of rounding.

    A copy in double precision leaves complex weights as they are.
    """
    kinds = {w.parameter.dtype if w.parameter.is_complex() else torch.float64 for w in weights}
    return max(torch.finfo(kind).eps for kind in kinds) ** (1 / 3)


def _after(model: nn.Module, directions: list[Tensor | None], size: float) -> list[Tensor]:
    """The weights after a plain SGD step of rate ``|size|`` down the given gradients, or up where it is negative."""
    # In double, because the difference of the two small steps loses digits.
    stepped = copy.deepcopy(model).double()
    weights = list(constrained_weights(stepped))
    sgd = optimizer(stepped, torch.optim.SGD, lr=abs(size))
    sgd.zero_grad()
    sign = 1.0 if size > 0 else -1.0
    with frozen_random_state(model), torch.enable_grad():
        terms = []
        for weight, direction in zip(weights, directions, strict=True):
            if direction is not None:
                # The loss Re⟨W, direction⟩ has this direction as its gradient at every W.
                now = _fresh(weight)
                terms.append((now * (sign * direction).to(now.dtype).conj()).real.sum())
        torch.stack([t.to(terms[0]) for t in terms]).sum().backward()
        sgd.step()
    with torch.no_grad():
        return [_fresh(weight).clone() for weight in weights]


def _fresh(weight: ConstrainedWeight) -> Tensor:
    """The weight computed now, also where torch caches parametrizations."""
    if weight.parametrization is not None:
        return weight.owner.parametrizations[weight.tensor]()  # type: ignore[index, operator]
    return weight.parameter
