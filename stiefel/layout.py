"""Weights of any shape as a batch of matrices ``(b, p, n)``, p ≤ n, orthonormal rows, and back.

The only file that knows shapes, orientation, groups and the fixed scale. Imports only torch and the errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

from torch import Tensor

from stiefel.errors import LayoutError

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Layout:
    """How one weight is read as a batch of matrices with orthonormal rows.

    A weight has ``blocks`` independent matrices of ``out`` rows (outputs) and ``fan_in`` columns: one for a Linear, one
    per group of a convolution, one per gate of a recurrent weight, one per entry of a batched parameter. With
    ``group_size`` each is cut into groups of that many outputs. Where a matrix has more outputs than inputs it is
    transposed: orthonormal columns instead of rows.

    Args:
        shape: the weight's own shape, at least two dimensions.
        blocks: how many independent matrices are stacked along the output dimension.
        transposed: the kernel is ``(in, out/blocks, *k)``, as in transposed convolutions.
        batched: the leading dimensions are a batch, the last two a matrix.
        group_size: outputs per group; must divide the outputs of a block and not exceed the fan-in.
        scale: fixed scale s of the set ``{W : W Wᵀ = s² I}``.
        axes: one letter per dimension, in place of the layer's reading: ``b`` a batch, ``o`` outputs, ``i`` inputs;
            several dimensions of a letter are merged in their order.
        stride, dilation: of the convolution, empty where all are 1; they do not change how the kernel is read.

    Raises:
        LayoutError: ``blocks`` or ``group_size`` does not fit the shape.
    """

    shape: tuple[int, ...]
    blocks: int = 1
    transposed: bool = False
    batched: bool = False
    group_size: int | None = None
    scale: float = 1.0
    axes: str = ""
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.axes:
            self._check_axes()
        if self.blocks < 1 or (not (self.batched or self.axes) and self.shape[0] % self.blocks):
            side = "inputs" if self.transposed else "outputs"
            raise LayoutError(
                f"{self.shape[0]} {side} do not split into {self.blocks} equal blocks; use a positive divisor"
            )
        if self.group_size is None:
            return
        if self.group_size < 1 or self.out % self.group_size:
            divisors = [d for d in range(1, min(self.out, self.fan_in) + 1) if self.out % d == 0]
            raise LayoutError(
                f"group_size={self.group_size} does not divide the {self.out} outputs of a weight of shape "
                f"{self.shape}; use one of {divisors}"
            )
        if self.group_size > self.fan_in:
            raise LayoutError(
                f"group_size={self.group_size} exceeds the fan-in {self.fan_in} of a weight of shape {self.shape}: "
                f"no more than {self.fan_in} rows of that length can be orthonormal; use group_size ≤ {self.fan_in}"
            )

    def _check_axes(self) -> None:
        if len(self.axes) != len(self.shape) or not {"o", "i"} <= set(self.axes) <= {"b", "o", "i"}:
            raise LayoutError(
                f"axes={self.axes!r} does not read a weight of shape {self.shape}: expected {len(self.shape)} letters, "
                "one per dimension: o (outputs) and i (inputs) at least once each, b for a batch of matrices"
            )

    @cached_property
    def _order(self) -> tuple[int, ...]:
        """The dimensions of a weight with axes, in the order batch, outputs, inputs."""
        return tuple(d for letter in "boi" for d, axis in enumerate(self.axes) if axis == letter)

    def _size(self, letter: str) -> int:
        return prod(size for size, axis in zip(self.shape, self.axes, strict=True) if axis == letter)

    @property
    def _output_dimension(self) -> int:
        # The second dimension of a transposed kernel counts the outputs of one block.
        return self.shape[1] * self.blocks if self.transposed else self.shape[0]

    @cached_property
    def out(self) -> int:
        """Outputs of one block."""
        if self.axes:
            return self._size("o")
        return self.shape[-2] if self.batched else self._output_dimension // self.blocks

    @cached_property
    def fan_in(self) -> int:
        """Inputs of one block: the length of a filter."""
        if self.axes:
            return self._size("i")
        if self.batched:
            return self.shape[-1]
        if self.transposed:
            return self.shape[0] // self.blocks * prod(self.shape[2:])
        return prod(self.shape[1:])

    @cached_property
    def columns(self) -> bool:
        """Whether the constraint is on the columns (more outputs than inputs), so that matrices are transposed."""
        return self.group_size is None and self.out > self.fan_in

    @cached_property
    def in_order(self) -> bool:
        """Whether the matrices, row by row, hold the weight's entries in the weight's own order."""
        return not (self.transposed or self.columns) and self._order == tuple(range(len(self.axes)))

    @cached_property
    def matrix_shape(self) -> tuple[int, int, int]:
        """``(b, p, n)`` with p ≤ n."""
        count = self._size("b") if self.axes else prod(self.shape[:-2]) if self.batched else self.blocks
        # Groups count as independent matrices; they are never transposed, since group_size ≤ fan_in.
        if self.group_size is not None:
            return count * self.out // self.group_size, self.group_size, self.fan_in
        return (count, self.fan_in, self.out) if self.columns else (count, self.out, self.fan_in)

    def matrices(self, weight: Tensor) -> Float[Tensor, "b p n"]:
        """Read a tensor of the weight's shape (a weight, a gradient) as ``(b, p, n)``, without scaling."""
        if self.axes:
            weight = weight.permute(self._order)
        if self.transposed:
            k = prod(self.shape[2:])
            # (blocks · in, out, *k) → (blocks, in, out, k) → (blocks, out, in, k): the order of an ordinary kernel
            split = weight.reshape(self.blocks, self.shape[0] // self.blocks, self.out, k)
            weight = split.transpose(1, 2)
        # With more outputs than inputs the weight's own rows are the n: it is read as (b, n, p) and transposed.
        b, p, n = self.matrix_shape
        return weight.reshape(b, n, p).mT if self.columns else weight.reshape(b, p, n)

    def rows(self, matrices: Float[Tensor, "b p n"]) -> Float[Tensor, "b out fan"]:
        """Matrices with their outputs as rows, where columns are orthonormal transposed; its own inverse."""
        return matrices.mT if self.columns else matrices

    def tensor(self, matrices: Float[Tensor, "b p n"]) -> Tensor:
        """Inverse of :meth:`matrices`; contiguous, so that the weight is an ordinary one to kernels and exporters."""
        # (b, outputs, inputs), as in the weight
        rows = self.rows(matrices).contiguous()
        if self.transposed:
            k = prod(self.shape[2:])
            split = rows.reshape(self.blocks, self.out, self.shape[0] // self.blocks, k)
            return split.transpose(1, 2).reshape(self.shape).contiguous()
        if self.axes:
            permuted = rows.reshape([self.shape[d] for d in self._order])
            return permuted.permute([self._order.index(d) for d in range(len(self.shape))]).contiguous()
        return rows.reshape(self.shape)

    def points(self, weight: Tensor) -> Float[Tensor, "b p n"]:
        """Read a weight, or a displacement of it, as points with X Xᵀ = I: divided by the scale."""
        # The usual scale 1 costs no pass over the weight.
        return self.matrices(weight) / self.scale if self.scale != 1 else self.matrices(weight)

    def weight(self, points: Float[Tensor, "b p n"]) -> Tensor:
        """Inverse of :meth:`points`: multiplied by the scale, in the weight's own shape."""
        return self.tensor(points * self.scale if self.scale != 1 else points)

    def kernels(self, matrices: Float[Tensor, "m p n"]) -> Float[Tensor, "m out fan k"]:
        """Read matrices of this layout as convolution kernels ``(m, out, in, *k)``; of a plain matrix, k = 1."""
        rows = self.rows(matrices)
        size = self.shape[2:] if len(self.shape) > 2 and not self.batched else (1,)
        return rows.reshape(len(rows), self.out, -1, *size)

    def __str__(self) -> str:
        b, p, n = self.matrix_shape
        matrix = f"{n}×{p} columns" if self.columns else f"{p}×{n} rows"
        read = matrix if b == 1 else f"{b} × ({matrix})"
        return f"{read} of axes {self.axes}" if self.axes else read
