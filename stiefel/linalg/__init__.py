"""Batched matrix functions and their gradients. Every function takes ``(*batch, p, n)`` and imports only torch."""

from stiefel.linalg.cayley import cayley_step
from stiefel.linalg.lyapunov import lyapunov
from stiefel.linalg.polar import polar
from stiefel.linalg.precision import EXACT_DTYPES, full_precision
from stiefel.linalg.products import gram_residual, newton_schulz, skew, sym
from stiefel.linalg.qr import qf
from stiefel.linalg.svd import nearest_orthonormal

__all__ = [
    "EXACT_DTYPES",
    "cayley_step",
    "full_precision",
    "gram_residual",
    "lyapunov",
    "nearest_orthonormal",
    "newton_schulz",
    "polar",
    "qf",
    "skew",
    "sym",
]
