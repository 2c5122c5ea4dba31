"""Models that several processes train together: what must not change once they do. Imports torch and the errors."""

from __future__ import annotations

import torch
from torch import Tensor

from stiefel.errors import WeightError


def refuse_held(name: str, parameter: Tensor) -> None:
    """Refuse to make a parameter a proxy where something waits for its gradients, as DistributedDataParallel does.

    A proxy is the same parameter with another storage, and accumulates its gradients elsewhere: they would no longer be
    averaged over processes, and each would train a model of its own.

    Raises:
        WeightError: something does, and processes train together.
    """
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    if together and parameter.requires_grad and _accumulates_for_others(parameter):
        raise WeightError(
            f"weight '{name}' is held by DistributedDataParallel, or by the graph of a loss that is still alive: its "
            "gradients would no longer be averaged over processes; constrain the model before it is wrapped: "
            "DistributedDataParallel(stiefel.constrain(model, ...))"
        )


def _accumulates_for_others(parameter: Tensor) -> bool:
    """Whether anything but the parameter keeps the node alive in which its gradients add up."""

    def node() -> torch.autograd.graph.Node:
        with torch.enable_grad():
            node = parameter.view_as(parameter).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
        assert node is not None
        return node

    # Asked for again, a node that nobody holds is another one, without the note.
    notes: dict[str, bool] = node().metadata  # type: ignore[assignment]
    notes["held"] = True
    del notes
    again: dict[str, bool] = node().metadata  # type: ignore[assignment]
    return again.pop("held", False)
