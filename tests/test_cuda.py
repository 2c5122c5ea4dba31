"""What only a GPU can show: nothing in a step makes the host wait, and numbers there are those of a CPU."""

import pytest
import torch
from common import forms
from torch import nn

import stiefel
from stiefel.constraint import Constraint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

WAITING = {"matrix_exp", "own_pca", "spectral_norm", "torch_orthogonal"}
"""Methods that torch itself makes wait: it chooses the order of an exponential on the host, and checks an SVD there."""
FORMS = [form for name in stiefel.available() for form in forms(name)]


def net(device: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 48), nn.ReLU(), nn.Linear(48, 48)).to(
        device
    )


def train(model: nn.Module, steps: int, device: str) -> None:
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.05, momentum=0.9)
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x).square().mean() + stiefel.penalty(model)).backward()
        optimizer.step()


@pytest.mark.parametrize("method", [f for f in FORMS if f.name not in WAITING and "exp" not in str(f)], ids=str)
def test_no_step_waits_for_the_device(method: Constraint) -> None:
    model = stiefel.constrain(net("cuda"), method)
    train(model, 3, "cuda")  # what is made lazily
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(model, 2, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", FORMS, ids=str)
def test_a_gpu_trains_as_a_cpu_does(method: Constraint) -> None:
    models = {device: stiefel.constrain(net("cpu"), method).to(device) for device in ("cpu", "cuda")}
    for device, model in models.items():
        torch.manual_seed(1)
        train(model, 3, device)
    for a, b in zip(models["cpu"].parameters(), models["cuda"].parameters(), strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-3, atol=1e-4)


def test_a_monitor_keeps_every_number_and_waits_for_none() -> None:
    model = stiefel.constrain(net("cuda"), "pogo")
    monitor = stiefel.Monitor(model, every=10_000, energy=False)
    running, count = torch.zeros((), device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")

    def step() -> None:
        with monitor:
            running.add_(0.5)
            count.add_(2)
        monitor.log(loss=running, count=count, rate=0.1)

    step()  # the first is measured
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2_499):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    steps = range(1, 2_501)
    assert monitor.history["loss"] == [(n, n / 2) for n in steps]
    assert monitor.history["count"] == [(n, 2 * n) for n in steps]
    assert monitor.history["rate"] == [(n, 0.1) for n in steps]


def test_divergence_is_told_at_the_latest_a_few_steps_later() -> None:
    model = stiefel.constrain(net("cuda"), "pogo")
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.1)
    x = torch.full((2, 3, 8, 8), float("nan"), device="cuda")

    def steps() -> None:
        for _ in range(3):
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()
            torch.cuda.synchronize()

    with pytest.raises(stiefel.DivergenceError):
        steps()
