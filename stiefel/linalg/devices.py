"""What the host may do while a device computes. Imports torch alone."""

from __future__ import annotations

import torch
from torch import Tensor


def may_wait(tensor: Tensor) -> bool:
    """Whether a step may read a tensor's values: anywhere but on a CPU the host would wait for all that is queued."""
    return tensor.device.type == "cpu"


def is_capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured on a tensor's device: values can then not be read back, not even later."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
