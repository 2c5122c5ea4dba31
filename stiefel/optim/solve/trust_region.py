"""Newton steps by truncated conjugate gradients in a trust region. Imports ``objective``, ``blocks``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from stiefel.errors import ObjectiveError
from stiefel.optim.solve.blocks import Vector, add, dot, norm, scaled
from stiefel.optim.solve.objective import Objective, Point

ACCEPT, GOOD = 0.1, 0.75
"""Shares of the predicted fall: from the first on a step is taken, from the second on the region grows."""


class Parameters(Protocol):
    """What second derivatives are of."""

    leaves: list[Tensor]

    def place(self, point: Vector) -> None:
        """Put them at a point."""

    def gradients(self, loss: Tensor, *, twice: bool = False) -> Vector:
        """A loss's gradient as a vector; differentiable where ``twice``."""

    def stacked(self, tensors: list[Tensor]) -> Vector:
        """Tensors of the leaves' shapes as a vector."""


def trust_region(
    objective: Objective, parameters: Parameters, start: Point, goes_on: Callable[[Point], bool]
) -> tuple[Point, str]:
    """Minimize by Steihaug's truncated conjugate gradients; a product with the Hessian counts as an evaluation.

    Args:
        objective: the loss.
        parameters: for second derivatives.
        start: where to begin.
        goes_on: called with each new point; False ends it.

    Returns:
        The last point, and why it ended; empty where ``goes_on`` said so, or evaluations ran out.
    """
    point = start
    longest = objective.sets.size(point.where)
    radius = first = max(1.0, norm(point.where)) / 8
    going = goes_on(point)
    while going:
        hessian = _hessian(objective, parameters, point)
        step, predicted, at_boundary = _steihaug(objective, hessian, point, radius)
        length = norm(step)
        if length <= torch.finfo(torch.float64).eps * norm(point.where):
            return point, "no step lowers the loss by more than its rounding"
        new = objective.at(objective.sets.retract(point.where, step))
        if new is None and objective.spent:
            return point, ""
        # Where both falls are rounding, their ratio is: both are given the rounding of the loss.
        rounding = point.rounding
        ratio = -math.inf if new is None else (point.loss - new.loss + rounding) / (predicted + rounding)
        if ratio < 0.25:
            radius = length / 4
        elif ratio > GOOD and at_boundary:
            radius = min(2 * radius, longest)
        if new is not None and ratio > ACCEPT:
            point, going = new, goes_on(new)
        elif radius <= 1e-14 * first:
            return point, "no step lowers the loss by more than its rounding"
    return point, ""


def _hessian(objective: Objective, parameters: Parameters, point: Point) -> Callable[[Vector], Vector]:
    """``U ↦ P(∂²L[U] − sym(G Xᵀ) U / s)``, the Riemannian Hessian (Absil, Mahony and Sepulchre 2008, 5.3)."""
    parameters.place(point.where)
    objective.evaluations += 1
    with torch.enable_grad():
        value = objective.loss()
        gradient = parameters.gradients(value, twice=True)
    bent = [g for g in gradient if g.requires_grad]
    if not bent and objective.sets.flat:
        raise ObjectiveError(
            "second_order=True needs a loss that is differentiable twice, or weights on a set that bends; the gradient "
            "of this one is constant, or was computed by an operation without a second derivative"
        )

    def product(u: Vector) -> Vector:
        objective.evaluations += 1
        found: Sequence[Tensor | None] = [None] * len(parameters.leaves)
        with torch.enable_grad():
            if bent:
                terms = [(g * v.conj()).real.sum() for g, v in zip(gradient, u, strict=True) if g.requires_grad]
                total = sum(terms[1:], terms[0])
                found = torch.autograd.grad(total, parameters.leaves, retain_graph=True, allow_unused=True)
        second = [torch.zeros_like(p) if h is None else h for h, p in zip(found, parameters.leaves, strict=True)]
        with torch.no_grad():
            of_sets = objective.sets.curvature(point.where, point.raw, u)
            return objective.sets.project(point.where, add(parameters.stacked(second), of_sets))

    return product


def _steihaug(
    objective: Objective, hessian: Callable[[Vector], Vector], point: Point, radius: float
) -> tuple[Vector, float, bool]:
    """The quadratic model's minimizer, to a precision that suffices, or where the path leaves the region.

    Returns:
        The step, the fall that the model predicts, and whether it ends at the region's boundary.
    """
    g = point.gradient
    step = [torch.zeros_like(v) for v in g]
    residual, direction = g, scaled(g, -1)
    image = step  # of the step under the Hessian
    square = float(dot(residual, residual))
    # Superlinear: the smaller the gradient, the more digits of the Newton step.
    enough = math.sqrt(square) * min(0.1, math.sqrt(math.sqrt(square)))
    for _ in range(sum(v.numel() for v in g)):
        product = hessian(direction)
        bend = float(dot(direction, product))
        reach = _to_boundary(step, direction, radius)
        length = square / bend if bend > 0 else math.inf
        if length >= reach:
            step, image = add(step, direction, reach), add(image, product, reach)
            return step, _fall(g, step, image), True
        step, image = add(step, direction, length), add(image, product, length)
        residual = objective.sets.project(point.where, add(residual, product, length))
        previous, square = square, float(dot(residual, residual))
        if math.sqrt(square) <= enough or objective.spent:
            break
        direction = add(scaled(residual, -1), direction, square / previous)
    return step, _fall(g, step, image), False


def _fall(gradient: Vector, step: Vector, image: Vector) -> float:
    return -float(dot(gradient, step)) - float(dot(step, image)) / 2


def _to_boundary(step: Vector, direction: Vector, radius: float) -> float:
    """t > 0 with ‖step + t · direction‖ = radius."""
    a, b = float(dot(direction, direction)), float(dot(step, direction))
    c = radius**2 - float(dot(step, step))
    return (math.sqrt(max(b * b + a * c, 0.0)) - b) / a if a > 0 else math.inf
