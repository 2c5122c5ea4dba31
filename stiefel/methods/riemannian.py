"""Riemannian SGD and Adam, performed by geoopt on a manifold that reads the weight in its own shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from stiefel.constraint import ManifoldMethod, register
from stiefel.layout import Layout
from stiefel.manifold.retractions import (
    retract_cayley,
    retract_exp_canonical,
    retract_exp_euclidean,
    retract_polar,
    retract_qr,
)

if TYPE_CHECKING:
    from stiefel.manifold.weight_manifold import StiefelWeight

METRICS = ("euclidean", "canonical")
# Geodesics depend on the metric; the other retractions serve both metrics as they are.
RETRACTIONS = {
    "qr": dict.fromkeys(METRICS, retract_qr),
    "polar": dict.fromkeys(METRICS, retract_polar),
    "cayley": dict.fromkeys(METRICS, retract_cayley),
    "exp": {"euclidean": retract_exp_euclidean, "canonical": retract_exp_canonical},
}


@register
@dataclass(frozen=True, kw_only=True)
class Riemannian(ManifoldMethod):
    """``X ← R_X(−η grad)``: gradient in a metric, then a retraction.

    The gradient is ``G − sym(GXᵀ)X`` (Euclidean, (a, b) = (1, 1)) or ``G − XGᵀX`` (canonical, (2, 1)). The paper's
    EI+QR is euclidean with qr, CI+QR canonical with qr, CayT canonical with cayley.

    Args:
        metric: ``"euclidean"`` or ``"canonical"``.
        retraction: ``"qr"``, ``"polar"``, ``"cayley"`` (a 2p×2p solve wherever 2p < n) or ``"exp"`` (exact geodesics).

    Source: Bonnabel (2013) for SGD, Bécigneul and Ganea (ICLR 2019) for Adam, Kochurov et al. (2020) for geoopt.
    """

    metric: str = "euclidean"
    retraction: str = "qr"

    name = "riemannian"
    summary = "geoopt's Riemannian SGD or Adam on a corrected Stiefel manifold"
    reference = "Bécigneul & Ganea, ICLR 2019; geoopt"
    real_only = True  # geoopt's optimizers take real weights only
    tuning: ClassVar = {"metric": METRICS, "retraction": tuple(RETRACTIONS)}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_one_of("metric", METRICS)
        self.require_one_of("retraction", RETRACTIONS)

    @property
    def coefficients(self) -> tuple[float, float]:
        """(1, 1) in the Euclidean metric, (2, 1) in the canonical."""
        return (1.0, 1.0) if self.metric == "euclidean" else (2.0, 1.0)

    def manifold(self, layout: Layout) -> StiefelWeight:
        """The corrected Stiefel manifold over weights of this layout."""
        from stiefel.manifold.weight_manifold import (
            StiefelWeight,  # imports geoopt, which takes 0.5 s: only where it is needed
        )

        return StiefelWeight(layout, self.metric, RETRACTIONS[self.retraction][self.metric], self.subspace)
