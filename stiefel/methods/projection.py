"""Projection after each step: the simplest way to stay on the set, and no Riemannian method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from stiefel.constraint import Claim, StepMethod
from stiefel.linalg import nearest_in_step, qf
from stiefel.methods import register

MAPS = {"polar": nearest_in_step, "qr": qf}


@register
@dataclass(frozen=True, kw_only=True)
class Projection(StepMethod):
    """``X ← map(X + U)``: let the base optimizer step, then go to an orthonormal matrix.

    ``"polar"`` is the nearest one. ``"qr"`` is cheaper, and no projection: to first order it moves along
    ``G(I − XᵀX) + (U − Uᵀ)X``, U the strict upper triangle of GXᵀ, which can ascend. A long polar step can change the
    sign of a square weight's determinant.

    Args:
        map: ``"polar"`` or ``"qr"``.

    Source: Absil and Malick, Projection-like retractions on matrix manifolds, 2012, for polar; Huang et al., AAAI 2018,
    for qr (their QR baseline).
    """

    map: str = "polar"

    name = "projection"
    summary = "nearest orthonormal matrix (or QR factor) after each step"
    reference = "Absil & Malick, 2012"
    claim = Claim()
    tuning: ClassVar = {"map": tuple(MAPS)}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_one_of("map", MAPS)

    @property
    def coefficients(self) -> tuple[float, float] | None:
        """(1, 1) for polar; qr has no such form."""
        return (1.0, 1.0) if self.map == "polar" else None

    @property
    def caveat(self) -> str:  # type: ignore[override]
        """QR's."""
        return "" if self.map == "polar" else "its direction is not a gradient's: it stops where that has no use"

    def step(self, x: Tensor, displacement: Tensor, lr: float) -> Tensor:
        """The orthonormal matrix that belongs to where the optimizer would have gone."""
        return MAPS[self.map](x + displacement)
