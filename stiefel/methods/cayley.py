"""The Cayley map as a trivialization: the weight is a rotation of its start, with a skew matrix of rank 2p."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stiefel.constraint import Claim, Reparameterization
from stiefel.geometry import project_tangent, retract_cayley
from stiefel.layout import Layout
from stiefel.methods import register


@register
@dataclass(frozen=True, kw_only=True)
class Cayley(Reparameterization):
    """``X = X₀ (I + ½A)(I − ½A)⁻¹``, ``A`` skew of rank 2p with ``X₀ A = P(V)``, the tangent part of the proxy at X₀.

    The 2p×2p form costs O(n p²) and O(n p) memory where the usual one builds and solves n×n. Rotations by π lie at
    infinity. Weight decay pulls the weight back to its start and cannot collapse it.

    Source: Helfrich, Willmott and Ye, ICML 2018, for the map; Lezcano-Casado, NeurIPS 2019, for trivializations; Wen
    and Yin (2013) for the low-rank form.
    """

    name = "cayley"
    summary = "Cayley map from the start, 2p×2p"
    reference = "Helfrich et al., ICML 2018; Lezcano-Casado, NeurIPS 2019"
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
        """Rotate the base."""
        return retract_cayley(base, project_tangent(base, proxy))
