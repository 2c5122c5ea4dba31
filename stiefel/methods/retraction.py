"""Any optimizer made Riemannian: its update, projected onto the tangent space and retracted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from stiefel.constraint import Claim, StepMethod, register
from stiefel.manifold.geometry import project_tangent
from stiefel.manifold.retractions import retract_cayley, retract_polar, retract_qr

MAPS = {"qr": retract_qr, "polar": retract_polar, "cayley": retract_cayley}


@register
@dataclass(frozen=True, kw_only=True)
class Retraction(StepMethod):
    """``X ← R_X(P_X(U))``, U the base optimizer's displacement, ``P_X(U) = U − sym(UXᵀ)X``.

    With SGD it is Riemannian gradient descent in the Euclidean metric; with Adam, AdamW or any other it keeps that
    optimizer's momenta as they are, in the ambient space.

    Args:
        map: the retraction: ``"qr"``, ``"polar"`` or ``"cayley"`` (a 2p×2p solve).

    Source: Absil, Mahony and Sepulchre (2008), sections 3.6 and 4.1, for the maps; Li, Sajadmanesh, Li and Lyu, StelLA,
    NeurIPS 2025, for any optimizer between a tangent gradient and a retraction; Wen and Yin (2013) for cayley.
    """

    map: str = "qr"

    name = "retraction"
    summary = "tangent part of any optimizer's update, then a retraction"
    reference = "Absil, Mahony & Sepulchre, 2008; Li et al., NeurIPS 2025"
    claim = Claim()
    projects = True
    tuning: ClassVar = {"map": tuple(MAPS)}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_one_of("map", MAPS)

    @property
    def coefficients(self) -> tuple[float, float]:
        """(1, 1)."""
        return (1.0, 1.0)

    def step(self, x: Tensor, displacement: Tensor, lr: float) -> Tensor:
        """Retract the tangent part."""
        return MAPS[self.map](x, project_tangent(x, displacement))
