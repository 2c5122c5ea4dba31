"""What several processes check together: run by ``torchrun``, feature by feature, over all methods.

Each feature is a function of a method's name that trains on every process and returns what was found, as numbers and
words. Process 0 writes them to files, for tests/parallel.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import stiefel
from stiefel.attach.weights import constrained_weights
from stiefel.optim import batched, moves, sharded_moves

LAYERS, HEAD = (0, 2, 4, 6, 8), "8"
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "momentum": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {"lr": 0.01}),
}


def net(dtype: torch.dtype = torch.float64, width: int = 33) -> nn.Sequential:
    """A convolution and linear layers, whose 7 and 33 rows no number of processes divides; the head is free."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 7, 3), nn.Flatten(), nn.Linear(28, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 5)).to(dtype)


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A batch that the numbers of processes divide."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 2, 4, 4, generator=generator, dtype=dtype)
    return x, torch.randint(5, (8,), generator=generator)


OPTIONS: dict[str, Any] = {}
"""Of the method, while a feature tries it with others than its own."""


def constrained(method: str, dtype: torch.dtype = torch.float64, width: int = 33) -> nn.Module:
    """The model with all layers but the head constrained."""
    return stiefel.constrain(net(dtype, width), method, exclude=[HEAD], scale="relu", **OPTIONS)


