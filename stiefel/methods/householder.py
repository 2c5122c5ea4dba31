"""A product of p Householder reflections, never larger than n×p."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stiefel.constraint import Claim, Reparameterization, register
from stiefel.layout import Layout
from stiefel.linalg import householder_rows, householder_vectors, newton_schulz


@register
@dataclass(frozen=True, kw_only=True)
class Householder(Reparameterization):
    """``X = diag(d) [I, 0] H_p ⋯ H_1``, ``H_i = I − 2 v_i v_iᵀ/‖v_i‖²``, ``v_i = (0 … 0, 1, proxy)``.

    The reflections are those of the start's QR decomposition; the signs d are constants. Weight decay shortens the
    proxy's part of v_i, which turns the weight and cannot collapse it, whereas torch's own form keeps d in the trained
    tensor and loses the weight with it. The determinant's sign never changes.

    Source: Mhammedi, Hellicar, Rahman and Bailey, ICML 2017; Schreiber and Van Loan (1989) for the compact product.
    """

    name = "householder"
    summary = "product of p reflections in compact form"
    reference = "Schreiber & Van Loan, 1989; Mhammedi et al., ICML 2017"
    real_only = True  # with real τ, reflections miss p of the unitary set's dimensions
    claim = Claim(rates=(0, 1.0))
    caveat = "reflections with a leading entry of 1 reach part of the set only at infinity"

    def start(self, x: Tensor, layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
        """The vectors of X's reflections, and its signs."""
        vectors, signs = householder_vectors(x)
        return vectors, {"signs": signs}

    def forward(self, proxy: Tensor, layout: Layout, signs: Tensor) -> Tensor:
        """Multiply the reflections; only the proxy's entries above the diagonal count.

        A reflection depends on its vector's direction alone: the vectors are shortened to entries of at most 1, whose
        squares do not overflow. One Newton-Schulz step removes the rounding of many reflections.
        """
        p, n = proxy.shape[-2:]
        vectors = proxy.triu(1) + torch.eye(p, n, dtype=proxy.dtype, device=proxy.device)
        # The divisor is a constant for the gradient: along v_i itself the reflection does not change.
        rows = householder_rows(vectors / vectors.detach().abs().amax(dim=-1, keepdim=True))
        return signs.unsqueeze(-1) * newton_schulz(rows)
