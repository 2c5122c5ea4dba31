"""Whether code runs on ordinary tensors, or is being traced or transformed. Imports only torch."""

from __future__ import annotations

import torch
from torch import Tensor


def is_traced() -> bool:
    """Whether a compiler traces, or a torch.func transform runs: values cannot be read then, or not as numbers."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None


def readable(tensor: Tensor) -> bool:
    """Whether numbers of a tensor can be read, without waiting for a device."""
    return tensor.device.type == "cpu" and not is_traced() and not hasattr(tensor, "fake_mode")
