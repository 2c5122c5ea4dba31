"""RSDM: each step rotates a few random coordinates only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stiefel.constraint import Claim, StepMethod, is_number, register
from stiefel.errors import OptionError
from stiefel.linalg import cayley_step, limited, newton_schulz
from stiefel.manifold.retractions import LONGEST


@register
@dataclass(frozen=True, kw_only=True)
class RSDM(StepMethod):
    """``X[:, I] ← X[:, I] Y``, ``Y = Cay(skew(X[:, I]ᵀ U[:, I]))``, I random columns, U the optimizer's displacement.

    It rotates r of the n coordinates and builds nothing larger than 2p×2p. Its mean over I is r(r−1)/(n(n−1)) times the
    step with all coordinates, whose (a, b) is (1, ½), so it needs larger rates than other methods. It draws from
    torch's global generator, as dropout does.

    Args:
        share: r/n, in (0, 1].

    Source: Han, Poirion and Takeda, Efficient optimization with orthogonality constraint: a randomized Riemannian
    submanifold method, ICML 2025 (permutation sampling).
    """

    share: float = 0.5

    name = "rsdm"
    summary = "rotation of a random subset of coordinates per step"
    reference = "Han et al., ICML 2025"
    claim = Claim()
    projects = True
    tuning: ClassVar = {"share": (0.25, 0.5, 1.0)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.share) and 0 < self.share <= 1):
            raise OptionError(f"share={self.share!r}: expected a number in (0, 1]")

    @property
    def coefficients(self) -> tuple[float, float] | None:
        """(1, ½) with all coordinates; a random step otherwise."""
        return (1.0, 0.5) if self.share == 1 else None

    def step(self, x: Tensor, displacement: Tensor, lr: float) -> Tensor:
        """Rotate the drawn columns; one Newton-Schulz step keeps rounding from adding up over many steps."""
        n = x.shape[-1]
        # At least two columns (where n allows): one coordinate alone cannot be rotated.
        chosen = torch.randperm(n, device=x.device)[: max(min(2, n), round(self.share * n))]
        moved = x.clone()
        # B = U/2 gives A = XᵀB − BᵀX = skew(XᵀU).
        moved[..., chosen] = cayley_step(x[..., chosen], limited(displacement[..., chosen] / 2, LONGEST))
        return newton_schulz(moved)
