"""Floating-point operations of factorizations, and of the products that torch does not count. Imports ``compat``.

To leading order, from

- GVL: Golub & Van Loan, *Matrix Computations*, 4th edition, 2013,
- LAWN 41: Blackford & Dongarra, *Installation Guide for LAPACK*, LAPACK Working Note 41, appendix C, 1999.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from stiefel.compat.torch_private import takes_tensors

aten = torch.ops.aten

Formula = Callable[..., float]
"""Takes the operator's arguments and its result ``out_val``; returns the FLOPs as if all numbers were real."""


# --- operations on one matrix, m×n with k reflectors or k = min(m, n) ---


def lu_flops(m: int, n: int) -> float:
    """LU with partial pivoting, 2mnk − (m + n)k² + 2k³/3 with k = min(m, n): 2n³/3 if square (GVL 3.2; LAWN 41)."""
    k = min(m, n)
    return 2 * m * n * k - (m + n) * k**2 + 2 * k**3 / 3


def reflections_flops(m: int, n: int, k: int) -> float:
    """k reflectors applied one by one to a shrinking m×n matrix, 4mnk − 2(m + n)k² + 4k³/3 (LAWN 41).

    It is both the cost of a Householder QR, where k = min(m, n) (GEQRF), and of forming n columns of Q (ORGQR).
    """
    return 4 * m * n * k - 2 * (m + n) * k**2 + 4 * k**3 / 3


def svd_flops(m: int, n: int, vectors: str | None) -> float:
    """SVD by bidiagonalization, of the matrix or of its R factor, whichever is cheaper (GVL, figure 8.6.1).

    Args:
        m: rows.
        n: columns.
        vectors: None for singular values alone, ``"one side"``, ``"thin"`` (U₁ and V), or ``"full"``.
    """
    # Of the matrix itself, and of its R factor after a QR, which pays for tall matrices.
    m, n = max(m, n), min(m, n)
    full = (4 * m**2 * n + 8 * m * n**2 + 9 * n**3, 4 * m**2 * n + 22 * n**3)
    return min(
        {
            None: (4 * m * n**2 - 4 * n**3 / 3, 2 * m * n**2 + 2 * n**3),
            "one side": (4 * m * n**2 + 8 * n**3, 2 * m * n**2 + 11 * n**3),
            "thin": (14 * m * n**2 + 8 * n**3, 6 * m * n**2 + 20 * n**3, *full),
            "full": full,
        }[vectors]
    )


def eigh_flops(n: int, vectors: bool) -> float:
    """Symmetric eigenvalues 4n³/3, with eigenvectors 9n³ (GVL 8.3.3)."""
    return 9 * n**3 if vectors else 4 * n**3 / 3


def eig_flops(n: int, vectors: bool) -> float:
    """Eigenvalues 10n³; real Schur form 25n³ (GVL 7.5.6), its eigenvectors n³/3 and their product with Q n³ more."""
    return (25 + 4 / 3) * n**3 if vectors else 10 * n**3


# θ of the degrees 1, 2, 4, 8, 12, 18: up to this ‖A‖₁ the polynomial is exact to rounding.
_THETA = {
    torch.float32: (1.192092800768788e-07, 5.978858893805233e-04, 5.116619363445086e-02, 5.800524627688768e-01,
                    1.461661507209034e00, 3.010066362817634e00),
    torch.float64: (2.220446049250313e-16, 2.580956802971767e-08, 3.397168839976962e-04, 4.991228871115323e-02,
                    2.996158913811580e-01, 1.090863719290036e00),
}  # fmt: skip


def exponential_products(a: Tensor) -> int:
    """Products of n×n matrices that torch takes for ``exp(A)`` of all matrices of ``a``.

    Taylor polynomials of degree 1, 2, 4, 8, 12, 18 take 0 to 5 products, up to ‖A‖₁ ≤ θ of the degree, beyond which
    the last is squared ⌈log₂(‖A‖₁/θ₁₈)⌉ times. In a batch torch uses the last degree for every matrix.

    Source: Bader, Blanes & Casas, *Computing the matrix exponential with an optimized Taylor polynomial approximation*,
    Mathematics 7(12), 2019, sections 3–4, as in torch's ``linalg_matrix_exp``.
    """
    n = a.shape[-1]
    if n <= 1 or a.numel() == 0:
        return 0
    theta = _THETA[torch.float64 if a.dtype in (torch.float64, torch.complex128) else torch.float32]
    # ‖A‖₁, the largest column sum, of each matrix.
    norms = a.detach().abs().sum(-2).amax(-1).flatten().tolist()
    if len(norms) == 1 and norms[0] <= theta[-1]:
        return next(products for products, bound in enumerate(theta) if norms[0] <= bound)
    return sum(5 + (math.ceil(math.log2(v / theta[-1])) if theta[-1] < v < math.inf else 0) for v in norms)


# --- the dispatched operators ---