def share(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """This process's part of a batch."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return batch[0].chunk(size)[rank], batch[1].chunk(size)[rank]


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], steps: int, below: Any = None
) -> None:
    """Train on the mean over the batch."""
    for _ in range(steps):
        optimizer.zero_grad()
        (cross_entropy(model(batch[0]), batch[1]) + stiefel.penalty(below or model)).backward()
        optimizer.step()


def sharded(model: nn.Module, mesh: Any = None, **options: Any) -> nn.Module:
    """Each layer of its own, and the rest, by ``fully_shard``."""
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for i in LAYERS:
        fully_shard(model[i], mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def apart(one: nn.Module, other: nn.Module) -> float:
    """The largest difference of two models' parameters."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((whole(p.detach()) - whole(q.detach())).abs().max()) for p, q in pairs)


def between_ranks(model: nn.Module) -> float:
    """The largest difference of the parameters from those of process 0."""
    worst = 0.0
    for p in model.parameters():
        mine = whole(p.detach()).clone()
        first = mine.clone()
        dist.broadcast(first, 0)
        worst = max(worst, float((mine - first).abs().max()))
    return worst


def optimizers_of(method: str) -> list[str]:
    """Two of the optimizers, which the method takes."""
    return ["momentum", "adam" if stiefel.get(method).moves and not stiefel.get(method).lifts else "adamw"]


# --- features ---


def as_one_process(method: str, dtype: torch.dtype, steps: int, mesh: Any = None) -> dict[str, Any]:
    """Sharded training on a share of each batch, against one process with all of it."""
    found: dict[str, Any] = {}
    for name in optimizers_of(method):
        cls, hyper = OPTIMIZERS[name]
        one = constrained(method, dtype)
        train(one, stiefel.optimizer(one, cls, **hyper), data(dtype), steps)
        many = sharded(constrained(method, dtype), mesh)
        torch.manual_seed(dist.get_rank())  # as everybody seeds, for dropout
        train(many, stiefel.optimizer(many, cls, **hyper), share(data(dtype)), steps)
        found[name] = apart(one, many)
        found[f"{name} ranks"] = between_ranks(many)
        found["report"] = abs(stiefel.report(many).worst - stiefel.report(one).worst)
        if dtype == torch.float32:
            found[f"{name} rounding"] = apart(one, reordered(method, name, dtype, steps))
    return found


def reordered(method: str, name: str, dtype: torch.dtype, steps: int) -> nn.Module:
    """One process's model of the batch in another order: what the rounding of sums makes of the same training."""
    model, (cls, hyper) = constrained(method, dtype), OPTIMIZERS[name]
    x, y = data(dtype)
    train(model, stiefel.optimizer(model, cls, **hyper), (x.flip(0), y.flip(0)), steps)
    return model


def double(method: str) -> dict[str, Any]:
    """10 steps in float64."""
    return as_one_process(method, torch.float64, 10)


def single(method: str) -> dict[str, Any]:
    """50 steps in float32."""
    return as_one_process(method, torch.float32, 50)


def hybrid(method: str) -> dict[str, Any]:
    """Shards on one dimension of the mesh, replicas on the other."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    return as_one_process(method, torch.float64, 10, mesh)


def plain(method: str) -> dict[str, Any]:
    """A plain optimizer on a sharded model."""
    many = sharded(constrained(method))
    optimizer, before = torch.optim.SGD(many.parameters(), lr=0.1), constrained(method)
    try:
        train(many, optimizer, share(data()), 3)
    except stiefel.OptimizerError as error:
        return {"refused": str(error), "moved": apart(before, many)}
    return {"refused": "", "worst": stiefel.report(many).worst}


def whole_again(method: str) -> dict[str, Any]:
    """``project`` and ``release`` of a sharded model, and the whole state of it in another."""
    many = sharded(constrained(method))
    train(many, stiefel.optimizer(many, torch.optim.SGD, lr=0.1), share(data()), 3)
    expected = [w.value.detach().clone() for w in constrained_weights(many)]
    state = get_model_state_dict(many)
    again = sharded(constrained(method))
    set_model_state_dict(again, state)
    found: dict[str, Any] = {"loaded": apart(many, again), "released": ""}
    stiefel.project(many)
    found["projected"] = stiefel.report(many).worst
    try:
        stiefel.release(again)
    except stiefel.WeightError as error:
        found["released"] = str(error)
    else:
        found["released apart"] = max(
            float((whole(again[i].weight.detach()) - w).abs().max())
            for i, w in zip((0, 2, 4, 6), expected, strict=True)
        )
    return found


def half(method: str) -> dict[str, Any]:
    """Compute in bfloat16 by ``fully_shard``'s policy."""
    many = sharded(constrained(method, torch.float32), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    x, y = share(data(torch.float32))
    try:
        train(many, stiefel.optimizer(many, torch.optim.SGD, lr=0.1), (x, y), 5)
    except stiefel.WeightError as error:
        return {"refused": str(error)}
    return {"refused": "", "worst": stiefel.report(many).worst}


def clipped_and_accumulated(method: str) -> dict[str, Any]:
    """Two halves of each share without synchronizing the first, then clipping."""
    one, many = constrained(method), sharded(constrained(method))
    found = {}
    for name, model, batch in (("one", one, data()), ("many", many, share(data()))):
        optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.1, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            parts = list(zip(batch[0].chunk(2), batch[1].chunk(2), strict=True))
            for k, (x, y) in enumerate(parts):
                if name == "many":
                    model.set_requires_gradient_sync(k == len(parts) - 1)
                (cross_entropy(model(x), y) / len(parts) + (stiefel.penalty(model) if k == 1 else 0)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
    found["apart"] = apart(one, many)
    return found


def diverged(method: str) -> dict[str, Any]:
    """A gradient that is NaN in the part of one process alone ends the step on all of them."""
    many = sharded(constrained(method))
    optimizer = stiefel.optimizer(many, torch.optim.SGD, lr=0.1)
    cross_entropy(many(data()[0]), data()[1]).backward()
    (spoilt,) = [w.parameter for w in constrained_weights(many)][:1]
    if dist.get_rank() == 0:
        spoilt.grad.to_local().view(-1)[0] = float("nan")
    try:
        optimizer.step()
    except stiefel.DivergenceError as error:
        told = str(error)
    else:
        told = ""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, told)
    return {"told": everyone, "moved": apart(constrained(method), many)}


def work(method: str) -> dict[str, Any]:
    """How many matrices' steps each process computes, and how many numbers it receives, in one step."""
    count = {"matrices": 0, "received": 0}
    step, gather = moves.Batch.moved, dist.all_to_all_single

    def counted_step(self: Any, ends: Any) -> Any:
        count["matrices"] += len(ends)
        return step(self, ends)

    def counted(output: Tensor, sent: Tensor, out: Any, into: Any, group: Any) -> Any:
        rank = dist.get_rank()
        count["received"] += output.numel() - (out[rank] if out else 0)
        return gather(output, sent, out, into, group)

    many = sharded(constrained(method))
    optimizer = stiefel.optimizer(many, torch.optim.SGD, lr=0.1, momentum=0.9)
    train(many, optimizer, share(data()), 1)
    moves.Batch.moved, dist.all_to_all_single = counted_step, counted  # type: ignore[method-assign]
    point = batched.Batched.move_copies

    def counted_move(self: Any, group: Any, copies: Any) -> Any:
        count["matrices"] += len(copies)
        return point(self, group, copies)

    batched.Batched.move_copies = counted_move  # type: ignore[method-assign]
    try:
        train(many, optimizer, share(data()), 1)
    finally:
        moves.Batch.moved, dist.all_to_all_single, batched.Batched.move_copies = step, gather, point  # type: ignore[method-assign]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, count)
    entries = sum(w.parameter.numel() for w in constrained_weights(many))
    return {"counts": everyone, "entries": entries, "weights": len(list(constrained_weights(many)))}


class Recomputed(nn.Sequential):
    """Each layer under activation checkpointing."""

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the layers' inputs alone, and computes the rest again in the backward pass."""
        for layer in self:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


def recomputed_and_offloaded(method: str) -> dict[str, Any]:
    """Sharded models whose activations are recomputed, and whose parts are kept on the host."""
    found: dict[str, Any] = {}
    cls, hyper = OPTIMIZERS["momentum"]
    one = constrained(method)
    train(one, stiefel.optimizer(one, cls, **hyper), data(), 5)
    for name, options in (("recomputed", {}), ("offloaded", {"offload_policy": CPUOffloadPolicy(pin_memory=False)})):
        many = constrained(method)
        many = sharded(Recomputed(*many) if name == "recomputed" else many, **options)
        train(many, stiefel.optimizer(many, cls, **hyper), share(data()), 5)
        found |= {name: apart(one, many), f"{name} ranks": between_ranks(many)}
    return found


def resumed(method: str) -> dict[str, Any]:
    """A sharded model and its optimizer saved by torch.distributed.checkpoint, and gone on with bit for bit."""
    found: dict[str, Any] = {}
    for kind, name in zip(("at once", "async"), optimizers_of(method), strict=True):
        cls, hyper = OPTIMIZERS[name]

        many, again = (sharded(constrained(method)) for _ in range(2))
        optimizer, other = (stiefel.optimizer(model, cls, **hyper) for model in (many, again))
        train(many, optimizer, share(data()), 4)
        folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(folder)
        model_state, optimizer_state = get_state_dict(many, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        if kind == "async":
            distributed_checkpoint.async_save(state, checkpoint_id=folder[0]).result()
        else:
            distributed_checkpoint.save(state, checkpoint_id=folder[0])
        dist.barrier()
        model_state, optimizer_state = get_state_dict(again, other)
        state = {"model": model_state, "optimizer": optimizer_state}
        distributed_checkpoint.load(state, checkpoint_id=folder[0])
        set_state_dict(again, other, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        for each, by in ((many, optimizer), (again, other)):
            train(each, by, share(data()), 3)
        pairs = zip(many.parameters(), again.parameters(), strict=True)
        found[kind] = max(float((whole(p.detach()) - whole(q.detach())).abs().max()) for p, q in pairs)
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder[0])
    return found


def shared_work(method: str) -> dict[str, Any]:
    """DistributedDataParallel whose processes share the steps: against one process, and the matrices each computes."""
    found: dict[str, Any] = {}
    before, sharded_moves.SHARED_FROM = sharded_moves.SHARED_FROM, 8  # all but the convolution
    count, step = {"matrices": 0}, moves.Batch.moved

    def counted(self: Any, ends: Any) -> Any:
        count["matrices"] += len(ends)
        return step(self, ends)

    try:
        for name in optimizers_of(method):
            cls, hyper = OPTIMIZERS[name]
            one, many = constrained(method), constrained(method)
            train(one, stiefel.optimizer(one, cls, **hyper), data(), 10)
            wrapped = DistributedDataParallel(many)
            optimizer = stiefel.optimizer(wrapped, cls, **hyper)
            torch.manual_seed(dist.get_rank())
            train(wrapped, optimizer, share(data()), 9, many)
            optimizer.load_state_dict(copy.deepcopy(optimizer).state_dict())  # a copy has no processes
            moves.Batch.moved = counted  # type: ignore[method-assign]
            train(wrapped, optimizer, share(data()), 1, many)
            moves.Batch.moved = step  # type: ignore[method-assign]
            found |= {name: apart(one, many), f"{name} ranks": between_ranks(many)}
    finally:
        moves.Batch.moved, sharded_moves.SHARED_FROM = step, before  # type: ignore[method-assign]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, count["matrices"])
    return found | {"matrices": everyone, "uneven": uneven(method)}


class Experts(nn.Module):
    """A layer that all processes share, one that is each process's own, and its gradients are not averaged."""

    def __init__(self, method: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Linear(12, 12)
        torch.manual_seed(dist.get_rank() + 1)
        self.mine = nn.Linear(12, 12)
        stiefel.constrain(self.double(), method)
        _ignored = [name for name, _ in self.named_parameters() if name.startswith("mine.")]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, _ignored)

    def forward(self, x: Tensor) -> Tensor:
        return self.mine(self.shared(x))


def not_averaged(method: str) -> dict[str, Any]:
    """Shared steps leave alone what the processes do not have alike."""
    before, sharded_moves.SHARED_FROM = sharded_moves.SHARED_FROM, 8
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(dist.get_rank()), dtype=torch.float64)
    results = []
    try:
        for wraps in (False, True):
            wrapped = DistributedDataParallel(Experts(method))
            optimizer = stiefel.optimizer(wrapped if wraps else wrapped.module, torch.optim.SGD, lr=0.1, momentum=0.9)
            for _ in range(5):
                optimizer.zero_grad()
                (wrapped(x).square().mean() + stiefel.penalty(wrapped)).backward()
                optimizer.step()
            results.append([p.detach().clone() for p in wrapped.module.parameters()])
    finally:
        sharded_moves.SHARED_FROM = before
    return {"apart": max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))}


