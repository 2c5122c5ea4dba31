"""Symmetric and skew parts, the Gram residual, a safe norm, sums of products. Imports ``precision``, ``tracing``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stiefel.linalg.devices import may_wait
from stiefel.linalg.precision import full_precision, has_double, real_dtype, wide_dtype, widened
from stiefel.linalg.tracing import readable

if TYPE_CHECKING:
    from jaxtyping import Float

PLAIN = (1e-12, 1e12)
"""Norms in this range are right without rescaling: no square overflows, and those that underflow do not matter."""
BLOCK = 64
"""Number of entries whose squares are summed in their own precision; the sums of such blocks are added in double."""
MODERATE = (1e-6, 1e6)
"""Matrices with norms in this range are left as they are: not even fourth powers of them overflow, or vanish."""


def sym(a: Float[Tensor, "*batch p p"]) -> Float[Tensor, "*batch p p"]:
    """Symmetric part, ``(A + Aᴴ)/2``."""
    return (a + a.mH) / 2


def skew(a: Float[Tensor, "*batch p p"]) -> Float[Tensor, "*batch p p"]:
    """Skew part, ``(A − Aᴴ)/2``."""
    return (a - a.mH) / 2


def are_finite(x: Tensor) -> Tensor:
    """Whether each number is finite, in two operations: ∞ − ∞ is NaN, which equals nothing."""
    return x - x == 0


def gram_residual(x: Float[Tensor, "*batch p n"]) -> Float[Tensor, "*batch p p"]:
    """How far the rows are from orthonormal: ``X Xᴴ − I``, its diagonal as exact as X is."""
    return _set_diagonal(x @ x.mH, _squared_lengths(x) - 1)


def gram_matrix(x: Float[Tensor, "*batch p n"]) -> Float[Tensor, "*batch p p"]:
    """``X Xᴴ``, its diagonal exact to one rounding.

    A matrix product sums a row's squares in its own precision: beside one large entry, as in a row of the identity,
    small squares are rounded away one by one, all in the same direction. After Adam's first step of 2.4e-4 from the
    identity float32 misses 2e-5 of the length of rows of 1152.
    """
    return _set_diagonal(x @ x.mH, _squared_lengths(x))


def _squared_lengths(x: Tensor) -> Tensor:
    """``‖xᵢ‖²`` of each row in double, added up block by block."""
    if not may_wait(x) and has_double(x.device):  # one operation that adds in double; on a CPU blocks are quicker
        return torch.linalg.vector_norm(x, dim=-1, dtype=wide_dtype(x)).square()
    # Blocks are (*batch, p, whole // BLOCK, BLOCK); the last n % BLOCK entries are a shorter block.
    whole = x.shape[-1] - x.shape[-1] % BLOCK
    blocks = torch.linalg.vector_norm(x[..., :whole].unflatten(-1, (whole // BLOCK, BLOCK)), dim=-1)
    rest = torch.linalg.vector_norm(x[..., whole:], dim=-1)
    return widened(blocks).square().sum(-1) + widened(rest).square()


def _set_diagonal(a: Tensor, values: Tensor) -> Tensor:
    """Replace A's diagonal in place; the gradient stays that of A."""
    diagonal = a.diagonal(dim1=-2, dim2=-1)
    # The correction, a rounding error, is added as a constant.
    diagonal.add_((values - diagonal.real).to(a.dtype).detach())
    return a


def is_orthonormal(gram: Float[Tensor, "*batch p p"]) -> bool:
    """Whether Gram matrices are known to be I to rounding; False where the test would make the host wait."""
    if not readable(gram) or not gram.numel():
        return False
    delta = gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    most = 4 * torch.finfo(gram.dtype).eps * gram.shape[-1] ** 0.5
    return bool(torch.linalg.vector_norm(delta, dim=(-2, -1)).max() <= most)


def add_product(
    c: Float[Tensor, "*batch p n"], a: Float[Tensor, "*batch p q"], b: Float[Tensor, "*batch q n"], alpha: float = 1.0
) -> Float[Tensor, "*batch p n"]:
    """``C + α A B``, in one pass over C where all have the same batch dimension."""
    if c.ndim == a.ndim == b.ndim == 3 and len(c) == len(a) == len(b):
        return torch.baddbmm(c, a, b, alpha=alpha)
    return c + alpha * (a @ b)


