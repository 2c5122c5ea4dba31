"""Steps taken, kept in an optimizer's state too: formats that keep tensors alone lose a model's metadata.

Imports ``ownership``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stiefel.optim.ownership import Ownership, ownership

STEPS = "steps_taken"


def note_count(optimizer: torch.optim.Optimizer, parameter: Tensor, owned: Ownership) -> None:
    """Note the steps of a weight whose method depends on them.

    Args:
        optimizer: which has just stepped the parameter, so that its own state of it is there already.
        parameter: the weight, or its proxy.
        owned: what is known of it.
    """
    optimizer.state[parameter][STEPS] = owned.binding.tally.steps


def restore_counts(optimizer: torch.optim.Optimizer) -> None:
    """Let weights go on from the steps that a loaded state has."""
    for parameter, state in optimizer.state.items():
        owned = ownership(parameter)
        if owned is not None and owned.counts and STEPS in state:
            owned.binding.tally.steps = owned.binding.tally.resumed = int(state[STEPS])
