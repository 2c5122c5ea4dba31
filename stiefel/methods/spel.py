"""SPEL: Muon's step along the tangent space and back, without an inner loop."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stiefel.constraint import Claim, StepMethod, register
from stiefel.linalg import msign, nearest_in_step
from stiefel.manifold.geometry import tangent_direction


@register
@dataclass(frozen=True, kw_only=True)
class SPEL(StepMethod):
    """``X ← polar(X − (lr/s) msign(P_X(D)))``, D the base optimizer's descent direction.

    The cheap relative of manifold Muon: the matrix sign of a tangent is not quite tangent, and the polar factor removes
    the rest. A step is about lr long in the spectral norm of W (at most 2/√3 lr, measured; exactly lr for square
    weights of full rank) whatever the gradient's size: let lr decay.

    Source: Yang and Lai, Manifold constrained steepest descent, ICML 2026 (arXiv 2601.21487), Algorithm 2.
    """

    name = "spel"
    summary = "matrix sign of the tangent update, then the polar factor"
    reference = "Yang & Lai, ICML 2026"
    claim = Claim()
    step_length = True

    def step(self, x: Tensor, displacement: Tensor, lr: float) -> Tensor:
        """A step of spectral norm about lr (in units of the weight)."""
        direction = msign(tangent_direction(x, -displacement))
        return nearest_in_step(x - lr / self.fixed_scale * direction)