def newton_schulz(x: Float[Tensor, "*batch p n"]) -> Float[Tensor, "*batch p n"]:
    """One Newton-Schulz step towards the polar factor, ``X − ½(XXᴴ − I)X``.

    A residual of norm ``e`` becomes about ``¾e²``: applied to a nearly orthonormal X it removes accumulated rounding
    at the price of two matrix products (Björck and Bowie, 1971).
    """
    return add_product(x, gram_residual(x), x, alpha=-0.5)


def squared_residual(x: Float[Tensor, "b p n"]) -> Float[Tensor, " b"]:
    """``‖X Xᴴ − I‖_F²`` of each matrix, and its gradient ``4 (X Xᴴ − I) X``: two products; autograd takes three."""
    return _SquaredResidual.apply(x)[0]


class _SquaredResidual(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        delta = gram_residual(x)
        return torch.linalg.vector_norm(delta, dim=(-2, -1)).square(), delta

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        x, delta = ctx.saved_tensors
        with full_precision(x.device):
            if torch.is_grad_enabled():
                # Computed again, so that a second derivative includes that of Δ.
                delta = gram_residual(x)
            return (4 * gradients[0][..., None, None] * delta) @ x


def inner(a: Float[Tensor, "b p n"], b: Float[Tensor, "b p n"]) -> Float[Tensor, "b 1 1"]:
    """``Re tr(A Bᴴ)`` of each pair, in a shape that scales matrices."""
    return torch.linalg.vecdot(a.flatten(1), b.flatten(1)).real[:, None, None]


def frobenius(b: Float[Tensor, "*batch p n"]) -> Float[Tensor, "*batch 1 1"]:
    """``‖B‖_F``, also where the squares of B's entries overflow or vanish."""
    if b.numel() and readable(b):
        plain = torch.linalg.vector_norm(b, dim=(-2, -1), keepdim=True)
        smallest, largest = plain.detach().aminmax()
        if smallest > PLAIN[0] and largest < PLAIN[1]:  # one pass, and no tensor of B's size
            return plain
    if not may_wait(b) and has_double(b.device):
        return torch.linalg.vector_norm(b, dim=(-2, -1), keepdim=True, dtype=wide_dtype(b)).to(real_dtype(b.dtype))
    # Divided by the largest entry, so that no square overflows; by absolute values, since a division of complex numbers
    # is inaccurate at the ends of the range.
    sizes = b.abs()
    largest = sizes.amax(dim=(-2, -1), keepdim=True)
    return largest * torch.linalg.matrix_norm(sizes / torch.where(largest > 0, largest, 1.0), keepdim=True)


def balance(b: Float[Tensor, "*batch p n"]) -> Float[Tensor, "*batch 1 1"]:
    """The constant ``‖B‖_F/√p`` that makes B's rows as long as those of an orthonormal matrix; 1 where B = 0."""
    c = frobenius(b.detach()) / b.shape[-2] ** 0.5
    return c + (c == 0)


def is_short(b: Float[Tensor, "*batch p n"]) -> bool:
    """Whether every matrix is known to have ``‖B‖_F ≤ √p``: a rotation along B then turns by a radian or so."""
    return readable(b) and (not b.numel() or float(balance(b).max()) <= 1)


def unit_sized(v: Float[Tensor, "*batch p n"]) -> Float[Tensor, "*batch p n"]:
    """``2^k V``, k such that each matrix's largest entry is in [½, 1): for maps that do not depend on V's size.

    No digit changes: the map's result is bit for bit the same for V times any power of two, and its gradient is that at
    ``2^k V`` times 2^k, also where squares of V's entries would overflow or vanish. V = 0 has no direction, and counts
    as [I, 0]. On a CPU, a batch of moderate size is returned as it is.

    Args:
        v: finite. Where its size is below 1e-38 the gradient may exceed the range of float32, and is then infinite.
    """
    fixed = v.detach()
    if fixed.numel() and readable(fixed):
        smallest, largest = torch.linalg.vector_norm(fixed, dim=(-2, -1)).aminmax()
        if smallest > MODERATE[0] and largest < MODERATE[1]:
            return v
    sizes = torch.maximum(fixed.real.abs(), fixed.imag.abs()) if fixed.is_complex() else fixed.abs()
    largest = sizes.amax(dim=(-2, -1), keepdim=True)
    # k can be 148 for the smallest float32, and 2^148 overflows: V is multiplied by two factors, one after the other.
    exponent = -torch.frexp(largest).exponent
    half = exponent.div(2, rounding_mode="floor")
    instead = torch.eye(*v.shape[-2:], dtype=v.dtype, device=v.device) * (largest == 0)
    return v * torch.exp2(half.to(largest.dtype)) * torch.exp2((exponent - half).to(largest.dtype)) + instead
