"""The landing algorithm: no retraction, a field that pulls to the set, and a step that cannot leave its tube."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stiefel.constraint import Claim, StepMethod, is_number, register
from stiefel.errors import OptionError
from stiefel.linalg import balance, gram_residual, nearest_where

LONGEST = 1e6
"""Largest root mean square length of a displacement's rows, and largest μ; beyond it they are cut to it."""

NOISE = 8.0
"""Bound of ‖XΨᵀ + ΨXᵀ‖_F, all of it rounding, in epsilons of ‖U‖_F; up to 512×4608 it is at most 2.5."""


@register
@dataclass(frozen=True, kw_only=True)
class Landing(StepMethod):
    """``X ← X − t F``, ``F = Ψ + μ Δ X``, ``Ψ = −½(XXᵀU − XUᵀX)``, ``Δ = XXᵀ − I``, ``μ = lr · λ``, t ≤ 1 a safe step.

    With ``d = ‖Δ‖_F``, ``R = XΨᵀ + ΨXᵀ`` and 2tμ ≤ 1 the residual after the step is at most
    ``d − t (2μ d(1 − d) − ‖R‖_F) + t² ‖F‖_F²``, and t is the largest number up to 1 that keeps this bound at or below
    ε; outside the tube (d > ε), t minimizes the bound. R is 0 in exact arithmetic; without a bound for its rounding,
    that of a long Ψ would take float32 weights out of the tube. Where d ≥ 1 the weight is projected (on a GPU over
    several steps). Shortened steps are counted in the report.

    Args:
        attraction: λ > 0, the strength of the pull; not rescaled with the weight's scale.
        tube: ε, the largest ‖XXᵀ − I‖_F allowed, between 0 and 1.

    Source: Ablin and Peyré, AISTATS 2022; Ablin, Vary, Gao and Absil, JMLR 2024, for the Stiefel form. The bound is
    derived anew; the released safe step is not defined at a zero gradient or outside the tube.
    """

    attraction: float = 1.0
    tube: float = 0.5

    name = "landing"
    summary = "field towards the set and down the loss, with a safe step"
    reference = "Ablin & Peyré, AISTATS 2022; Ablin et al., JMLR 2024"
    shortens = True
    projects = True
    tuning: ClassVar = {"attraction": (0.1, 1.0, 10.0)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.attraction) and self.attraction > 0):
            raise OptionError(f"attraction={self.attraction!r}: expected a positive number")
        if not (is_number(self.tube) and 0 < self.tube < 1):
            raise OptionError(f"tube={self.tube!r}: expected a number between 0 and 1")

    @property
    def claim(self) -> Claim:  # type: ignore[override]
        """Inside the tube, at any rate."""
        return Claim(bound=self.tube)

    @property
    def coefficients(self) -> tuple[float, float]:
        """(1, ½): the relative gradient ½(G − XGᵀX)."""
        return (1.0, 0.5)

    def field(self, x: Tensor, displacement: Tensor, delta: Tensor, mu: float) -> Tensor:
        """F, (batch, p, n)."""
        # Ψ = −½(U + ΔU − (XUᵀ)X), and μΔX, in as few products as possible
        field = torch.baddbmm(displacement, x @ displacement.mH, x, beta=-0.5, alpha=0.5)
        return torch.baddbmm(field, delta, torch.add(displacement, x, alpha=-2 * mu), alpha=-0.5)

    def step(self, x: Tensor, displacement: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """The landing step, and which matrices' steps were shortened."""
        # Longer displacements would overflow the norms below in float32; t would end at the tube's wall all the same.
        size = balance(displacement)
        excess = (size / LONGEST).clamp_min(1)
        displacement = displacement / excess
        delta = gram_residual(x)
        d = torch.linalg.matrix_norm(delta)
        mu = min(lr * self.attraction, LONGEST)
        field = self.field(x, displacement, delta, mu)
        g = torch.linalg.matrix_norm(field).clamp_min(torch.finfo(d.dtype).tiny ** 0.5)
        r = NOISE * torch.finfo(d.dtype).eps * x.shape[-2] ** 0.5 * (size / excess).flatten()
        # The bound is d − 2bt + t²g²: ≤ ε up to the larger root, and least at t = b/g². The root is written so that
        # nothing cancels: where F is rounding, g² is nothing beside b.
        b = mu * d * (1 - d) - r / 2
        room = (self.tube - d).clamp_min(0)
        root = torch.hypot(b, g * room.sqrt())
        inside = torch.where(b < 0, room / (root - b), (b + root) / g / g)
        t = torch.where(d <= self.tube, inside, b.clamp_min(0) / g / g)
        # The bound holds for 2tμ ≤ 1 only.
        t = t.clamp(max=min(1.0, 0.5 / mu) if mu > 0 else 1.0)
        moved = torch.addcmul(x, t[..., None, None], field, value=-1)
        # From d = 1 on the pull 2μ d(1 − d) is not positive: by the bound no step reduces the residual.
        lost = d >= 1
        return nearest_where(lost, x, moved, d), (t < 1) | lost | (excess.flatten() > 1)
