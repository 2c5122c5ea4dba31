"""The matrix exponential as a trivialization: the weight is a rotation of its start along a geodesic."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stiefel.constraint import Claim, Reparameterization
from stiefel.geometry import exp_canonical, project_tangent
from stiefel.layout import Layout
from stiefel.linalg import newton_schulz
from stiefel.methods import register


@register
@dataclass(frozen=True, kw_only=True)
class MatrixExp(Reparameterization):
    """``X = X₀ expm(A)``, ``A`` skew of rank 2p with ``X₀ A = P(V)``, the tangent part of the proxy at X₀.

    The exponential is of a 4p×4p matrix where the usual one is of n×n. Weight decay pulls the weight back to its start
    and cannot collapse it.

    Source: Lezcano-Casado and Martínez-Rubio, ICML 2019; Lezcano-Casado, NeurIPS 2019.
    """

    name = "matrix_exp"
    summary = "matrix exponential from the start, 4p×4p"
    reference = "Lezcano-Casado, NeurIPS 2019"
    claim = Claim(rates=(0, 1.0))
    caveat = "a map from a fixed start: its derivative degenerates at rotations by π, where training slows or stops"

    @property
    def coefficients(self) -> tuple[float, float]:
        """(1, 1): the proxy's coordinates are orthonormal ones of the tangent space."""
        return (1.0, 1.0)

    def start(self, x: Tensor, layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
        """The proxy at X₀ = X itself, whose tangent part is zero."""
        return x, {"base": x.clone()}

    def forward(self, proxy: Tensor, layout: Layout, base: Tensor) -> Tensor:
        """Rotate the base; one Newton-Schulz step removes what rounding in a long rotation adds."""
        return newton_schulz(exp_canonical(base, project_tangent(base, proxy)))