def _batch(a: Tensor) -> int:
    return prod(a.shape[:-2])


def _solves(per_entry: float) -> Formula:
    """A formula ``per_entry`` · n · (entries of the solution), of a factor that is the operator's argument 0."""
    return lambda a, *_, out_val, **__: per_entry * a.shape[-1] * _first(out_val).numel()


def _first(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def _of_square(flops: Callable[[int], float]) -> Formula:
    return lambda a, *_, out_val, **__: _batch(a) * flops(a.shape[-1])


def _lu(a: Tensor, *_: Any, **__: Any) -> float:
    return _batch(a) * lu_flops(*a.shape[-2:])


def _solve(a: Tensor, *_: Any, out_val: Any, **__: Any) -> float:
    # Two triangular solves, n² each for a right-hand side of length n.
    return _lu(a) + 2 * a.shape[-1] * out_val[0].numel()


def _qr(a: Tensor, mode: str = "reduced", *_: Any, **__: Any) -> float:
    # R alone, or also the first k columns of Q ("reduced"), or all m of them ("complete").
    (m, n), k = a.shape[-2:], min(a.shape[-2:])
    factor = reflections_flops(m, n, k)
    return _batch(a) * (factor + {"r": 0, "reduced": reflections_flops(m, k, k)}.get(mode, reflections_flops(m, m, k)))


def _svd(a: Tensor, full_matrices: bool = False, compute_uv: bool = True, **_: Any) -> float:
    vectors = None if not compute_uv else "full" if full_matrices else "thin"
    return _batch(a) * svd_flops(a.shape[-2], a.shape[-1], vectors)


def _eigh(a: Tensor, uplo: str = "L", compute_v: bool = True, **_: Any) -> float:
    return _batch(a) * eigh_flops(a.shape[-1], compute_v)


def _reflectors(a: Tensor, tau: Tensor, **_: Any) -> float:
    return _batch(a) * reflections_flops(a.shape[-2], a.shape[-1], tau.shape[-1])


def _multiply_reflectors(a: Tensor, tau: Tensor, c: Tensor, left: bool = True, *_: Any, **__: Any) -> float:
    """Q C or C Q of k reflectors, 4mnk − 2nk² for an m×n C from the left (LAWN 41, ORMQR)."""
    m, n = c.shape[-2:] if left else reversed(c.shape[-2:])
    k = tau.shape[-1]
    return _batch(c) * (4 * m * n * k - 2 * n * k**2)


def _least_squares(a: Tensor, b: Tensor, rcond: Any = None, *, driver: str | None = None, out_val: Any) -> float:
    """QR, Qᴴb and a triangular solve (GVL 5.3.2); or, by the SVD drivers, Σ and V with Uᴴb as it goes (GVL 5.5.4)."""
    m, n = max(a.shape[-2:]), min(a.shape[-2:])
    # Right-hand sides of each system: the solution is (*batch, n, columns).
    columns = out_val[0].numel() / max(1, a.shape[-1] * _batch(a))
    if driver in ("gelsd", "gelss"):
        return _batch(a) * (svd_flops(m, n, "one side") + columns * (2 * m * n + 2 * n**2))
    return _batch(a) * (reflections_flops(m, n, n) + columns * (4 * m * n - 2 * n**2 + n**2))


def _pseudoinverse(a: Tensor, *_: Any, hermitian: bool = False, **__: Any) -> float:
    (m, n), k = a.shape[-2:], min(a.shape[-2:])
    return _batch(a) * ((eigh_flops(n, True) if hermitian else svd_flops(m, n, "thin")) + 2 * m * n * k)


def _exponential(a: Tensor, **_: Any) -> float:
    return exponential_products(a) * 2 * a.shape[-1] ** 3


_FACTORIZATIONS: dict[str, Formula] = {
    "_linalg_eigh": _eigh,
    "linalg_eig": _of_square(lambda n: eig_flops(n, True)),
    "linalg_eigvals": _of_square(lambda n: eig_flops(n, False)),
    "_linalg_eigvals": _of_square(lambda n: eig_flops(n, False)),
    "_linalg_svd": _svd,
    "linalg_qr": _qr,
    "geqrf": lambda a, **_: _batch(a) * reflections_flops(a.shape[-2], a.shape[-1], min(a.shape[-2:])),
    "linalg_householder_product": _reflectors,
    "ormqr": _multiply_reflectors,
    "linalg_lu": _lu,
    "linalg_lu_factor_ex": _lu,
    "_linalg_det": _lu,
    "_linalg_slogdet": _lu,
    "linalg_lu_solve": _solves(2),
    "_linalg_solve_ex": _solve,
    "linalg_inv_ex": _of_square(lambda n: 2 * n**3),  # LU 2n³/3 and GETRI 4n³/3 (LAWN 41)
    "linalg_cholesky_ex": _of_square(lambda n: n**3 / 3),  # GVL 4.2.5
    "cholesky": _of_square(lambda n: n**3 / 3),
    "cholesky_inverse": _of_square(lambda n: 2 * n**3 / 3),  # POTRI (LAWN 41)
    "cholesky_solve": lambda b, factor, *_, out_val, **__: 2 * factor.shape[-1] * out_val.numel(),
    "linalg_ldl_factor_ex": _of_square(lambda n: n**3 / 3),  # GVL 4.4.4
    "linalg_ldl_solve": _solves(2),
    "linalg_solve_triangular": _solves(1),  # n² per right-hand side (GVL 3.1)
    "triangular_solve": lambda b, factor, *_, out_val, **__: factor.shape[-1] * out_val[0].numel(),
    "linalg_lstsq": _least_squares,
    "linalg_pinv": _pseudoinverse,
    "linalg_matrix_exp": _exponential,
}


def _rnn(inputs: Tensor, weights: list[Tensor], passes: int) -> float:
    """A product with every matrix at every time step of every sequence; twice that backward."""
    return passes * 2 * inputs.numel() / inputs.shape[-1] * sum(w.numel() for w in weights if w.ndim == 2)


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, *args: Any, out_val: Any = None, **kwargs: Any
) -> float:
    """As many products as forward for each gradient wanted; torch's own formula ignores groups in the weight's."""
    # After the weight: bias_sizes, stride, padding, dilation, transposed, output_padding, groups, output_mask. The mask
    # says which of ∂x, ∂weight, ∂bias are wanted.
    transposed, mask = args[4], args[7]
    positions = prod((x if transposed else grad).shape[2:]) * x.shape[0]
    return 2 * positions * weight.numel() * (bool(mask[0]) + bool(mask[1]))


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> float:
    # Scores QKᵀ, length × keys × width, and their product with the values.
    batch, heads, length, width = query.shape
    return 2 * batch * heads * length * key.shape[-2] * (width + value.shape[-1])


