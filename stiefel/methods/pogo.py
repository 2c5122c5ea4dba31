"""POGO, proximal one-step geometric orthoptimization: a landing direction and one Newton-Schulz step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stiefel.constraint import Claim, StepMethod, register
from stiefel.linalg import frobenius, is_orthonormal, newton_schulz

LONGEST = 0.5
"""Largest ‖Ψ‖_F: one Newton-Schulz step then leaves at most 0.05, and diverges from about √3 on."""
NOISE, NORMAL = 8.0, 0.01
"""Bound of Ψ's rounding in epsilons of ‖U‖_F, and the most of this rounding, which is not tangent, in a step."""


@register
@dataclass(frozen=True, kw_only=True)
class POGO(StepMethod):
    """``M = X − Ψ``, ``X ← M + ½(M − M Mᵀ M)``, ``Ψ = −½(XXᵀU − XUᵀX)``, U the base optimizer's displacement.

    The step with fixed λ = ½. A tangent Ψ leaves a residual of about ¾‖Ψ‖₂⁴, so steps with ‖Ψ‖_F > ½ are shortened to
    that, and counted in the report. So are steps with a U so long and so nearly normal that Ψ is rounding.

    Args:
        polish: Newton-Schulz steps after each move. One is the published method; a second one takes a residual e to
            about ¾e².

    Source: Javaloy and Vergari, An embarrassingly simple way to optimize orthogonal matrices at scale, ICML 2026 (arXiv
    2602.14656), Algorithm 1 with λ = ½; the limit on ‖Ψ‖ is added here.
    """

    polish: int = 1

    name = "pogo"
    summary = "landing direction, then one Newton-Schulz step; long steps are shortened"
    reference = "Javaloy & Vergari, ICML 2026"
    shortens = True
    claim = Claim(bound=0.065)
    projects = True
    tuning: ClassVar = {"polish": (1, 2)}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_count("polish")

    @property
    def coefficients(self) -> tuple[float, float]:
        """(1, ½), as landing."""
        return (1.0, 0.5)

    def step(self, x: Tensor, displacement: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """The POGO step, and which matrices' steps were shortened."""
        turn, gram = x @ displacement.mH, x @ x.mH  # XUᵀ and XXᵀ, p×p
        if is_orthonormal(gram):  # as after most steps: Ψ = −½(U − XUᵀX)
            psi = torch.baddbmm(displacement, turn, x, beta=-0.5, alpha=0.5)
        else:
            psi = torch.baddbmm(torch.bmm(turn, x), gram, displacement, beta=0.5, alpha=-0.5)
        # The step keeps the smaller of two shares: one limits ‖Ψ‖_F, the other its rounding. Each is
        # min(1, limit/size), written so that nothing is divided by 0.
        length = frobenius(psi)
        rounding = NOISE * torch.finfo(length.dtype).eps * frobenius(displacement)
        kept = torch.minimum(LONGEST / length.clamp_min(LONGEST), NORMAL / rounding.clamp_min(NORMAL))
        moved = torch.addcmul(x, psi, kept, value=-1)
        for _ in range(self.polish):
            moved = newton_schulz(moved)
        return moved, kept[..., 0, 0] < 1
