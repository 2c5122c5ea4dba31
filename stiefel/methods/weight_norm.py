"""Weight normalization: rows of a learned length, and any angle between them. A control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from stiefel.constraint import Centred, register
from stiefel.layout import Layout
from stiefel.linalg import unit_sized


@register
@dataclass(frozen=True, kw_only=True)
class WeightNorm(Centred):
    """``w_i = g_i v_i/‖v_i‖`` for the filter w_i of each output: learned lengths without orthogonality.

    It starts at the same orthonormal point as every method, and leaves the set from there.

    Args:
        center: subtract each filter's mean first, ``w_i = g_i (v_i − mean v_i)/‖v_i − mean v_i‖`` (centred weight
            normalization), where the start is a centred one: p ≤ n − 1 and rows that are filters. For other shapes
            ``group_size=1`` starts at each filter by itself. ``"auto"``: where the former holds.

    Source: Salimans and Kingma, NeurIPS 2016, eq. 2; centred: Huang, Liu, Liu, Lang and Tao, ICCV 2017.
    """

    center: bool | Literal["auto"] = False

    name = "weight_norm"
    summary = "a learned length per output, no orthogonality: a control"
    reference = "Salimans & Kingma, NeurIPS 2016; Huang et al., ICCV 2017"
    decay = "acts"
    can_learn_scale = False  # it has a gain per output already

    def start(self, x: Tensor, layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
        """X, and the lengths of W's filters as trained gains (real, also where the weight is complex)."""
        return x, {"gain": nn.Parameter(self.fixed_scale * _lengths(x, layout))}

    def forward(self, proxy: Tensor, layout: Layout, gain: Tensor) -> Tensor:
        """Filters of the proxy, at the lengths of the gains."""
        # As a batch of 1×k matrices, so that each filter is scaled by its own size.
        filters = (proxy.mT if layout.columns else proxy).unsqueeze(-2)
        filters = (self.normalized(filters, layout) if self.centres(layout) else unit_sized(filters)).squeeze(-2)
        v = filters.mT if layout.columns else filters
        # Divided by s, by which the layout multiplies afterwards: a gain is the length of W's filter, not of X's.
        return v * (gain / (self.fixed_scale * _lengths(v, layout)))


def _lengths(x: Tensor, layout: Layout) -> Tensor:
    """Length of each output's filter: of a row, or of a column where the constraint is on columns."""
    return torch.linalg.vector_norm(x, dim=-2 if layout.columns else -1, keepdim=True)
