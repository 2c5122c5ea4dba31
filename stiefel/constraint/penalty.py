"""Penalties: methods that act in the loss, or, decoupled, in the step. Imports ``base``, ``options``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from stiefel.constraint.base import Constraint
from stiefel.constraint.options import is_number
from stiefel.errors import OptionError
from stiefel.layout import Layout

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

Schedule = float | Callable[[int], float]


@dataclass(frozen=True, kw_only=True)
class Penalized(Constraint):
    """Has a term in the loss, ``strength · s² Φ(W/s)``: of the weight, or of the proxy that it is computed from.

    Args:
        strength: λ ≥ 0, or a callable of the number of optimizer steps taken so far.
    """

    strength: Schedule = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.strength) and not (is_number(self.strength) and self.strength >= 0):
            raise OptionError(
                f"strength={self.strength!r}: expected a number ≥ 0, or a callable that takes the number of optimizer "
                "steps so far and returns one"
            )

    @property
    def scheduled(self) -> bool:
        """Whether the strength depends on the number of steps taken."""
        return callable(self.strength)

    def strength_at(self, step: int) -> float:
        """λ after ``step`` optimizer steps.

        Raises:
            OptionError: the schedule returned something else than a number ≥ 0.
        """
        if not callable(self.strength):
            return self.strength
        value = self.strength(step)
        if not (is_number(value) and value >= 0):
            raise OptionError(
                f"the callable given as strength of {self.name!r} returned at step {step} the value {value!r}: it must "
                "return a number ≥ 0"
            )
        return value

    @abstractmethod
    def penalty(self, x: Float[Tensor, "b p n"], layout: Layout) -> Float[Tensor, " b"]:
        """Φ of each matrix, before strength and scale; several weights of one layout may come as one batch."""


@dataclass(frozen=True, kw_only=True)
class Penalty(Penalized):
    """Acts in the loss: adds ``strength · s² Φ(W/s)``.

    Args:
        strength: λ ≥ 0, or a callable of the number of optimizer steps taken so far.
        decoupled: act in the step instead, ``X ← X + U − lr · strength · ∇Φ(X)``, out of reach of the base optimizer's
            momentum and second moments, as decoupled weight decay is. Under plain SGD both forms are the same.
    """

    decoupled: bool = False

    place = "loss"
    decay = "acts"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.decoupled, bool):
            raise OptionError(f"decoupled={self.decoupled!r}: expected True or False")

    @property
    def lifts(self) -> bool:
        """Whether the penalty is decoupled."""
        return self.decoupled

    def step(
        self, x: Float[Tensor, "b p n"], displacement: Float[Tensor, "b p n"], rate: float, layout: Layout
    ) -> Float[Tensor, "b p n"]:
        """The decoupled form: the base optimizer's step and a gradient step on Φ at X, ``rate = lr · strength``."""
        # Optimizers step without a graph: that of Φ needs gradients switched on.
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            # Matrices are independent: the gradient of the sum holds that of each.
            (gradient,) = torch.autograd.grad(self.penalty(leaf, layout).sum(), leaf)
        # No factor s: s² Φ(W/s) has the gradient s ∇Φ(X) at W, and a step of W is s times one of X.
        return x + displacement - rate * gradient
