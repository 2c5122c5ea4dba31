"""torch's own orthogonal parametrization, on the matrix that this library reads a weight as."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import orthogonal

from stiefel.constraint import Claim, Reparameterization, register
from stiefel.layout import Layout
from stiefel.linalg import is_short, limited, newton_schulz, one_by_one, widened
from stiefel.manifold.retractions import LONGEST_GEODESIC

MAPS = ("matrix_exp", "cayley", "householder")


@register
@dataclass(frozen=True, kw_only=True)
class TorchOrthogonal(Reparameterization):
    """``torch.nn.utils.parametrizations.orthogonal`` with a trivialization: ``Xᵀ = B · map(V)``, B orthogonal n×n.

    A baseline, and a reference for the thin forms. Every form builds n×n. A square weight is read as its transpose,
    which torch on its own does not do: same set, same first step, another path. Two faults are corrected: a kernel is
    one matrix instead of k×k slices, and the ±1 that torch keeps on the diagonal of the trained tensor and truncates
    with ``.int()`` are constants, so that weight decay and scales other than 1 do not turn the weight to zero.

    Args:
        map: ``"matrix_exp"``, ``"cayley"`` or ``"householder"``.

    Source: Lezcano-Casado, Trivializations for Gradient-Based Optimization on Manifolds, NeurIPS 2019; torch.
    """

    map: str = "matrix_exp"

    name = "torch_orthogonal"
    summary = "torch's own parametrization (n×n), on the flattened weight"
    reference = "Lezcano-Casado, NeurIPS 2019; torch"
    real_only = True
    claim = Claim(rates=(0, 1.0))
    thin = False
    tuning: ClassVar = {"map": MAPS}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_one_of("map", MAPS)

    @property
    def caveat(self) -> str:  # type: ignore[override]
        """The caveat of reflections, or of the skew maps."""
        if self.map == "householder":
            return "reflections with a leading entry of 1 reach part of the set only at infinity"
        return "a map from a fixed start: its derivative degenerates at rotations by π, where training slows or stops"

    @property
    def coefficients(self) -> tuple[float, float]:
        """(2, 1) for the skew maps, free below A's diagonal; reflections move four times as far."""
        return (8.0, 4.0) if self.map == "householder" else (2.0, 1.0)

    def start(self, x: Tensor, layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
        """The zero proxy, with the completion of X to an n×n orthogonal matrix as its base."""
        q, r = torch.linalg.qr(x.mT, mode="complete")
        # R is diag(±1) for orthonormal X: with these signs the first p columns of B are Xᵀ itself.
        signs = torch.sgn(r.diagonal(dim1=-2, dim2=-1)).unsqueeze(-2)
        base = torch.cat([q[..., : x.shape[-2]] * signs, q[..., x.shape[-2] :]], dim=-1)
        return torch.zeros_like(x), {"base": base}

    def forward(self, proxy: Tensor, layout: Layout, base: Tensor) -> Tensor:
        """Hand the transposed proxy to torch, with the diagonal that stands for no sign change."""
        dtype = proxy.dtype
        if not is_short(proxy):  # an exponential loses digits in proportion to the rotation
            proxy, base = widened(proxy), widened(base)
        v = limited(proxy, LONGEST_GEODESIC).mT.tril(-1)  # beyond, rounding decides the angles, and entries overflow
        # torch multiplies the product of reflections by this diagonal: at V = 0 the product is −I, and −1 makes it I.
        # For the skew maps it cancels in V − Vᵀ.
        v = v - torch.eye(*v.shape[-2:], dtype=v.dtype, device=v.device)

        def mapped(v: Tensor, base: Tensor) -> Tensor:
            return functional_call(_parametrization(tuple(v.shape), self.map), {"base": base}, (v,))

        x = one_by_one(mapped, v, base).mT if self.map == "cayley" else mapped(v, base).mT
        return newton_schulz(x).to(dtype)  # a base that came from float32 is orthogonal in float32 only


@cache
def _parametrization(shape: tuple[int, ...], orthogonal_map: str) -> nn.Module:
    """torch's module for tensors of a shape; its own base is never used."""
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.eye(*shape[-2:]).expand(shape).clone())
    with torch.random.fork_rng(devices=[]):  # torch completes a base at random
        parametrized: Any = orthogonal(holder, "weight", orthogonal_map=orthogonal_map)
    return parametrized.parametrizations.weight[0]
