"""Constraint dissolving: the network sees A(V), which is V on the set, and a penalty keeps V near the set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from stiefel.constraint import Penalized, Reparameterization, Schedule, register
from stiefel.layout import Layout
from stiefel.linalg import newton_schulz, squared_residual


@register
@dataclass(frozen=True, kw_only=True)
class Dissolving(Penalized, Reparameterization):
    """``X = A(V) = (3/2 I − ½ VVᵀ) V``, and ``λ ‖VVᵀ − I‖_F²`` in the loss, which :func:`stiefel.penalty` has.

    With E = VVᵀ − I the weight has ``XXᵀ − I = −¾ E² + ¼ E³``. On the set X = V, and the gradient of the loss is the
    tangent one, ``G − sym(GVᵀ)V``: what is normal never reaches the optimizer, so that a solution of the constrained
    problem stays one under any optimizer and for any λ. A soft penalty has its solutions off the set.

    Near the set it has no others as long as ``8λ > 3γ``, γ the largest eigenvalue of ``sym(GVᵀ)``: along S V, for a
    symmetric S, the second derivative is ``8λ ‖S‖² − 3 tr(S² sym(GVᵀ))``. A start far from a solution has the largest
    γ; where it is larger, V is pushed off until the gradient is smaller. Gradient descent at rate lr is stable where
    ``lr (8λ + 3‖sym(GVᵀ)‖₂) < 2``; hence lr · λ < ¼, as for the penalty alone. All this at scale 1. At scale s, with
    ``W = s A(V/s)`` and G = ∂f/∂W, the penalty is ``λ s² ‖VVᵀ/s² − I‖²``: ``8λ s² > 3γ``, and for descent
    ``lr (8λ + 3‖sym(GVᵀ)‖₂/s²) < 2``.

    The weight is only as near the set as the penalty holds V, and nothing is promised. After training
    ``stiefel.project(model)`` takes it to the nearest orthonormal matrix; ``stiefel.release`` leaves it as it is.

    Args:
        strength: λ ≥ 0, a quarter of the paper's β; or a callable of the number of optimizer steps taken so far. The
            default holds V at gradients with γ < ⅔ s² and at rates below 1.

    Source: Xiao, Liu and Toh, Dissolving constraints for Riemannian optimization, Mathematics of Operations Research
    2024: h(x) = f(A(x)) + (β/4) ‖c(x)‖², with their A for the Stiefel manifold.
    """

    strength: Schedule = 0.25

    name = "dissolving"
    summary = "one Newton-Schulz step of a proxy, and a penalty on the proxy's VVᵀ − I"
    reference = "Xiao et al., Math. Oper. Res. 2024"
    coefficients = (1.0, 1.0)
    tuning: ClassVar = {"strength": (0.05, 0.25, 1.0)}

    def forward(self, proxy: Tensor, layout: Layout) -> Tensor:
        """A(V): V less half of what it is off the set by, ``V − ½ E V``."""
        return newton_schulz(proxy)

    def penalty(self, x: Tensor, layout: Layout) -> Tensor:
        """‖E‖_F² of each proxy."""
        return squared_residual(x)