def loaded_sharded(method: str) -> dict[str, Any]:
    """States of other methods and of plain models, sharded, loaded into a sharded model."""
    found = {}
    for source in ("own", "cayley", "retraction", "unconstrained"):
        one, many = constrained(source), sharded(constrained(method))
        same_set = stiefel.constrain(net(), method, exclude=[HEAD], scale="relu")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a weight that was off the set has moved
            same_set.load_state_dict(one.state_dict())
            many.load_state_dict(sharded(constrained(source)).state_dict())
        found[source] = apart(same_set, many)
    return found


def uneven(method: str) -> bool:
    """Process 0 has more batches than the others, under DistributedDataParallel's ``join``."""
    many = DistributedDataParallel(constrained(method))
    optimizer = stiefel.optimizer(many, torch.optim.SGD, lr=0.1, momentum=0.9)
    with many.join():
        train(many, optimizer, share(data()), 3 if dist.get_rank() == 0 else 2, many.module)
    return all(w.allows(w.residual()) for w in constrained_weights(many))


def tensor_parallel(method: str) -> dict[str, Any]:
    """Columns of one layer and rows of the next on the processes, by ``parallelize_module``."""
    one, many = constrained(method, width=32), constrained(method, width=32)  # torch's own cuts must be even here
    train(one, stiefel.optimizer(one, torch.optim.SGD, lr=0.1, momentum=0.9), data(), 10)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    try:
        parallelize_module(many, mesh, {"4": ColwiseParallel(), "6": RowwiseParallel()})
        optimizer = stiefel.optimizer(many, torch.optim.SGD, lr=0.1, momentum=0.9, foreach=False)
        train(many, optimizer, data(), 10)
    except stiefel.WeightError as error:
        return {"refused": str(error)}
    return {"refused": "", "apart": apart(one, many), "ranks": between_ranks(many)}


