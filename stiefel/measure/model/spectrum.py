"""Spectra of positive semidefinite matrices: all eigenvalues of small ones, the ends and the rank of large ones.

Imports numpy, scipy and ``linalg``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from stiefel.linalg import in_double

if TYPE_CHECKING:
    from jaxtyping import Float

EXACT_TO = 1024
"""Largest matrix whose eigenvalues are all computed: up to some 2,000 rows the ends alone take as long."""
Product = Callable[[Tensor], Tensor]
"""Of an operator with a vector."""
TIGHT = 1e-10
"""Relative residual at which the Lanczos iteration stops; the eigenvalue's own error is far smaller."""


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of a positive semidefinite matrix of ``size`` rows; NaN throughout where the matrix is not finite.

    ``rank`` counts the eigenvalues above what rounding makes of zero, and ``smallest`` is the least of them (0 at rank
    0); ``largest`` is the greatest. ``trace`` is their sum, and ``effective_rank`` (Σλ)²/Σλ², between 1 and the rank:
    how many equal eigenvalues would have that sum and that sum of squares. ``eigenvalues`` are all, descending, zero
    below the rank; None where only the ends were computed.
    """

    size: int
    rank: int
    largest: float
    smallest: float
    trace: float
    effective_rank: float
    eigenvalues: Float[Tensor, " d"] | None = field(default=None, compare=False)

    @property
    def condition(self) -> float:
        """λ max/λ min over the whole spectrum: infinite below full rank."""
        return math.inf if self.rank < self.size and not math.isnan(self.largest) else self.condition_nonzero

    @property
    def condition_nonzero(self) -> float:
        """λ max/λ min over the ``rank`` eigenvalues that are not zero; NaN where there is none."""
        if not self.rank:
            return math.nan
        return self.largest / self.smallest if self.smallest else math.inf  # where a product of small ones is 0


def spectrum(
    matrix: Float[Tensor, "m m"], *, size: int | None = None, floor: float = 0.0, exact_to: int = EXACT_TO
) -> Spectrum:
    """The spectrum of a Hermitian positive semidefinite matrix.

    Up to ``exact_to`` rows all eigenvalues (LAPACK). Above, where the rank is full, its ends: λ max by the Lanczos
    iteration (ARPACK), λ min by that with (M − τI)⁻¹, whose Cholesky factor exists. A larger singular matrix is
    decomposed too: it has no such factor, and to count its zeros takes as long. An eigenvalue up to

        τ = max(m ε λ max, floor)

    counts as zero: the first is the rounding error of M and of its eigenvalues.

    Args:
        matrix: in any precision; computed in double.
        size: rows of the matrix meant, whose other eigenvalues are zero; the rows given by default.
        floor: what rounding may have made of a zero eigenvalue before, in the numbers of which M was computed.
        exact_to: rows.

    Source: Lehoucq, Sorensen and Yang, *ARPACK Users' Guide*, SIAM 1998, section 3.2 (shift and invert).
    """
    m = in_double(matrix.detach()).cpu()
    size = size or len(m)
    if not bool(torch.isfinite(m).all()):
        return Spectrum(size, 0, math.nan, math.nan, math.nan, math.nan)
    # Scaled by a power of two, so that no square or shift leaves the range of numbers.
    unit = 2.0 ** math.frexp(m.abs().max().item())[1] if len(m) else 1.0
    m = m / unit
    trace, squares = m.diagonal().real.sum().item(), torch.linalg.vector_norm(m).item() ** 2
    if not squares > 0:
        return Spectrum(size, 0, 0.0, 0.0, 0.0, 0.0, torch.zeros(size, dtype=torch.float64))
    rounding, floor = len(m) * torch.finfo(torch.float64).eps, floor / unit
    if len(m) > exact_to and (ends := _ends(m, rounding, floor)):
        return Spectrum(size, len(m), unit * ends[0], unit * ends[1], unit * trace, trace**2 / squares)
    values = torch.linalg.eigvalsh(m).flip(0)
    values = torch.where(values > max(rounding * values[0].item(), floor), values, 0.0)
    rank = int((values > 0).sum())
    smallest = values[rank - 1].item() if rank else 0.0
    whole = unit * torch.cat([values, values.new_zeros(size - len(values))])
    return Spectrum(size, rank, unit * values[0].item(), unit * smallest, unit * trace, trace**2 / squares, whole)


def union(spectra: Iterable[Spectrum]) -> Spectrum:
    """The spectrum of a block diagonal matrix from those of its blocks."""
    parts = list(spectra)
    if len(parts) == 1:
        return parts[0]
    if any(math.isnan(part.largest) for part in parts):
        return Spectrum(sum(part.size for part in parts), 0, math.nan, math.nan, math.nan, math.nan)
    known = [part.eigenvalues for part in parts if part.eigenvalues is not None]
    largest = max(part.largest for part in parts)
    traces = [part.trace / largest if largest else 0.0 for part in parts]  # whose squares are in range
    squares = sum(t**2 / part.effective_rank for t, part in zip(traces, parts, strict=True) if t)
    return Spectrum(
        size=sum(part.size for part in parts),
        rank=sum(part.rank for part in parts),
        largest=largest,
        smallest=min((part.smallest for part in parts if part.rank), default=0.0),
        trace=sum(part.trace for part in parts),
        effective_rank=sum(traces) ** 2 / squares if squares else 0.0,
        eigenvalues=torch.cat(known).sort(descending=True)[0] if len(known) == len(parts) else None,
    )


def kronecker(a: Spectrum, b: Spectrum) -> Spectrum:
    """The spectrum of A ⊗ B, whose eigenvalues are all products; its ends, not the products themselves."""
    return Spectrum(
        a.size * b.size,
        a.rank * b.rank,
        a.largest * b.largest,
        a.smallest * b.smallest,
        a.trace * b.trace,
        a.effective_rank * b.effective_rank,
    )


def _ends(m: Tensor, rounding: float, floor: float) -> tuple[float, float] | None:
    """The greatest and the least eigenvalue of a matrix of full rank; None of any other."""
    from scipy.linalg import cho_factor, cho_solve

    try:
        largest = lanczos(m.mv, len(m), m.dtype)
        shift = max(rounding * largest, floor)
        shifted = m.clone()
        shifted.diagonal().sub_(shift)
        factor = cho_factor(shifted.numpy(), lower=True, check_finite=False)  # exists where all are above the shift
        # The eigenvalue next above the shift is the greatest one of the inverse.
        inverse = lanczos(lambda v: torch.from_numpy(cho_solve(factor, v.numpy(), check_finite=False)), len(m), m.dtype)
    except (np.linalg.LinAlgError, RuntimeError):  # no factor; ArpackNoConvergence is a RuntimeError
        return None
    return largest, shift + 1 / inverse


def lanczos(product: Product, size: int, dtype: torch.dtype, tolerance: float = TIGHT) -> float:
    """The greatest eigenvalue of a Hermitian operator, by ARPACK.

    Args:
        product: of the operator with a vector (size,) on the CPU.
        size: 3 or more.
        dtype: float64 or complex128.
        tolerance: of the residual, relative to the eigenvalue.

    Raises:
        ArpackNoConvergence: a RuntimeError; after 10 ``size`` restarts.
    """
    from scipy.sparse.linalg import LinearOperator, eigsh

    # A fixed start in general position: the same number for the same matrix.
    start = torch.from_numpy(np.random.default_rng(0).standard_normal(size)).to(dtype).numpy()
    operator = LinearOperator(
        (size, size), matvec=lambda v: product(torch.from_numpy(v.reshape(-1))).numpy(), dtype=start.dtype
    )
    found = eigsh(operator, k=1, which="LA", v0=start, tol=tolerance, return_eigenvectors=False)
    return float(found[0].real)
