"""A whitening layer under DistributedDataParallel: run by ``torchrun``, for tests/parallel."""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import stiefel

STEPS = 4


def net() -> nn.Sequential:
    """Batch normalization, whitening and a layer, of which the first two see the data as they are."""
    torch.manual_seed(0)
    whitening = stiefel.nn.Whitening1d(6, group_size=3, affine=False)
    return nn.Sequential(nn.BatchNorm1d(6, affine=False), whitening, nn.Linear(6, 2)).double()


def batch(rank: int, step: int) -> Tensor:
    """What a process sees at a step."""
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(20, 6, generator=generator, dtype=torch.float64) @ torch.arange(36.0).double().view(6, 6).sin()


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def everywhere(tensor: Tensor) -> list[Tensor]:
    """A tensor as it is on each process."""
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor.contiguous())
    return found


def apart(tensor: Tensor) -> float:
    """The largest difference between the processes."""
    first, *others = everywhere(tensor.detach())
    return max(float((first - other).abs().max()) for other in others)


def checked() -> dict[str, Any]:
    """What one finds."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model, alone = net(), net()
    wrapped = DistributedDataParallel(model)
    for step in range(STEPS):
        wrapped.zero_grad()
        loss(wrapped, batch(rank, step)).backward()
        loss(alone, batch(0, step))  # what process 0 sees, without the others
    gradient = model[2].weight.grad.clone()
    locally = copy.deepcopy(model)
    locally.zero_grad()
    loss(locally, batch(rank, STEPS - 1)).backward()
    mean = torch.stack(everywhere(locally[2].weight.grad)).mean(0)
    found = {
        "gradients": apart(gradient),
        "gradient of the mean": float((gradient - mean).abs().max()),
        "covariances before": apart(model[1].running_cov),
        "variances before": apart(model[0].running_var),
    }
    x = batch(7, 0)
    y = wrapped.eval()(x)  # buffers are broadcast at the start of a forward pass
    found["covariances after"] = apart(model[1].running_cov)
    found["outputs"] = apart(y)
    found["against process 0"] = float((y - alone.eval()(x)).detach().abs().max())
    found["against its covariance"] = float((model[1].running_cov - alone[1].running_cov).abs().max())
    found["converted"] = type(nn.SyncBatchNorm.convert_sync_batchnorm(net())[1]).__name__
    found["size"] = size
    return found


def main() -> None:
    """``whitening_processes.py FILE``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = checked()
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
    sys.stderr.flush()
    os._exit(0)  # threads of gloo's may outlast the interpreter, and end the process with SIGABRT


if __name__ == "__main__":
    main()
