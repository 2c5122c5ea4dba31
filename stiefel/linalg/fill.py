"""A fixed matrix in general position, whose rows complete a matrix that lacks some. Imports ``precision``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stiefel.linalg.precision import has_double

if TYPE_CHECKING:
    from jaxtyping import Float


def fill_like(x: Float[Tensor, "*batch p n"]) -> Float[Tensor, "p n"]:
    """``√(2/n) cos(√2 k²)``, k = 1 … pn by rows: singular values like those of a Gaussian matrix with unit rows.

    Where V lacks left singular directions u and right ones w, V + E has them if uᴴEw is far from singular. Rows or
    columns of the identity, of a Fourier or a cosine transform would not do as E: blocks of neighbouring rows and
    columns of those are singular to rounding. The phases √2 k² are equidistributed (Weyl), and need no generator's
    state, no memory between calls and nothing from the host.
    """
    p, n = x.shape[-2:]
    # In double: √2 k² exceeds 2²⁴ from about k = 3400 on, where float32 has no digits after the point.
    device = x.device if has_double(x.device) else torch.device("cpu")
    k = torch.arange(1, p * n + 1, dtype=torch.float64, device=device)
    return ((2 / n) ** 0.5 * torch.cos(2**0.5 * k.square())).reshape(p, n).to(x.dtype).to(x.device, non_blocking=True)
