"""Whether tensors are what they were when something was computed from them. Imports ``optim`` and torch."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import Tensor

from stiefel.compat.torch_private import version
from stiefel.linalg import is_capturing
from stiefel.optim import steps_seen


class Snapshot:
    """The state of some tensors at one moment.

    In-place changes advance a tensor's version. Those of fused optimizers do not, so the steps of all optimizers are
    counted as well. Changes of ``weight.data`` are not detected.

    Args:
        tensors: whose state is recorded.
        hold: keep their storages alive, so that no other tensor can get one of their addresses.
    """

    def __init__(self, tensors: Sequence[Tensor], *, hold: bool = False) -> None:
        self.tensors, self.steps = tensors, steps_seen()
        self.states = list(map(_state, tensors))
        self._storages = [t.detach() for t in tensors] if hold else []

    def holds_for(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the very same tensors, unchanged as far as can be seen."""
        if self.steps != steps_seen() or len(tensors) != len(self.tensors):
            return False
        if any(map(operator.is_not, tensors, self.tensors)):
            return False
        return list(map(_state, tensors)) == self.states


def can_be_watched(tensors: Sequence[Tensor]) -> bool:
    """Whether changes of these can be detected: not in memory shared with other processes, nor of inference tensors."""
    if any(t.is_inference() or (t.device.type == "cpu" and t.is_shared()) for t in tensors):
        return False
    return not is_capturing(tensors[0])


def _state(tensor: Tensor) -> tuple[int, int, bool]:
    # The address too: `parameter.data = t`, as in to(), replaces the storage and leaves the version as it is.
    return version(tensor), tensor.data_ptr(), tensor.requires_grad
