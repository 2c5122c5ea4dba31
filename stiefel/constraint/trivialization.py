"""Base of the trivializations, whose weight is a rotation of its start. Imports ``geometry``, ``constraint``."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from stiefel.constraint.base import Claim, Reparameterization
from stiefel.layout import Layout
from stiefel.manifold.geometry import project_tangent


@dataclass(frozen=True, kw_only=True)
class Trivialization(Reparameterization):
    """``X = φ(X₀, P(V))``, with P(V) the tangent part of the proxy at the start X₀ and φ a map along the manifold.

    Weight decay pulls the weight back to its start and cannot collapse it.

    Source: Lezcano-Casado, Trivializations for gradient-based optimization on manifolds, NeurIPS 2019.
    """

    claim = Claim(rates=(0, 1.0))
    caveat = "a map from a fixed start: its derivative degenerates at rotations by π, where training slows or stops"

    @abstractmethod
    def rotate(self, base: Tensor, tangent: Tensor) -> Tensor:
        """φ: the point that a tangent vector at the base leads to."""

    @property
    def coefficients(self) -> tuple[float, float]:
        """(1, 1): P is an orthogonal projection, and φ has the derivative I at 0."""
        return (1.0, 1.0)

    def start(self, x: Tensor, layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
        """The proxy at X₀ = X itself, whose tangent part is zero."""
        # The proxy, which training changes in place, may use the memory of x itself: the base needs its own.
        return x, {"base": x.clone()}

    def forward(self, proxy: Tensor, layout: Layout, base: Tensor) -> Tensor:
        """Rotate the base."""
        return self.rotate(base, project_tangent(base, proxy))