def _trilinear(a: Tensor, b: Tensor, c: Tensor, *expand: Any, **_: Any) -> float:
    """Two multiplications and an addition per entry of the product of three, as ``F.bilinear`` takes it."""
    shapes = []
    for x, dims in zip((a, b, c), expand[:3], strict=True):
        for dim in dims:
            x = x.unsqueeze(dim)
        shapes.append(x.shape)
    return 3 * prod(torch.broadcast_shapes(*shapes))


_PRODUCTS: dict[str, Formula] = {
    "mv": lambda a, x, **_: 2 * a.numel(),
    "addmv": lambda y, a, x, **_: 2 * a.numel(),
    "dot": lambda x, y, **_: 2 * x.numel(),
    "vdot": lambda x, y, **_: 2 * x.numel(),
    "addr": lambda a, x, y, **_: 2 * x.numel() * y.numel(),
    "addbmm": lambda c, a, b, **_: 2 * a.numel() * b.shape[-1],
    "_trilinear": _trilinear,
    "_int_mm": lambda a, b, **_: 2 * a.numel() * b.shape[-1],
    "_addmm_activation": lambda c, a, b, **_: 2 * a.numel() * b.shape[-1],
    "_cudnn_rnn": lambda x, weights, *_, **__: _rnn(x, weights, 1),
    "_cudnn_rnn_backward": lambda x, weights, *_, **__: _rnn(x, weights, 2),
    "mkldnn_rnn_layer": lambda x, *weights, **_: _rnn(x, list(weights[:2]), 1),
    "mkldnn_rnn_layer_backward": lambda x, *weights, **_: _rnn(x, list(weights[:2]), 2),
    "convolution_backward": _convolution_backward,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    # Backward: the scores again, and the gradients of value, of the scores, of query and key (Dao et al., 2022).
    "_scaled_dot_product_flash_attention_for_cpu_backward": lambda grad, *qkv, **_: 2.5 * _attention(*qkv),
}


def _by_operator(formulas: dict[str, Formula]) -> dict[Any, Formula]:
    found = {getattr(aten, name): formula for name, formula in formulas.items() if hasattr(aten, name)}
    for formula in found.values():
        takes_tensors(formula)
    return found


OF_VALUES = _by_operator(
    {
        "_linalg_eigh": _of_square(lambda n: eigh_flops(n, False)),
        "_linalg_svd": lambda a, *_, **__: _batch(a) * svd_flops(a.shape[-2], a.shape[-1], None),
        "linalg_eig": _of_square(lambda n: eig_flops(n, False)),
    }
)
"""Formulas of the operators that compute values and vectors, for the values alone."""

FACTORIZATIONS = _by_operator(_FACTORIZATIONS)
"""Formula of each operator that factorizes or solves; fits ``FlopCounterMode(custom_mapping=FACTORIZATIONS)``."""

PRODUCTS = _by_operator(_PRODUCTS)
"""Formulas of products that torch's registry lacks, or has wrong."""
