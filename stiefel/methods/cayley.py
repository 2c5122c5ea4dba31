"""The Cayley map as a trivialization: the weight is a rotation of its start, with a skew matrix of rank 2p."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stiefel.constraint import Trivialization, register
from stiefel.manifold.retractions import retract_cayley


@register
@dataclass(frozen=True, kw_only=True)
class Cayley(Trivialization):
    """``X = X₀ (I + ½A)(I − ½A)⁻¹``, ``A`` skew of rank 2p with ``X₀ A = P(V)``, the tangent part of the proxy at X₀.

    The 2p×2p form costs O(n p²) and O(n p) memory where the usual one builds and solves n×n. Rotations by π lie at
    infinity.

    Source: Helfrich, Willmott and Ye, ICML 2018, for the map; Lezcano-Casado, NeurIPS 2019, for trivializations; Wen
    and Yin (2013) for the low-rank form.
    """

    name = "cayley"
    summary = "Cayley map from the start, 2p×2p"
    reference = "Helfrich et al., ICML 2018; Lezcano-Casado, NeurIPS 2019"

    def rotate(self, base: Tensor, tangent: Tensor) -> Tensor:
        """The Cayley retraction."""
        return retract_cayley(base, tangent)
