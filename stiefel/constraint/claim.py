"""How orthogonal a method keeps a weight. Imports torch alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

ROUNDING = 64
"""What counts as rounding in ‖XXᵀ − I‖_F/√p, in units of the dtype's epsilon: 8e-6 in float32, 1e-14 in float64."""


@dataclass(frozen=True)
class Claim:
    """How orthogonal a method keeps a weight, and under which training; the conformance tests check it.

    Args:
        bound: largest ‖XXᵀ − I‖_F of any matrix, beyond rounding; 0 where the weight is on the set.
        rates: smallest and largest learning rate, at gradients of unit norm, for which it holds.
        optimizers: names of the base optimizers for which it holds; empty for all that the method accepts.
    """

    bound: float = 0.0
    rates: tuple[float, float] = (0.0, math.inf)
    optimizers: tuple[str, ...] = ()

    def allows(self, residual: float, dtype: torch.dtype, p: int) -> bool:
        """Whether a residual ‖XXᵀ − I‖_F/√p of p rows is within the claim."""
        return residual <= self.bound / p**0.5 + ROUNDING * torch.finfo(dtype).eps

    def __str__(self) -> str:
        bound = "to rounding" if self.bound == 0 else f"≤ {self.bound:g}"
        return bound if self.rates[1] == math.inf else f"{bound}, rates ≤ {self.rates[1]:g}"
