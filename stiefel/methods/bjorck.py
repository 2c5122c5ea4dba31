"""Björck orthonormalization of a proxy, as used for Lipschitz networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from stiefel.constraint import Claim, Reparameterization, is_count, register
from stiefel.errors import OptionError
from stiefel.layout import Layout
from stiefel.linalg import iterated, polar, unit_sized

SERIES = (1 / 2, 3 / 8, 5 / 16, 35 / 128)
"""Coefficients of (1 − q)^{-1/2} = 1 + q/2 + 3q²/8 + …"""


@register
@dataclass(frozen=True, kw_only=True)
class Bjorck(Reparameterization):
    """``X₀ = V / √(‖V‖₁ ‖V‖_∞)``, ``X ← (I + ½Q + ⅜Q² + …) X`` with ``Q = I − X Xᵀ``.

    Order 1 is the Newton-Schulz step of ONI. The divisor bounds ‖V‖₂ from above without computing it, and costs some
    iterations: at an orthonormal 100×100 start it is about 8.

    Args:
        iterations: a number, which guarantees nothing: 20 suffice at condition numbers below about 30 (order 1). Or
            ``"auto"``: the limit, which is the polar factor whatever the order and the divisor, with its gradient,
            computed as OWN's (:func:`stiefel.linalg.polar`).
        order: terms of the series, 1 to 4.

    Source: Björck and Bowie (1971); Anil, Lucas and Grosse, Sorting out Lipschitz function approximation, ICML 2019.
    """

    iterations: int | Literal["auto"] = "auto"
    order: int = 1

    name = "bjorck"
    summary = "Björck iterations of a proxy, or their limit"
    reference = "Anil et al., ICML 2019"
    decay = "rescales"
    tuning: ClassVar = {"iterations": (10, "auto"), "order": (1, 2)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations != "auto":
            self.require_count("iterations")
        if not is_count(self.order) or self.order > len(SERIES):
            raise OptionError(f"order={self.order!r}: expected a whole number from 1 to {len(SERIES)}")

    @property
    def count(self) -> int | None:
        """How many iterations, or None for as many as it takes."""
        return None if self.iterations == "auto" else self.iterations

    @property
    def claim(self) -> Claim | None:  # type: ignore[override]
        """To rounding where the iteration runs to convergence; a given number of steps guarantees nothing."""
        return Claim(rates=(0, 0.1)) if self.count is None else None

    @property
    def coefficients(self) -> tuple[float, float] | None:
        """(1, 1), as for the polar factor, where the iterations suffice to raise a singular value of 1/500 to 1."""
        enough = self.count is None or self.growth**self.count >= 500
        return (1.0, 1.0) if enough else None

    @property
    def growth(self) -> float:
        """The factor at 0, by which a step raises a small singular value."""
        return 1 + sum(SERIES[: self.order])

    def forward(self, proxy: Tensor, layout: Layout) -> Tensor:
        """Bound the proxy's singular values, then iterate."""
        v = unit_sized(proxy)
        if self.count is None:
            return polar(v)
        sizes = v.abs()
        # ‖V‖₂² ≤ ‖V‖₁ ‖V‖_∞, the largest column sum times the largest row sum
        bound = (sizes.sum(-1).amax(-1) * sizes.sum(-2).amax(-1)).sqrt()[..., None, None]
        return iterated(self.factor, self.count, v / bound)

    def factor(self, gram: Tensor) -> Tensor:
        """A step as a factor: the truncated series of ``(X Xᵀ)^{-1/2}``, in Horner's form."""
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        q = eye - gram
        # c₁Q + Q(c₂Q + Q(c₃Q + …)), from the inside out
        series = SERIES[self.order - 1] * q
        for coefficient in reversed(SERIES[: self.order - 1]):
            series = coefficient * q + q @ series
        return eye + series
