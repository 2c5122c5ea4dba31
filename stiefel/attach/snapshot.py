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

    In-place changes show in a tensor's version, but those of fused optimizers do not, so that the steps of all
    optimizers are counted; those of ``weight.data`` show nowhere.

    Args:
        tensors: to be looked at.
        hold: keep their storages alive, so that the address of one cannot be another's later.
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
    """Whether changes of these show at all: not those by another process, or of tensors made in inference mode."""
    if any(t.is_inference() or (t.device.type == "cpu" and t.is_shared()) for t in tensors):
        return False
    return not is_capturing(tensors[0])


def _state(tensor: Tensor) -> tuple[int, int, bool]:
    return version(tensor), tensor.data_ptr(), tensor.requires_grad
