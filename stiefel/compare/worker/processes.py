"""The processes of one run under ``torchrun``. Imports torch."""

from __future__ import annotations

import os

import torch
from torch import distributed

from stiefel.compare.problem.batches import Batch, share
from stiefel.compare.record.spec import RunSpec


def join(spec: RunSpec) -> torch.device:
    """Where this process runs; joins the others of its run under ``torchrun``."""
    # torchrun sets WORLD_SIZE, RANK and LOCAL_RANK (the number on this machine) in each of its processes.
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return torch.device(spec.device)
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if spec.device == "cuda" else "gloo")
    if spec.device != "cuda":
        return torch.device(spec.device)
    device = torch.device(spec.device, int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)  # a plain "cuda" means the current device, by default 0 in every process
    return device


def own_share(batch: Batch) -> Batch:
    """This process's share of a batch."""
    if not distributed.is_initialized():
        return batch
    return share(batch, distributed.get_rank(), distributed.get_world_size())


def is_first() -> bool:
    """Whether this is a run's only process, or the one that writes."""
    return not distributed.is_initialized() or distributed.get_rank() == 0
