"""Base of the reparameterizations that can centre their proxy's rows. Imports ``constraint`` and below."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from stiefel.constraint.base import Reparameterization
from stiefel.errors import LayoutError, OptionError
from stiefel.layout import Layout
from stiefel.linalg import in_double, nearest_orthonormal, unit_sized


@dataclass(frozen=True, kw_only=True)
class Centred(Reparameterization):
    """``V_c = V − (1/n) V 1 1ᵀ``, then an orthonormalization of V_c.

    Args:
        center: subtract row means. It restricts the set to X 1 = 0, on which at most n − 1 rows are orthonormal, so it
            needs p ≤ n − 1 and rows that are filters. ``"auto"`` centres where both hold. Comparisons use False, so
            that all sets are equal.
    """

    center: bool | Literal["auto"] = "auto"

    comparison: ClassVar = {"center": False}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.center, bool) or self.center == "auto"):  # 0 and 1 equal False and True
            raise OptionError(f"center={self.center!r}: expected True, False or 'auto'")

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

    def nearest(self, points: Tensor, layout: Layout) -> Tensor:
        """The polar factor of the (centred) weight; where it lacks rank, the rows that complete it are centred too."""
        if not self.centres(layout):
            return nearest_orthonormal(points)
        # Reflected, a row of mean 0 begins with 0, and the other n − 1 entries are its coordinates. The reflection is
        # its own inverse.
        coordinates = _reflected(in_double(points))[..., 1:]
        return _reflected(pad(nearest_orthonormal(coordinates), (1, 0))).to(points)

    def centred(self, v: Tensor, layout: Layout) -> Tensor:
        """V less its row means, where this method centres a weight of that layout."""
        return v - v.mean(dim=-1, keepdim=True) if self.centres(layout) else v

    def within(self, vectors: Tensor, layout: Layout) -> Tensor:
        """Centred rows, where this method centres."""
        return self.centred(vectors, layout)

    def centres(self, layout: Layout) -> bool:
        """Whether this method centres a weight of that layout."""
        return self.center is not False and _can_center(layout)

    def normalized(self, proxy: Tensor, layout: Layout) -> Tensor:
        """:meth:`centred`, scaled so that no square overflows or vanishes; for maps that do not depend on V's size."""
        v = self.centred(unit_sized(proxy), layout)
        normalized = unit_sized(v)  # again: centring makes nearly constant rows small
        return v if normalized is v else self.centred(normalized, layout)


def _can_center(layout: Layout) -> bool:
    _, p, n = layout.matrix_shape
    return not layout.columns and p <= n - 1


def _reflected(v: Tensor) -> Tensor:
    """Apply to each row the Householder reflection that exchanges the direction of (1, …, 1) and the first axis."""
    # w = 1/√n − e₁ and x ↦ x − 2 (x·w) w/‖w‖²; w is not 0, since centring needs n ≥ 2.
    w = torch.full_like(v[..., :1, :], v.shape[-1] ** -0.5)
    w[..., 0] -= 1
    return v - 2 * (v @ w.mT) / (w @ w.mT) * w