def data_parallel(method: str) -> dict[str, Any]:
    """DistributedDataParallel around a constrained model, with every process seeded on its own."""
    one, many = constrained(method), constrained(method)
    found = {}
    for zero in (False, True):
        one, many = constrained(method), constrained(method)
        cls, hyper = OPTIMIZERS["momentum"]
        train(one, stiefel.optimizer(one, cls, **hyper), data(), 10)
        wrapped = DistributedDataParallel(many)
        more = {"optimizer_class": cls} if zero else {}
        optimizer = stiefel.optimizer(many, ZeroRedundancyOptimizer if zero else cls, **more, **hyper)
        torch.manual_seed(dist.get_rank())
        train(wrapped, optimizer, share(data()), 10, many)
        name = "zero" if zero else "ddp"
        found |= {name: apart(one, many), f"{name} ranks": between_ranks(many)}
        found[f"{name} steps"] = [w.binding.tally.steps for w in constrained_weights(many)]
    return found


def moving_start(method: str) -> dict[str, Any]:
    """A trivialization whose start moves after every third step: sharded, saved and resumed, and data-parallel."""
    if not hasattr(stiefel.get(method), "rebase"):
        return {}
    OPTIONS["rebase"] = 3
    try:
        return {"sharded": double(method), "resumed": resumed(method), "parallel": data_parallel(method)}
    finally:
        OPTIONS.clear()


