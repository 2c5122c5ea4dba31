"""A loss as a function of where the parameters are: values, tangent gradients, and what is wrong with it.

Imports ``blocks`` and the errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stiefel.errors import DivergenceError, ObjectiveError
from stiefel.manifold.geometry import NOISE
from stiefel.optim.solve.blocks import Product, Vector, norm

ROUNDINGS = 10
"""Roundings of a loss by which two of its values may differ and still count as equal."""
REPEATED = 100
"""The same for two values at one point, of which the order of sums alone makes two."""


@dataclass(frozen=True)
class Point:
    """A point, with the loss and its gradient there.

    Args:
        where: the weights' matrices and the free numbers.
        loss: the value.
        raw: the gradient as autograd has it.
        gradient: its tangent part.
        gradient_norm: ‖gradient‖_F.
        noise: how large the tangent part of the rounding of ``raw`` may be.
        rounding: by how much another value may differ through rounding alone. A loss that falls to 0 by cancellation is
            rounded as its terms are, which show in the products of ``raw`` and the point.
    """

    where: Vector
    loss: float
    raw: Vector
    gradient: Vector
    gradient_norm: float
    noise: float
    rounding: float


class Objective:
    """A loss, and the sets that its arguments are on.

    Args:
        loss: computes the loss of what the parameters are now.
        sets: of the parameters.
        place: writes a point into the parameters.
        gradients: of a loss, by block.
        most: how many evaluations there may be.
    """

    def __init__(
        self,
        loss: Callable[[], Tensor],
        sets: Product,
        place: Callable[[Vector], None],
        gradients: Callable[[Tensor], Vector],
        most: int,
    ) -> None:
        self.loss, self.sets, self.place, self.gradients = loss, sets, place, gradients
        self.most, self.evaluations = most, 0

    @property
    def spent(self) -> bool:
        """Whether there may be no more evaluations."""
        return self.evaluations >= self.most

    def first(self, where: Vector) -> Point:
        """The start, where a loss must be a finite real number that has a gradient, and the same twice.

        Raises:
            ObjectiveError: it is not.
            DivergenceError: it is NaN or infinite.
        """
        point = self.evaluate(where)
        if not math.isfinite(point.loss) or not math.isfinite(point.gradient_norm):
            raise DivergenceError(
                f"the loss is {point.loss} and its gradient's norm {point.gradient_norm} at the start: there is "
                "nothing to go on from; start elsewhere, or mend the loss"
            )
        if self.spent:
            return point
        self.evaluations += 1
        with torch.enable_grad():  # it may itself differentiate
            loss = number(self.loss())
        again = float(loss.detach())
        if abs(again - point.loss) > REPEATED * torch.finfo(loss.dtype).eps * abs(point.loss):
            raise ObjectiveError(
                f"the loss was {point.loss:.9g}, and {again:.9g} at the same point: it is drawn at random, or changes "
                "with each call (dropout, a new batch, batch normalization in train()); minimize() needs a function "
                "of the parameters alone, and stiefel.optimizer() is for the others"
            )
        return point

    def at(self, where: Vector) -> Point | None:
        """The loss at a trial point; None where it is NaN or infinite, or where evaluations have run out."""
        if self.spent:
            return None
        point = self.evaluate(where)
        return point if math.isfinite(point.loss) and math.isfinite(point.gradient_norm) else None

    def evaluate(self, where: Vector) -> Point:
        """The loss and its gradient there, whatever they are."""
        self.place(where)
        self.evaluations += 1
        with torch.enable_grad():
            loss = number(self.loss())
            raw = self.gradients(loss)
        value = float(loss.detach())
        with torch.no_grad():
            gradient = self.sets.project(where, raw)
            slope = norm(raw)
        # A weight in float32 makes a loss of float32 accuracy, whatever computes it.
        epsilon = max(torch.finfo(t.dtype).eps for t in (loss, *where))
        # Rounding of each number by itself moves the loss by this.
        terms = norm([r * w for r, w in zip(raw, where, strict=True)])
        rounding = ROUNDINGS * epsilon * max(abs(value), terms)
        return Point(where, value, raw, gradient, norm(gradient), NOISE * epsilon * slope, rounding)


def number(loss: object) -> Tensor:
    """A loss as a scalar tensor.

    Raises:
        ObjectiveError: it is no tensor of one real number.
    """
    if not isinstance(loss, Tensor):
        raise ObjectiveError(
            f"the loss function returned {type(loss).__name__}: expected a tensor with one real number, computed from "
            "the module's parameters"
        )
    if loss.numel() != 1 or not loss.is_floating_point():
        raise ObjectiveError(
            f"the loss function returned a tensor of shape {tuple(loss.shape)} and dtype {loss.dtype}: expected one "
            "real number; sum it, or take its .real"
        )
    return loss.reshape(())
