"""Base of the trivializations, whose weight is a rotation of its start. Imports ``geometry``, ``constraint``."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from stiefel.constraint.base import Claim, Reparameterization
from stiefel.constraint.options import is_count
from stiefel.errors import OptionError
from stiefel.layout import Layout
from stiefel.manifold.geometry import project_tangent


@dataclass(frozen=True, kw_only=True)
class Trivialization(Reparameterization):
    """``X = φ(X₀, P(V))``, with P(V) the tangent part of the proxy at the start X₀ and φ a map along the manifold.

    With ``rebase=K`` it is a dynamic trivialization: after every K steps ``X₀ ← X``, and the proxy returns to its start
    ``V = s X``, so that φ is used near its start alone, where its derivative is near I. With K = 1 each step is the
    retraction φ of the tangent part of the optimizer's displacement; with plain SGD that is Riemannian gradient
    descent. Momentum and moments stay, and act from then on by their tangent parts at the new start. A start does not
    move within a step, whatever a closure evaluates, nor after a step for which the weight had no gradient.

    Weight decay pulls the weight back to its start and cannot collapse it.

    Args:
        rebase: K, after how many steps the start moves to the weight; None for never, a start that stays.

    Source: Lezcano-Casado, Trivializations for gradient-based optimization on manifolds, NeurIPS 2019.
    """

    rebase: int | None = None

    claim = Claim(rates=(0, 1.0))
    tuning: ClassVar = {"rebase": (None, 1, 100)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rebase is not None and not is_count(self.rebase):
            raise OptionError(f"rebase={self.rebase!r}: expected a positive whole number of steps, or None")

    @property
    def caveat(self) -> str:  # type: ignore[override]
        """That of a start that stays; none where it moves."""
        if self.rebase is not None:
            return ""
        return (
            "a map from a fixed start: its derivative degenerates at rotations by π, where training slows or stops; "
            "rebase=K moves the start after every K steps, which cures it"
        )

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
