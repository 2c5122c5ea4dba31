"""What the host may do while a device computes. Imports ``errors``."""

from __future__ import annotations

import torch
from torch import Tensor

from stiefel.errors import OptimizerError


def may_wait(tensor: Tensor) -> bool:
    """Whether a step may read a tensor's values: anywhere but on a CPU the host would wait for all that is queued."""
    return tensor.device.type == "cpu"


def is_capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured on a tensor's device: values can then not be read back, not even later."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def refuse_capture(tensor: Tensor, what: str) -> None:
    """Refuse what depends on the number of steps taken, which the host counts, where a CUDA graph is captured.

    Raises:
        OptimizerError: a graph is being captured, each replay of which would repeat the step of this number.
    """
    if is_capturing(tensor):
        raise OptimizerError(
            f"{what} depends on the number of steps taken, which the host counts: in a CUDA graph each replay would "
            "repeat the same one; leave it out of the graph, or choose an optimizer and options that count no steps"
        )
