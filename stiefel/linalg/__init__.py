"""Functions of matrices ``(*batch, p, n)`` and their gradients. Imports torch, numpy, the errors and ``compat``."""

from stiefel.linalg.activations import WHITENINGS, whitening_of
from stiefel.linalg.cayley import cayley_along, cayley_step, limited
from stiefel.linalg.covariance import affine_map
from stiefel.linalg.determinant import with_determinant
from stiefel.linalg.devices import is_capturing, may_wait, refuse_capture
from stiefel.linalg.exponential import exponential_step, matrix_exponential
from stiefel.linalg.householder import householder_rows, householder_vectors
from stiefel.linalg.iteration import iterated
from stiefel.linalg.lu import one_by_one
from stiefel.linalg.lyapunov import lyapunov
from stiefel.linalg.msign import msign
from stiefel.linalg.nested import nested_gradients
from stiefel.linalg.norm import largest_singular_value, spectral_radius
from stiefel.linalg.polar import polar
from stiefel.linalg.precision import (
    EXACT_DTYPES,
    full_precision,
    has_double,
    in_double,
    require_exact,
    use_double,
    widened,
)
from stiefel.linalg.products import (
    add_product,
    are_finite,
    balance,
    frobenius,
    gram_residual,
    is_orthonormal,
    is_short,
    newton_schulz,
    skew,
    squared_residual,
    sym,
    unit_sized,
)
from stiefel.linalg.qr import qf
from stiefel.linalg.span import project_horizontal, with_horizontal_gradient
from stiefel.linalg.spectral_map import spectral_map
from stiefel.linalg.svd import nearest_in_step, nearest_orthonormal, nearest_where
from stiefel.linalg.tracing import is_traced, readable, state_of
from stiefel.linalg.whitened_operation import whitened_batch
from stiefel.linalg.whitening import whitened

__all__ = [
    "EXACT_DTYPES",
    "WHITENINGS",
    "add_product",
    "affine_map",
    "are_finite",
    "balance",
    "cayley_along",
    "cayley_step",
    "exponential_step",
    "frobenius",
    "full_precision",
    "gram_residual",
    "has_double",
    "householder_rows",
    "householder_vectors",
    "in_double",
    "is_capturing",
    "is_orthonormal",
    "is_short",
    "is_traced",
    "iterated",
    "largest_singular_value",
    "limited",
    "lyapunov",
    "matrix_exponential",
    "may_wait",
    "msign",
    "nearest_in_step",
    "nearest_orthonormal",
    "nearest_where",
    "nested_gradients",
    "newton_schulz",
    "one_by_one",
    "polar",
    "project_horizontal",
    "qf",
    "readable",
    "refuse_capture",
    "require_exact",
    "skew",
    "spectral_map",
    "spectral_radius",
    "squared_residual",
    "state_of",
    "sym",
    "unit_sized",
    "use_double",
    "whitened",
    "whitened_batch",
    "whitening_of",
    "widened",
    "with_determinant",
    "with_horizontal_gradient",
]
