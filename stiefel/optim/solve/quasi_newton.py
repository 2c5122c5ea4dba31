"""L-BFGS on a product of Stiefel manifolds and free numbers. Imports ``objective``, ``search`` and ``blocks``."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from stiefel.linalg import widened
from stiefel.optim.solve.blocks import Vector, add, dot, flat, norm, scaled, unflat
from stiefel.optim.solve.objective import Objective, Point
from stiefel.optim.solve.search import Trial, search

BENDS = 1e-4
"""The least cosine between a step and the change of the gradient. Where they are nearly orthogonal the change is mostly
rounding, and a direction from such a pair far too long (a cautious update: Li and Fukushima 2001)."""


class QuasiNewton:
    """The inverse Hessian by the last pairs of steps and changes of the gradient (Nocedal 1980).

    Pairs are differences of points and of tangent gradients in the space of all matrices, and the direction that they
    give is projected onto the tangent space: no vector is transported, which would take two products a vector and step.

    Args:
        history: how many pairs are kept.
    """

    def __init__(self, history: int) -> None:
        self.pairs: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=history)

    def learn(self, step: Vector, change: Vector) -> None:
        """Keep a pair, where it says that the loss bends upwards."""
        s, y = flat(step), flat(change)
        curvature = inner(s, y)
        if curvature > BENDS * (inner(s, s) * inner(y, y)).sqrt():
            self.pairs.append((s, y, curvature))

    def direction(self, gradient: Vector) -> Vector:
        """``−H g``."""
        q, factors = flat(gradient), []
        for step, change, curvature in reversed(self.pairs):
            factors.append(inner(step, q) / curvature)
            q = torch.addcmul(q, change, -factors[-1].to(q.dtype))
        if self.pairs:
            _, change, curvature = self.pairs[-1]
            q = q * (curvature / inner(change, change)).to(q.dtype)
        for (step, change, curvature), factor in zip(self.pairs, reversed(factors), strict=True):
            q = torch.addcmul(q, step, (factor - inner(change, q) / curvature).to(q.dtype))
        return unflat(-q, gradient)


def inner(u: Tensor, v: Tensor) -> Tensor:
    """``⟨u, v⟩`` of two rows, summed as :func:`dot` does."""
    return torch.dot(widened(u), widened(v))


def quasi_newton(
    objective: Objective, start: Point, history: int, goes_on: Callable[[Point], bool]
) -> tuple[Point, str]:
    """Minimize by L-BFGS with a weak Wolfe search.

    Args:
        objective: the loss.
        start: where to begin.
        history: how many pairs of steps and gradients are kept.
        goes_on: called with each new point; False ends it.

    Returns:
        The last point, and why it ended; empty where ``goes_on`` said so, or evaluations ran out.
    """
    point, memory = start, QuasiNewton(history)
    going = goes_on(point)
    while going:
        direction = objective.sets.project(point.where, memory.direction(point.gradient))
        slope = float(dot(point.gradient, direction))
        if not slope < -1e-12 * norm(direction) * point.gradient_norm:
            memory.pairs.clear()  # no direction of descent: begin anew with the gradient
            direction, slope = scaled(point.gradient, -1), -(point.gradient_norm**2)
        # Without a pair a first trial is a rotation by a small angle, from which the search goes on; else the scale is
        # known.
        first = 1.0 if memory.pairs else min(1.0, 0.1 / point.gradient_norm)
        found = search(point, slope, first, point.rounding, _along(objective, point, direction))
        if found is None or norm(add(found.point.where, point.where, -1)) == 0:
            if objective.spent:
                return point, ""
            if not memory.pairs:
                return point, "no step lowers the loss by more than its rounding"
            memory.pairs.clear()
            continue
        new = found.point
        memory.learn(add(new.where, point.where, -1), add(new.gradient, point.gradient, -1))
        point, going = new, goes_on(new)
    return point, ""


def _along(objective: Objective, start: Point, direction: Vector) -> Callable[[float], Trial | None]:
    def at(length: float) -> Trial | None:
        point = objective.at(objective.sets.retract(start.where, scaled(direction, length)))
        if point is None:
            return None
        slope = float(dot(point.gradient, objective.sets.project(point.where, direction)))
        return Trial(length, point, slope)

    return at
