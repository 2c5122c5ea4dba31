"""Models that several processes train together: what must not change once they do, and the work that they share.

Imports ``compat``, ``optim`` and the errors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stiefel.compat.torch_private import is_joining
from stiefel.errors import WeightError
from stiefel.optim import Lift
from stiefel.optim.exchange import Replicas


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


def share_work(optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Let the processes of a model that DistributedDataParallel holds share the methods' own steps.

    Only weights whose gradients it averages are alike everywhere. Inside ``no_sync()`` none are, and under
    ``torch.distributed.algorithms.Join`` some processes may have run out of data and step no longer: there each does
    all the work.
    """
    if not (isinstance(module, DistributedDataParallel) and isinstance(optimizer, Lift)):
        return
    group, ignored = module.process_group, set(module.parameters_to_ignore)
    averaged = {id(p): p for name, p in module.module.named_parameters() if p.requires_grad and name not in ignored}
    if torch.distributed.get_world_size(group) > 1:
        optimizer.replicas = lambda: (
            Replicas(group, averaged) if module.require_backward_grad_sync and not is_joining(module) else None
        )
