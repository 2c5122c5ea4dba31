"""Long training, and several models at once.

Over 100,000 steps in float32 of every feasible method, with a gradient that is noise:

    ‖XXᵀ − I‖_F/√p ≤ 1e-5,   proxies stay within a factor of 100 of their length, and memory does not grow

Proxies of exponentials are angles of rotations, which noise lets wander: no further than free numbers would.

Models that train in two threads have the weights, to the bit, that each has when it trains alone.
"""

from __future__ import annotations

import gc
import math
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import stiefel
from stiefel.attach.weights import constrained_weights

METHODS = [m for m in stiefel.available() if not m.startswith("test_")]
FEASIBLE = [m for m in METHODS if stiefel.get(m).feasible]
EXPONENTIALS = ("matrix_exp", "torch_orthogonal")
OPTIMIZERS = {"momentum": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}), "adam": (torch.optim.Adam, {"lr": 0.01})}


SHAPES = {"momentum": [(9, 4), (9, 4)], "adam": [(6, 6), (6, 6)], "threads": [(9, 4), (9, 4), (6, 6), (5, 1)]}
"""Of the layers: equal ones, which are one batch, so that 100,000 steps take minutes."""


def model(method: str, seed: int = 0, shapes: str = "threads") -> nn.Module:
    torch.manual_seed(seed)
    return stiefel.constrain(nn.ModuleList([nn.Linear(*shape, bias=False) for shape in SHAPES[shapes]]), method)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    """Gradients that no weight can follow: other targets at each step."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        weights = [layer.weight for layer in net]
        noise = [torch.randn(w.shape, generator=generator) for w in weights]
        loss = torch.stack([(w * t).sum() for w, t in zip(weights, noise, strict=True)]).sum() + stiefel.penalty(net)
        loss.backward()
        optimizer.step()


def lengths(net: nn.Module) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(w.parameter.detach()) for w in constrained_weights(net)])


def resident() -> int:
    """The process's memory, in bytes."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.sampled(8, values=False)
@pytest.mark.parametrize("steps", [200, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("choice", OPTIMIZERS)
@pytest.mark.parametrize("method", FEASIBLE)
def test_long_training_keeps_orthogonality_memory_and_the_lengths_of_proxies(method, choice, steps):
    net, (cls, hyper) = model(method, shapes=choice), OPTIMIZERS[choice]
    optimizer, start = stiefel.optimizer(net, cls, **hyper), lengths(net)
    train(net, optimizer, steps // 5, seed=0)
    memory = resident()
    for part in range(1, 5):
        train(net, optimizer, steps // 5, seed=part)
        assert stiefel.report(net).worst <= 1e-5
    ends = lengths(net)
    entries = sum(p.numel() for p in net.parameters()) / len(start)
    wandered = hyper["lr"] / (1 - hyper.get("momentum", 0)) * math.sqrt(steps * entries)
    assert (ends < (max(100, wandered) if method in EXPONENTIALS else 100 * start)).all(), ends
    assert (ends > start / 100).all(), ends
    # Allocators keep some pages; 80,000 steps that each kept a weight would keep 20 MB.
    assert resident() - memory < 10e6


@pytest.mark.sampled(8, values=False)
@pytest.mark.parametrize("pair", [(m, METHODS[(i + 7) % len(METHODS)]) for i, m in enumerate(METHODS)], ids="-".join)
def test_models_in_two_threads_train_as_alone(pair):
    def run(method: str, seed: int) -> list[Tensor]:
        net = model(method, seed)
        train(net, stiefel.optimizer(net, torch.optim.SGD, lr=0.05, momentum=0.9), 40, seed)
        with torch.no_grad():
            return [layer.weight.clone() for layer in net]

    alone, found = [run(method, seed) for seed, method in enumerate(pair)], {}
    nets = [model(method, seed) for seed, method in enumerate(pair)]  # the global generator is one

    def work(seed: int, ready: Callable[[], object]) -> None:
        ready()
        net = nets[seed]
        train(net, stiefel.optimizer(net, torch.optim.SGD, lr=0.05, momentum=0.9), 40, seed)
        with torch.no_grad():
            found[seed] = [layer.weight.clone() for layer in net]

    before, barrier = torch.get_float32_matmul_precision(), threading.Barrier(2)
    torch.set_float32_matmul_precision("medium")
    try:
        threads = [threading.Thread(target=work, args=(seed, barrier.wait)) for seed in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    for seed in (0, 1):
        assert all(torch.equal(a, b) for a, b in zip(alone[seed], found[seed], strict=True)), pair[seed]
