"""OWN, orthogonal weight normalization: the weight is the orthonormal matrix nearest to a (centred) proxy."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stiefel.constraint import Centred, Claim, is_number, register
from stiefel.errors import OptionError
from stiefel.layout import Layout
from stiefel.linalg import polar


@register
@dataclass(frozen=True, kw_only=True)
class OWN(Centred):
    """``V_c = V − (1/n) V 1 1ᵀ``, ``X = (V_c V_cᵀ)^{-1/2} V_c``.

    Of all orthonormalizing transforms of V_c it is the one that changes V_c least (the polar factor). One small SGD
    step from the common start has (a, b) = (1, 1). Under plain SGD the proxy's norm grows: the effective rate decays.

    Args:
        center: subtract row means, the paper's choice; ``"auto"``: where p ≤ n − 1 and rows are filters.
        eps: relative floor of the proxy's singular values in the gradient, which keeps that of a rank-deficient proxy
            finite; default 1e-6, and 1e-9 for float64 (:func:`stiefel.linalg.polar`).

    Source: Huang, Liu, Lang, Yu, Wang and Li, Orthogonal Weight Normalization, AAAI 2018 (arXiv 1709.06079).
    """

    eps: float | None = None

    name = "own"
    summary = "polar factor of a proxy, with a gap-free gradient"
    reference = "Huang et al., AAAI 2018"
    decay = "rescales"
    claim = Claim(rates=(0, 1.0))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eps is not None and not (is_number(self.eps) and 0 < self.eps < 1e-2):
            raise OptionError(f"eps={self.eps!r}: expected a number between 0 and 1e-2, or None")

    @property
    def coefficients(self) -> tuple[float, float]:
        """(1, 1) without centring; with it, the gradient also loses its row means."""
        return (1.0, 1.0)

    def forward(self, proxy: Tensor, layout: Layout) -> Tensor:
        """Orthonormalize the (centred) proxy."""
        return polar(self.normalized(proxy, layout), self.eps)
