"""Tensors that are spread over processes: torch's ``DTensor``, as ``fully_shard`` and tensor parallelism make them.

Importing it takes a while and fails where torch was built without distributed: it is looked up, and as long as nothing
has imported it, no tensor is one. Imports torch alone.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "agree_on_least",
    "cut_as",
    "is_sharded",
    "like",
    "local_of",
    "local_part",
    "shard_dimension",
    "whole",
    "write",
]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a ``DTensor``, of which this process may hold a part only."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, differentiable; all processes that hold a part have to ask for it together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local_of(tensor: Tensor) -> Tensor:
    """This process's part, sharing its memory; of any other tensor the tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor.detach()  # type: ignore[attr-defined]


def write(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole value that every process has into a tensor, or into the part of it that is here."""
    local_of(tensor).copy_(local_part(value, tensor) if is_sharded(tensor) else value)


def local_part(value: Tensor, sharded: Any) -> Tensor:
    """This process's part of a whole value that every process has, cut as ``sharded`` is; nothing is sent."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = sharded.device_mesh
    everywhere = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=sharded.placements).to_local()


def cut_as(value: Tensor, tensor: Tensor) -> Tensor:
    """A whole value that every process has, cut as a tensor is; the value itself where that is not sharded."""
    return like(local_part(value, tensor), tensor) if is_sharded(tensor) else value


def like(local: Tensor, sharded: Any) -> Tensor:
    """The tensor whose parts are these, cut as ``sharded`` is."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local,
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=sharded.shape,
        stride=sharded.stride(),
    )


def shard_dimension(sharded: Any) -> tuple[int, int] | None:
    """The dimension of the mesh over which a tensor is cut, and the tensor's dimension that is cut.

    None where it is not cut in exactly one way: nowhere, over several dimensions of the mesh, or in strides, as where
    tensor parallelism and ``fully_shard`` meet.
    """
    from torch.distributed.tensor import Replicate, Shard

    cut = [(i, p.dim) for i, p in enumerate(sharded.placements) if type(p) is Shard]
    others = [p for p in sharded.placements if not isinstance(p, Replicate)]
    return cut[0] if len(cut) == len(others) == 1 else None


def agree_on_least(values: Tensor, sharded: Any) -> Tensor:
    """The least of each of ``values`` over all processes that hold a part of a tensor."""
    mesh = sharded.device_mesh
    values = values.to(mesh.device_type)
    for dimension in range(mesh.ndim):
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MIN, group=mesh.get_group(dimension))
    return values
