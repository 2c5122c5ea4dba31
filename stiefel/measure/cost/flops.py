"""What a step computes: FLOPs of products and factorizations, dispatched operators. Imports ``formulas``, ``compat``.

The numbers depend on shapes (and, for the matrix exponential, on the norm), not on the device or its load, so that two
machines agree on them. Products are counted by the formulas of :mod:`torch.utils.flop_counter`, which counts zero for
every factorization; those are in ``formulas``.

A complex multiplication and addition are 8 real operations instead of 2: complex operators count 4 times. Operators
that work entry by entry, and norms, count no FLOPs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stiefel.compat.torch_private import TorchDispatchMode, operator_of
from stiefel.errors import UncountedOperatorError
from stiefel.measure.cost.formulas import FACTORIZATIONS, OF_VALUES, PRODUCTS

aten = torch.ops.aten


@dataclass(frozen=True)
class StepCount:
    """What a step computed.

    ``matmul_flops`` are those of products and convolutions, ``factorization_flops`` those of everything from triangular
    solves to singular values; ``operators`` is the number of operators dispatched, without those that only make a view
    or allocate: nearly the number of kernels launched, the same on every device. (A ``_foreach`` operator is one.)
    ``flops`` and ``calls`` have both by operator.
    """

    matmul_flops: int
    factorization_flops: int
    operators: int
    flops: dict[str, int]
    calls: dict[str, int]


def count(step: Callable[[], object]) -> StepCount:
    """Count what one call of ``step`` computes, its backward pass and its optimizer included.

    The step runs, once, for real. What it computes outside torch's dispatcher (numpy, a kernel of one's own that is no
    operator) is not seen. A compiled function is counted as the eager one it was made of.

    Args:
        step: a function without arguments.

    Returns:
        FLOPs of products and of factorizations, and operators.

    Raises:
        UncountedOperatorError: the step uses an operator of linear algebra without a formula. It has run to its end.
    """
    with _Counting() as counting, _Values(counting):
        step()
    if counting.uncovered:
        raise UncountedOperatorError(
            f"no FLOP formula is known for {', '.join(sorted(counting.uncovered))}; zero would be wrong. Register "
            "one with torch.utils.flop_counter.register_flop_formula, or compute it with another operator"
        )
    return StepCount(
        matmul_flops=sum(n for op, n in counting.flops.items() if op not in FACTORIZATIONS),
        factorization_flops=sum(n for op, n in counting.flops.items() if op in FACTORIZATIONS),
        operators=counting.calls.total(),
        flops={op.__name__: n for op, n in counting.flops.items()},
        calls=dict(counting.calls),
    )


class _Counting(TorchDispatchMode):
    """Sees every operator as it is dispatched, below autograd and above the devices."""

    def __init__(self) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry  # here, for it imports triton where there is a GPU

        known = {**flop_registry, **PRODUCTS, **FACTORIZATIONS}
        # Products in place, such as addmm_, are operators of their own.
        in_place = {getattr(aten, f"{op.__name__}_"): f for op, f in known.items() if hasattr(aten, f"{op.__name__}_")}
        self.formulas = {**in_place, **known}
        self.flops: Counter[Any] = Counter()
        self.calls: Counter[str] = Counter()
        self.uncovered: set[str] = set()
        self.values_only = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, op = kwargs or {}, operator_of(func)
        formula = self.formulas.get(op)
        # Composite operators, which arrive whole under inference_mode, are taken apart and their parts counted.
        if formula is None and func.namespace != "prim":
            with self:  # on again: inside this method the mode is off
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if not func.is_view and op not in _ALLOCATIONS:
            self.calls[op.__name__] += 1
        if formula is not None:
            if self.values_only:
                formula = OF_VALUES.get(op, formula)
            real = formula(*args, **kwargs, out_val=out)
            self.flops[op] += round(real * (4 if _is_complex(args) else 1))  # 8 real operations instead of 2
        elif op not in _FREE and _LINEAR_ALGEBRA & set(op.__name__.split("_")):
            # Collected rather than raised, so that the step runs to its end.
            self.uncovered.add(f"{func.namespace}.{op.__name__}")
        return out


_LINEAR_ALGEBRA = {
    "linalg", "cholesky", "lu", "ldl", "solve", "spsolve", "triangular", "qr", "orgqr", "ormqr", "geqrf",
    "svd", "eig", "eigh", "symeig", "lobpcg", "det", "slogdet", "lstsq", "pinverse", "matrix", "mm",
    "addmm", "bmm", "addbmm", "baddbmm", "sspaddmm", "matmul", "mv", "addmv", "dot", "vdot", "ger", "addr",
    "linear", "bilinear", "trilinear", "conv", "convolution", "rnn", "lstm", "gru", "attention",
}  # fmt: skip
"""Words in the name of an operator that multiplies, solves or factorizes matrices, and so must have a formula."""


class _Values(TorchFunctionMode):
    """Notes calls for eigenvalues or singular values alone, without a gradient.

    Under any dispatch mode torch computes the vectors too, as it does for a gradient; those are not to be counted.
    """

    def __init__(self, counting: _Counting) -> None:
        super().__init__()
        self.counting = counting

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _ASK_FOR_VALUES or (torch.is_grad_enabled() and args and args[0].requires_grad):
            return func(*args, **(kwargs or {}))
        self.counting.values_only = True
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.counting.values_only = False


_ASK_FOR_VALUES = {
    getattr(torch.linalg, name)
    for name in ("eigvalsh", "svdvals", "eigvals", "matrix_norm", "norm", "cond", "matrix_rank")
}


def _operators(*names: str) -> set[Any]:
    """The operators of these names that this version of torch has."""
    return {getattr(aten, name) for name in names if hasattr(aten, name)}


_FREE = _operators(
    "_linalg_check_errors", "linalg_vector_norm", "linalg__powsum", "linalg_cross", "lu_unpack",
    "_cudnn_rnn_flatten_weight", "_thnn_fused_lstm_cell", "_thnn_fused_lstm_cell_backward_impl",
    "_thnn_fused_gru_cell", "_thnn_fused_gru_cell_backward",
)  # fmt: skip
"""Named like linear algebra, but checks, norms, or work entry by entry on products that are counted apart."""

_ALLOCATIONS = _operators(
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "_unsafe_view",
    "resize_", "set_",
)  # fmt: skip


def _is_complex(args: tuple[Any, ...]) -> bool:
    return any(isinstance(a, Tensor) and a.is_complex() for a in args)
