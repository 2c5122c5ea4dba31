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
    step with all coordinates, whose (a, b) is (1, ½), so it needs larger rates than other methods. The coordinates
    depend on the seed and on the number of steps taken alone: replicas of a model draw the same ones, however their
    global generators are seeded, and training goes on from a checkpoint as if it had not stopped.

    Args:
        share: r/n, in (0, 1].
        seed: of the draws; weights of equal n draw the same coordinates.

    Source: Han, Poirion and Takeda, Efficient optimization with orthogonality constraint: a randomized Riemannian
    submanifold method, ICML 2025 (permutation sampling).
    """

    share: float = 0.5
    seed: int = 0

    name = "rsdm"
    summary = "rotation of a random subset of coordinates per step"
    reference = "Han et al., ICML 2025"
    claim = Claim()
    counts = True
    projects = True
    tuning: ClassVar = {"share": (0.25, 0.5, 1.0)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.share) and 0 < self.share <= 1):
            raise OptionError(f"share={self.share!r}: expected a number in (0, 1]")
        if not (isinstance(self.seed, int) and not isinstance(self.seed, bool) and 0 <= self.seed < 2**31):
            raise OptionError(f"seed={self.seed!r}: expected a whole number from 0 to 2³¹ − 1")

    @property
    def coefficients(self) -> tuple[float, float] | None:
        """(1, ½) with all coordinates; a random step otherwise."""
        return (1.0, 0.5) if self.share == 1 else None

    def step(self, x: Tensor, displacement: Tensor, lr: float, taken: int = 0) -> Tensor:
        """Rotate the drawn columns; one Newton-Schulz step keeps rounding from adding up over many steps."""
        n = x.shape[-1]
        # Drawn on the host, so that every device draws the same. The factor, near 2³²/φ, keeps seeds far apart.
        generator = torch.Generator().manual_seed((self.seed * 2654435761 + taken) % 2**32)
        # At least two columns (where n allows): one coordinate alone cannot be rotated.
        chosen = torch.randperm(n, generator=generator)[: max(min(2, n), round(self.share * n))]
        chosen = chosen.to(x.device, non_blocking=True)
        moved = x.clone()
        # B = U/2 gives A = XᵀB − BᵀX = skew(XᵀU).
        moved[..., chosen] = cayley_step(x[..., chosen], limited(displacement[..., chosen] / 2, LONGEST))
        return newton_schulz(moved)