def wrapped_first(method: str) -> dict[str, Any]:
    """A model that DistributedDataParallel holds already, in each of its ways."""
    found: dict[str, Any] = {}
    for name, options in (("", {}), ("unused", {"find_unused_parameters": True}), ("static", {"static_graph": True})):
        one, many = constrained(method), net()
        wrapped = DistributedDataParallel(many, **options)
        cls, hyper = OPTIMIZERS["momentum"]
        try:
            stiefel.constrain(many, method, exclude=[HEAD], scale="relu")
        except stiefel.WeightError as error:
            found[name] = str(error)
            continue
        train(one, stiefel.optimizer(one, cls, **hyper), data(), 10)
        train(wrapped, stiefel.optimizer(many, cls, **hyper), share(data()), 10, many)
        found[name] = apart(one, many)
    return found


FEATURES: dict[str, Callable[[str], dict[str, Any]]] = {
    f.__name__: f
    for f in (
        double,
        single,
        hybrid,
        plain,
        whole_again,
        half,
        clipped_and_accumulated,
        diverged,
        work,
        recomputed_and_offloaded,
        resumed,
        shared_work,
        not_averaged,
        loaded_sharded,
        tensor_parallel,
        data_parallel,
        moving_start,
        wrapped_first,
    )
}


@contextmanager
def together() -> Iterator[None]:
    """The process group."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    yield
    dist.destroy_process_group()


def main() -> None:
    """``processes.py FEATURE,… FOLDER METHOD …``: a file per feature."""
    features, folder, *methods = sys.argv[1:]
    with together():
        for feature in features.split(","):
            found = {}
            for method in methods:
                try:
                    found[method] = FEATURES[feature](method)
                except Exception as error:
                    found[method] = {"raw": f"{type(error).__name__}: {str(error)[:300]}"}
                dist.barrier()
            if dist.get_rank() == 0:
                (Path(folder) / f"{feature}.json").write_text(json.dumps(found), encoding="utf-8")
    sys.stderr.flush()
    os._exit(0)  # threads of gloo's may outlast the interpreter, and end the process with SIGABRT


if __name__ == "__main__":
    main()
