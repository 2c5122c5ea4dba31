"""What a method is: a set of options, a nearest point, and one of the three places where it may act.

    forward:  weight = method(parameter)         Reparameterization
    loss:     loss + method(weight)              Penalty
    step:     weight ← method(weight, update)    StepMethod, ManifoldMethod (performed by geoopt)

A method is a frozen dataclass, its fields are its options, and it sees batches ``(b, p, n)`` with orthonormal rows.
Scale, groups, shapes and modules are handled elsewhere, once. Imports ``layout``, ``linalg`` and the errors.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from stiefel.errors import LayoutError, OptionError
from stiefel.layout import Layout
from stiefel.linalg import nearest_orthonormal

if TYPE_CHECKING:
    import geoopt
    from jaxtyping import Float

Schedule = float | Callable[[int], float]

RELU_SCALE = math.sqrt(2.0)


def is_number(value: object) -> bool:
    """Whether an option's value is a finite real number (and not True or False)."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, kw_only=True)
class Constraint(ABC):
    """A way to keep a weight on, or near, ``{W : W Wᵀ = scale² I}``.

    Every method has these two options; a method's own are the fields it adds.

    Args:
        scale: s of the set, a positive number, ``"relu"`` (√2, which keeps activations alive through ReLU layers), or
            ``"learnable"`` (one factor per output, start 1; reparameterizations with orthonormal rows only).
        group_size: orthonormal rows within groups of that many outputs, instead of over all outputs.
    """

    scale: float | str = 1.0
    group_size: int | None = None

    name: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str]
    place: ClassVar[str]
    feasible: ClassVar[bool] = False
    """Whether the weight is on the set, to rounding, after every step."""
    can_learn_scale: ClassVar[bool] = False
    comparison: ClassVar[Mapping[str, Any]] = {}
    """Options that a comparison sets unless told otherwise, so that all methods optimize over the same set."""

    def __post_init__(self) -> None:
        if isinstance(self.scale, str):
            if self.scale not in ("relu", "learnable"):
                raise OptionError(f"scale={self.scale!r}: expected a positive number, 'relu' or 'learnable'")
            if self.scale == "learnable" and not self.can_learn_scale:
                raise OptionError(
                    f"{self.name!r} cannot have scale='learnable': it would move the weight that the method holds in "
                    "place; use a number or 'relu', or a reparameterization"
                )
        elif not (is_number(self.scale) and self.scale > 0):
            raise OptionError(f"scale={self.scale!r}: expected a positive number, 'relu' or 'learnable'")
        size = self.group_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise OptionError(f"group_size={size!r}: expected a positive whole number or None")

    @property
    def fixed_scale(self) -> float:
        """The scale as a number: 1 where it is learnable, since the factors then multiply a matrix of scale 1."""
        if isinstance(self.scale, str):
            return RELU_SCALE if self.scale == "relu" else 1.0
        return float(self.scale)

    @property
    def coefficients(self) -> tuple[float, float] | None:
        """(a, b) of one small SGD step, ``ΔW = −lr [a skew(GXᵀ)X + b G(I − XᵀX)]``; None where it is not tangent."""
        return None

    def check(self, layout: Layout) -> None:
        """Raise :class:`LayoutError` where this method cannot hold a weight of that layout."""
        if self.scale == "learnable" and layout.columns:
            raise LayoutError(
                f"scale='learnable' needs orthonormal rows, and {layout} is column-orthonormal: a factor per output "
                "would break its columns; use a number, or group_size to constrain groups of rows"
            )

    def nearest(self, points: Float[Tensor, "b p n"], layout: Layout) -> Float[Tensor, "b p n"]:
        """The point of this method's set nearest to ``points``, where training starts: the polar factor."""
        return nearest_orthonormal(points)

    def __str__(self) -> str:
        changed = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{self.name}({', '.join(changed)})" if changed else self.name


class Control(Constraint):
    """Acts nowhere: an orthogonal start, then the base optimizer alone. What a comparison measures others by."""

    place = "none"


class Reparameterization(Constraint):
    """Acts in the forward pass: the weight is a function of a proxy parameter."""

    place = "forward"
    can_learn_scale = True

    @abstractmethod
    def forward(self, proxy: Float[Tensor, "b p n"], layout: Layout) -> Float[Tensor, "b p n"]:
        """The constrained matrix of a proxy."""


@dataclass(frozen=True, kw_only=True)
class Penalty(Constraint):
    """Acts in the loss: adds ``strength · s² Φ(W/s)``.

    Args:
        strength: λ ≥ 0, or a callable of the number of optimizer steps taken so far.
    """

    strength: Schedule = 0.1

    place = "loss"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.strength) and not (is_number(self.strength) and self.strength >= 0):
            raise OptionError(f"strength={self.strength!r}: expected a number ≥ 0 or a callable of the step")

    def strength_at(self, step: int) -> float:
        """λ after ``step`` optimizer steps.

        Raises:
            OptionError: the schedule returned something else than a number ≥ 0.
        """
        if not callable(self.strength):
            return self.strength
        value = self.strength(step)
        if not (is_number(value) and value >= 0):
            raise OptionError(f"the strength of {self.name!r} at step {step} is {value!r}: expected a number ≥ 0")
        return value

    @abstractmethod
    def penalty(self, x: Float[Tensor, "b p n"]) -> Float[Tensor, " b"]:
        """Φ of each matrix, before strength and scale."""


class StepMethod(Constraint):
    """Acts on the step of any dense first-order optimizer."""

    place = "step"

    @abstractmethod
    def step(
        self, x: Float[Tensor, "b p n"], displacement: Float[Tensor, "b p n"], lr: float
    ) -> Float[Tensor, "b p n"]:
        """The next point, given where the base optimizer would have moved: X + displacement."""


class ManifoldMethod(Constraint):
    """Acts on the step through geoopt: the weight becomes a ``geoopt.ManifoldParameter``."""

    place = "step"
    feasible = True

    @abstractmethod
    def manifold(self, layout: Layout) -> geoopt.Manifold:
        """The manifold of one weight, in the weight's own shape."""
