"""Cayley SGD: the Cayley transform by a few fixed-point iterations, under a momentum that is kept tangent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stiefel.constraint import Claim, TransportMethod, register
from stiefel.linalg import add_product, frobenius, may_wait, nearest_in_step, newton_schulz, skew, sym
from stiefel.manifold.geometry import project_tangent

LONGEST = 1.0
"""Largest ‖A‖_F, the paper's 2q with q = ½: an iteration then halves the distance to the transform, or more."""
POLISH = 4
"""Newton-Schulz steps for the longest Y in double: YYᵀ − I goes from 0.06 to 3e-3, 7e-6, 4e-11 and 1e-21."""


@register
@dataclass(frozen=True, kw_only=True)
class CayleySGD(TransportMethod):
    """``Y ← X + T``, then s times ``Y ← X + ½(X + Y)A``, then ``X ← polar(Y)``; the momentum becomes ``P_X(M)``.

    ``T = P_X(U)`` is the tangent part of the base optimizer's displacement, and ``A = XᵀB − BᵀX`` with
    ``B = T(I − ½XᵀX)`` the skew matrix for which X A = T. The fixed point is the Cayley transform
    ``X (I + ½A)(I − ½A)⁻¹``. Steps with ‖A‖_F > 1 are shortened to that (the paper's min(lr, 2q/‖W‖), q = ½) and
    counted in the report. With SGD and momentum it is the paper's Algorithm 1. Its Cayley Adam has one second moment
    per matrix, as ``riemannian`` has under Adam; here Adam keeps its own, of single entries, and its mean of gradients
    as it is.

    Y is off the set by ‖A‖₂⁴/4 for s = 2, always inwards, and as published this adds up: 2000 steps at rate 0.1 and
    momentum 0.9 along noise of norm 1 leave ‖XXᵀ − I‖_F at 3e-3 for 64×576 and at 0.2 for 1×10. The released code
    iterates five times, normalizes each row before a step, and takes a QR factor in one step of a hundred, at random.
    Here the polar factor of Y ends each step, by Newton-Schulz steps, of which one is enough where T is short. To third
    order in T the step is the same.

    Args:
        iterations: s; the paper has 2, its released code 5.

    Source: Li, Fuxin and Todorovic, Efficient Riemannian optimization on the Stiefel manifold via the Cayley transform,
    ICLR 2020, Algorithms 1 and 2; the polar factor is added here.
    """

    iterations: int = 2

    name = "cayley_sgd"
    summary = "iterated Cayley transform of bounded length, under a momentum kept tangent"
    reference = "Li, Fuxin & Todorovic, ICLR 2020"
    claim = Claim()
    shortens = True
    projects = True
    tuning: ClassVar = {"iterations": (2, 5)}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_count("iterations")

    @property
    def coefficients(self) -> tuple[float, float]:
        """(1, 1)."""
        return (1.0, 1.0)

    def step(self, x: Tensor, displacement: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """The iterated transform, and which matrices' steps were shortened."""
        tangent = project_tangent(x, displacement)
        size = frobenius(tangent)
        # ‖T‖ ≤ ‖A‖: this shortens none that is not shortened below, and no square overflows there.
        tangent = tangent / size.clamp_min(LONGEST)
        s = tangent @ x.mH
        # With S = TXᵀ and V = T − SX: ‖A‖² = ‖S‖² + 2‖V‖² = 2‖T‖² − ‖S‖².
        t_norm, s_norm = (torch.linalg.matrix_norm(m, keepdim=True) for m in (tangent, s))
        length = (2 * t_norm.square() - s_norm.square()).clamp_min(0).sqrt()
        kept = LONGEST / length.clamp_min(LONGEST)
        y = self._transformed(x, kept * tangent, kept * s)
        return _polished(y), ((size > LONGEST) | (kept < 1))[..., 0, 0]

    def _transformed(self, x: Tensor, tangent: Tensor, s: Tensor) -> Tensor:
        """Y. All iterates are ``(I + C)X + DT`` with C and D p×p, since ``XA = T`` and ``TA = ST − VVᵀX``."""
        vv = add_product(tangent @ tangent.mH, s, s.mH, alpha=-1)
        identity = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device).expand_as(s)
        c, d = torch.zeros_like(s), identity
        for _ in range(self.iterations):
            c, d = -0.5 * d @ vv, identity + 0.5 * add_product(c, d, skew(s))
        # sym(S), 0 but for rounding, is taken out of T.
        return add_product(add_product(x, add_product(c, d, sym(s), alpha=-1), x), d, tangent)


def _polished(y: Tensor) -> Tensor:
    """The polar factor of Y, which is near the set; where the host may not wait, by what the longest needs."""
    if may_wait(y):
        return nearest_in_step(y)
    for _ in range(POLISH):
        y = newton_schulz(y)
    return y
