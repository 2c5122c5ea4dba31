"""Projection after each step: the simplest way to stay on the set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from stiefel.constraint import Claim, StepMethod, register
from stiefel.linalg import nearest_in_step
from stiefel.manifold.geometry import project_tangent
from stiefel.manifold.retractions import retract_qr

MAPS = {
    "polar": lambda x, u: nearest_in_step(x + u),
    "qr": lambda x, u: retract_qr(x, project_tangent(x, u)),
}


@register
@dataclass(frozen=True, kw_only=True)
class Projection(StepMethod):
    """``X ← polar(X + U)``: let the base optimizer step, then go to the nearest orthonormal matrix.

    ``"qr"`` is the cheaper retraction ``qf(X + P_X(U))``, ``P_X(U) = U − sym(UXᵀ)X``. (The QR factor of X + U itself
    would not do: to first order it moves along ``G(I − XᵀX) + (T − Tᵀ)X``, T the strict upper triangle of GXᵀ, which
    can ascend.) A long polar step can change the sign of a square weight's determinant.

    Args:
        map: ``"polar"`` or ``"qr"``.

    Source: Absil and Malick, Projection-like retractions on matrix manifolds, SIAM J. Optim. 2012.
    """

    map: str = "polar"

    name = "projection"
    summary = "nearest orthonormal matrix after each step (or a QR retraction)"
    reference = "Absil & Malick, SIAM J. Optim. 2012"
    claim = Claim()
    tuning: ClassVar = {"map": tuple(MAPS)}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_one_of("map", MAPS)

    @property
    def projects(self) -> bool:  # type: ignore[override]
        """True for QR, a function of P_X(U); polar(X − lr·G) is not: it reverses rows for G = SX, lr·S above I."""
        return self.map == "qr"

    @property
    def coefficients(self) -> tuple[float, float]:
        """(1, 1)."""
        return (1.0, 1.0)

    def step(self, x: Tensor, displacement: Tensor, lr: float) -> Tensor:
        """Move as the base optimizer would, then return to the set by the map."""
        return MAPS[self.map](x, displacement)
