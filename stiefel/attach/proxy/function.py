"""``orthogonalize``: a method's map as a function of a tensor. Imports ``methods``, ``layout`` and ``linalg``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stiefel.attach.proxy.bucket import Bucket, Formula
from stiefel.constraint import Binding, Reparameterization
from stiefel.errors import LayoutError, OptionError, WeightError
from stiefel.layout import Layout
from stiefel.methods import available, get, method_class


def orthogonalize(v: Tensor, method: str = "own", *, determinant: int | None = None, **options: Any) -> Tensor:
    """The orthogonal matrix that a reparameterization computes from V, differentiable: for what a network puts out.

        rotations = stiefel.orthogonalize(hypernetwork(z).unflatten(-1, (3, 3)), determinant=1)

    Args:
        v: ``(…, p, n)``: orthonormal rows where p ≤ n, orthonormal columns otherwise; of float32, float64 or complex.
        method: a reparameterization, by name. ``own`` is the polar factor, the nearest orthogonal matrix. Those that
            rotate a start (``cayley``, ``matrix_exp``, …) rotate the identity.
        determinant: 1 or −1, of square real matrices.
        options: the method's options; ``center=False`` unless given.

    Returns:
        X of the shape, dtype and device of V, with X Xᵀ = scale² I (or XᵀX).

    Raises:
        UnknownMethodError, OptionError: no such reparameterization, option or value.
        LayoutError: V has fewer than two dimensions, or the options do not fit its shape.
        WeightError: V is of a precision in which no matrix is orthogonal.
    """
    chosen = get(method, **{**method_class(method).comparison, **options}, determinant=determinant)
    if not isinstance(chosen, Reparameterization) or chosen.claim is None or chosen.scale == "learnable":
        maps = [m for m in available() if issubclass(method_class(m), Reparameterization) and method_class(m).claim]
        raise OptionError(
            f"orthogonalize() computes X from V alone, which {chosen} does not; use a number for the scale, and one of "
            f"{', '.join(maps)}"
        )
    if v.ndim < 2:
        raise LayoutError(f"V has the shape {tuple(v.shape)}: expected (…, p, n), at least two dimensions")
    if v.dtype not in chosen.dtypes:
        raise WeightError(f"V is {v.dtype}, and {chosen} takes {', '.join(map(str, chosen.dtypes))}")
    layout = Layout(tuple(v.shape), batched=v.ndim > 2, group_size=chosen.group_size, scale=chosen.fixed_scale)
    chosen.check(layout)
    _, parts = chosen.at_identity(layout, v.dtype, v.device)
    bucket = Bucket([Formula(Binding(chosen, layout, "V"), tuple(parts), gain=False)])
    return bucket.weights([v, *parts.values()])[0]
