"""OLM_var, the ablation of OWN: PCA instead of ZCA whitening of the proxy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stiefel.constraint import Centred, Claim, register
from stiefel.layout import Layout
from stiefel.linalg import whitened


@register
@dataclass(frozen=True, kw_only=True)
class OWNPCA(Centred):
    """``V_c V_cᵀ = D Λ Dᵀ``, ``X = Λ^{-1/2} Dᵀ V_c``: OWN without the rotation back by D.

    X jumps where eigenvalues cross, since eigenvectors change places; the paper shows that it fails to train, and it is
    here for comparison. The proxy starts with distinct singular values 1 … 2, so that the start is well defined.

    Args:
        center: subtract row means, as in OWN.

    Source: Huang, Liu, Lang, Yu, Wang and Li, AAAI 2018, section 3.2 and figure 2 (OLM_var).
    """

    name = "own_pca"
    summary = "PCA-whitened proxy: the paper's failing ablation of OWN (OLM_var)"
    reference = "Huang et al., AAAI 2018"
    decay = "rescales"
    real_only = True  # an eigenvector's phase is arbitrary, not only its sign
    claim = Claim(rates=(0, 1.0))
    caveat = "the weight jumps where eigenvalues cross; the paper shows that it fails to train"

    def start(self, x: Tensor, layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
        """X with its rows scaled to distinct, ascending lengths, so that D is the identity.

        The largest entry of each column of D is positive by convention, as it is here.
        """
        p = x.shape[-2]
        return x * torch.linspace(1, 2, p, dtype=x.dtype, device=x.device).unsqueeze(-1), {}

    def forward(self, proxy: Tensor, layout: Layout) -> Tensor:
        """Whiten the (centred) proxy."""
        return whitened(self.normalized(proxy, layout))
