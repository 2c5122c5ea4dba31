"""ONI, orthogonalization by Newton's iteration: OWN without an eigendecomposition, with adjustable orthogonality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from stiefel.constraint import Centred, Claim, register
from stiefel.layout import Layout
from stiefel.linalg import iterated, polar, spectral_radius

Bound = Literal["spectral", "frobenius"]


@register
@dataclass(frozen=True, kw_only=True)
class ONI(Centred):
    """``X₀ = V_c / c``, ``X ← 1.5 X − 0.5 (X Xᵀ) X``, T times.

    The singular values of X₀ lie in (0, 1] (up to 1.1 where c is an estimate). Each step moves them towards 1, small
    ones by a factor of 1.5: T trades orthogonality for capacity. The published form ``B ← 1.5 B − 0.5 B³ S`` is the
    same in exact arithmetic and diverges in float32 from T = 10 on.

    Args:
        center: subtract row means, as in OWN.
        iterations: T; the paper trains with 5 (convolutions) and 4 (linear layers). A given number guarantees nothing:
            singular values below c · 1.5^{-T} stay below 1. ``"auto"``: the limit T → ∞, which is the polar factor of
            V_c, with its gradient, computed as OWN's (:func:`stiefel.linalg.polar`) in a fraction of the time: the
            iteration itself would take 2 steps at the start, 6 at condition 2, 29 at 1e4.
        bound: c. ``"frobenius"``, the paper's ``√‖V_c V_cᵀ‖_F``, gives X₀ singular values p^{-1/4} even where V is
            orthonormal, so that small T do not start at the common point. ``"spectral"``, an estimate of ``‖V_c‖₂``,
            does.

    Source: Huang et al., Controllable Orthogonalization in Training DNNs, CVPR 2020 (arXiv 2004.00917), Algorithm 1.
    """

    iterations: int | Literal["auto"] = "auto"
    bound: Bound = "spectral"

    name = "oni"
    summary = "Newton-Schulz iterations of a proxy, or their limit; their number is a dial"
    reference = "Huang et al., CVPR 2020"
    decay = "rescales"
    tuning: ClassVar = {"iterations": (3, 5, 7, "auto")}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations != "auto":
            self.require_count("iterations")
        self.require_one_of("bound", get_args(Bound))

    @property
    def count(self) -> int | None:
        """T, or None for as many as it takes."""
        return None if self.iterations == "auto" else self.iterations

    @property
    def claim(self) -> Claim | None:  # type: ignore[override]
        """To rounding where the iteration runs to convergence; a given number of steps guarantees nothing."""
        return Claim(rates=(0, 0.1)) if self.count is None else None

    @property
    def coefficients(self) -> tuple[float, float] | None:
        """(1, 1) where the iteration has converged: with the spectral bound it has at the start, whatever T."""
        # From p^{-1/4}, where the Frobenius bound starts an orthonormal V, 12 steps reach 1 for p up to 1e5.
        return (1.0, 1.0) if self.bound == "spectral" or self.count is None or self.count >= 12 else None

    def forward(self, proxy: Tensor, layout: Layout) -> Tensor:
        """Bound the (centred) proxy's singular values, then iterate."""
        v = self.normalized(proxy, layout)
        if self.count is None:
            return polar(v)  # whatever c
        gram = v @ v.mH
        # c², one per matrix: the largest eigenvalue of V_c V_cᵀ by 16 power iterations, or its Frobenius norm
        square = spectral_radius(gram, 16) if self.bound == "spectral" else torch.linalg.matrix_norm(gram)
        return iterated(newton, self.count, v / square.sqrt()[..., None, None])


def newton(gram: Tensor) -> Tensor:
    """The Newton-Schulz step as a factor, ``1.5 I − 0.5 X Xᵀ``."""
    return 1.5 * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device) - 0.5 * gram
