"""The momentum Stiefel optimizer: a heavy ball on the manifold, whose momentum is a tangent by construction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from stiefel.constraint import Claim, TransportMethod, register
from stiefel.linalg import add_product, nearest_in_step, skew

TURN = {"canonical": 2.0, "euclidean": 1.0}
"""1/(1 − a) of the metric ``⟨U, U(I − aXᵀX)⟩``: how much faster than in the Euclidean one rows turn in their span."""


@register
@dataclass(frozen=True, kw_only=True)
class MomentumStiefel(TransportMethod):
    """``X ← polar(X + YX + V)``; the momentum ``M = Y_M X + V_M`` becomes ``Y_M X⁺ + V_M(I − X⁺ᵀX⁺)``.

    A tangent at X is YX + V, Y skew and V Xᵀ = 0. Of the base optimizer's displacement U these are
    ``Y = skew(UXᵀ)/(1 − a)`` and ``V = U(I − XᵀX)``, a the metric's. With SGD of momentum μ = exp(−γh) it is a step of
    time h, of first order, of a ball of friction γ that rolls down the loss:

        Ẋ = YX + V,   Ẏ = −γY − skew(GXᵀ)/(1 − a),   V̇ = −γV − (1 − 2a)YV − VVᵀX − G(I − XᵀX)

    The paper has 1 − 3a/2 for 1 − 2a (its released code, with the other sign): the same in the Euclidean metric, a = 0,
    but in the canonical one, a = ½, a ball without friction and forces would leave the geodesics. There the term is 0;
    in the Euclidean metric the momentum is transported by projection, which has it. The paper's step of −VVᵀX makes V
    longer, by half the square of a short step and without a bound in long ones; the projection of V, in its place,
    makes it shorter by as much, and never longer. Of the paper's ways to turn X by Y this is the Euler step, its
    released default. The paper's Adam has second moments of Y and V; here Adam keeps its own, of the gradient's
    entries, and its mean of gradients as it is.

    Args:
        metric: ``"canonical"`` (a = ½) or ``"euclidean"`` (a = 0).

    Source: Kong, Wang and Tao, Momentum Stiefel optimizer, with applications to suitably-orthogonal attention, and
    optimal transport, ICLR 2023, Algorithm 1; Edelman, Arias and Smith (1998), section 2, for the geodesics.
    """

    metric: str = "canonical"

    name = "momentum_stiefel"
    summary = "heavy ball on the manifold: polar retraction, momentum carried along"
    reference = "Kong, Wang & Tao, ICLR 2023"
    claim = Claim()
    projects = True
    tuning: ClassVar = {"metric": tuple(TURN)}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_one_of("metric", TURN)

    @property
    def coefficients(self) -> tuple[float, float]:
        """(2, 1) in the canonical metric, (1, 1) in the Euclidean."""
        return (TURN[self.metric], 1.0)

    def step(self, x: Tensor, displacement: Tensor, lr: float) -> Tensor:
        """The point nearest to X + YX + V."""
        inside = displacement @ x.mH
        y = TURN[self.metric] * skew(inside)
        # YX + V = U + (Y − UXᵀ)X. X is added last: beside a long U it would lose its digits.
        return nearest_in_step(x + add_product(displacement, y - inside, x))

    def transport(self, x: Tensor, moved: Tensor, momentum: Tensor) -> Tensor:
        """The momentum with the same Y at the new point, and the part of V that is orthogonal to its rows."""
        if self.metric == "euclidean":
            return super().transport(x, moved, momentum)
        inside = momentum @ x.mH
        v = add_product(momentum, inside, x, alpha=-1)
        return add_product(v, skew(inside) - v @ moved.mH, moved)
