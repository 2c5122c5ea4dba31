"""The matrix exponential as a trivialization: the weight is a rotation of its start along a geodesic."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stiefel.constraint import Trivialization, register
from stiefel.linalg import limited, newton_schulz
from stiefel.manifold.retractions import LONGEST, exp_canonical


@register
@dataclass(frozen=True, kw_only=True)
class MatrixExp(Trivialization):
    """``X = X₀ expm(A)``, ``A`` skew of rank 2p with ``X₀ A = P(V)``, the tangent part of the proxy at X₀.

    The exponential is of a 2p×2p matrix where the usual one is of n×n.

    Source: Lezcano-Casado and Martínez-Rubio, ICML 2019; Lezcano-Casado, NeurIPS 2019.
    """

    name = "matrix_exp"
    summary = "matrix exponential from the start, 2p×2p"
    reference = "Lezcano-Casado, NeurIPS 2019"

    def rotate(self, base: Tensor, tangent: Tensor) -> Tensor:
        """The geodesic, at most ``LONGEST`` long, so that one Newton-Schulz step removes its rounding."""
        return newton_schulz(exp_canonical(base, limited(tangent, LONGEST), LONGEST))
