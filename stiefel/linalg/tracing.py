"""Whether code runs on ordinary tensors, or is being traced or transformed, and whether these are what they were.

Imports ``compat`` and ``devices``.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from stiefel.compat.torch_private import forward_levels, is_functorch_active, version
from stiefel.linalg.devices import may_wait


def is_traced() -> bool:
    """Whether a compiler traces, or a torch.func transform runs: values cannot be read then, or not as numbers."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or is_functorch_active()


def readable(tensor: Tensor) -> bool:
    """Whether a tensor's values can be read without waiting for a device."""
    # A FakeTensor reports a device, but has no values.
    return may_wait(tensor) and not is_traced() and not hasattr(tensor, "fake_mode")


def refuse_nested_forward_mode() -> None:
    """Refuse a forward derivative within another, for the ``jvp`` of an autograd.Function.

    torch runs that with forward mode off, so that the outer derivative would silently lack all that passes through it.
    """
    if forward_levels() > 1:
        raise RuntimeError(
            "forward-mode derivatives (torch.func.jvp, jacfwd) of forward-mode derivatives are not supported by torch "
            "for operations with a derivative of their own, which orthogonalization and whitening have; use reverse "
            "mode (grad, jacrev) for one of the two, such as torch.func.hessian, or for all but one"
        )


def state_of(tensor: Tensor) -> tuple[Hashable, ...]:
    """What is another where a tensor was written to, moved or replaced; but for writes to its ``data``."""
    return version(tensor), tensor.data_ptr(), tensor.dtype, tensor.device
