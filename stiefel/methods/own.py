"""OWN, orthogonal weight normalization: the weight is the orthonormal matrix nearest to a (centred) proxy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from stiefel.constraint import Reparameterization, is_number
from stiefel.errors import LayoutError, OptionError
from stiefel.layout import Layout
from stiefel.linalg import nearest_orthonormal, polar
from stiefel.methods import register


@register
@dataclass(frozen=True, kw_only=True)
class OWN(Reparameterization):
    """``V_c = V − (1/n) V 1 1ᵀ``, ``X = (V_c V_cᵀ)^{-1/2} V_c``.

    Of all orthonormalizing transforms of V_c it is the one that changes V_c least (the polar factor). One small SGD
    step from the common start has (a, b) = (1, 1). Under plain SGD the proxy's norm grows: the effective rate decays.

    Args:
        center: subtract row means, the paper's choice. It shrinks the set to X 1 = 0 and takes a rank away, so it needs
            p ≤ n − 1 and rows that are filters. ``"auto"`` centres where both hold. Comparisons use False.
        eps: relative floor of the proxy's singular values, which keeps a rank-deficient proxy finite; default 1e-6, and
            1e-9 for float64 (:func:`stiefel.linalg.polar`).

    Source: Huang, Liu, Lang, Yu and Li, Orthogonal Weight Normalization, AAAI 2018 (arXiv 1709.06079).
    """

    center: bool | Literal["auto"] = "auto"
    eps: float | None = None

    name = "own"
    summary = "polar factor of a proxy, with a gap-free gradient"
    reference = "Huang et al., AAAI 2018"
    feasible = True
    comparison: ClassVar = {"center": False}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.center not in (True, False, "auto"):
            raise OptionError(f"center={self.center!r}: expected True, False or 'auto'")
        if self.eps is not None and not (is_number(self.eps) and 0 < self.eps < 1e-2):
            raise OptionError(f"eps={self.eps!r}: expected a relative floor between 0 and 1e-2")

    @property
    def coefficients(self) -> tuple[float, float]:
        """(1, 1) without centring; with it, the gradient also loses its row means."""
        return (1.0, 1.0)

    def check(self, layout: Layout) -> None:
        """Refuse ``center=True`` where centred rows cannot be orthonormal."""
        super().check(layout)
        if self.center is True and not _can_center(layout):
            _, p, n = layout.matrix_shape
            if layout.columns:
                why = "its columns, not its rows, are orthonormal, and a column is not a filter"
            else:
                why = f"centring takes one rank away, so at most {n - 1} of its {p} rows can be orthonormal"
            groups = f", or group_size ≤ {layout.fan_in - 1}" if layout.fan_in > 1 else ""
            raise LayoutError(f"center=True cannot hold for {layout}: {why}; use center='auto' or center=False{groups}")

    def forward(self, proxy: Tensor, layout: Layout) -> Tensor:
        """Orthonormalize the (centred) proxy."""
        return polar(self._centre(proxy, layout), self.eps)

    def nearest(self, points: Tensor, layout: Layout) -> Tensor:
        """The polar factor of the (centred) weight."""
        return nearest_orthonormal(self._centre(points, layout))

    def _centre(self, v: Tensor, layout: Layout) -> Tensor:
        if self.center is False or not _can_center(layout):
            return v
        return v - v.mean(dim=-1, keepdim=True)


def _can_center(layout: Layout) -> bool:
    _, p, n = layout.matrix_shape
    return not layout.columns and p <= n - 1
