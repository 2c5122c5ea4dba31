"""Whole training steps of three kinds of network, and single layers at rest. Imports ``cases``, stiefel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

import stiefel
from costs.cases import Work
from stiefel.attach import constrained_weights

CONTROL = "unconstrained"
RECOMMENDED = ("own", "retraction", "projection", "riemannian", "oni", "bjorck", "pogo", "landing", "soft")
"""Those that docs/methods.md recommends for one use or another."""
CLASSES = 10


@dataclass(frozen=True)
class Net:
    """A network and the size of its batches of 28×28 images."""

    name: str
    build: Callable[[], nn.Sequential]
    batch: int

    def __str__(self) -> str:
        return f"{self.name}, batch {self.batch}"


def mlp(width: int) -> nn.Sequential:
    """``784 → (width, ReLU) × 7 → 10``."""
    net = nn.Sequential(nn.Flatten())
    for layer in range(7):
        net.append(nn.Linear(width if layer else 784, width)).append(nn.ReLU())
    return net.append(nn.Linear(width, CLASSES))


def vgg() -> nn.Sequential:
    """Pairs of 3×3 convolutions of 32, 64 and 128 channels at 28, 14 and 7 pixels, without normalization."""
    net, channels = nn.Sequential(), 1
    for width in (32, 64, 128):
        for _ in range(2):
            net.append(nn.Conv2d(channels, width, 3, padding=1)).append(nn.ReLU())
            channels = width
        net.append(nn.MaxPool2d(2))
    return net.append(nn.Flatten()).append(nn.Linear(128 * 3 * 3, CLASSES))


class Residual(nn.Module):
    """``relu(shortcut(x) + bn(conv(relu(bn(conv(x))))))``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = outputs // inputs
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        return F.relu(self.shortcut(x) + self.body(x))


def resnet() -> nn.Sequential:
    """A stem of 16 channels and six blocks of 16, 32 and 64 channels, as ResNet-14 has them."""
    blocks = [Residual(a, b) for a, b in ((16, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64))]
    stem = (nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))


def nets(widths: tuple[int, ...], batches: tuple[int, ...]) -> list[Net]:
    """The MLPs of these widths and batch sizes."""
    return [Net(f"MLP 784-{w}×7-10", partial(mlp, w), b) for w in widths for b in batches]


CONVOLUTIONAL = [Net("VGG-style", vgg, 128), Net("residual", resnet, 128)]


def training(net: Net, name: str, device: torch.device, dtype: torch.dtype) -> Work:
    """A training step with plain SGD: all layers constrained at scale √2 but the last, random images and labels."""
    torch.manual_seed(0)
    model = net.build().to(device, dtype)
    options = dict(stiefel.get(name).comparison)
    stiefel.constrain(model, name, exclude=[str(len(model) - 1)], scale="relu", **options)
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=1e-3)
    x, y = torch.rand(net.batch, 1, 28, 28, dtype=dtype), torch.randint(CLASSES, (net.batch,))
    x, y = x.to(device), y.to(device)

    def step() -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y) + stiefel.penalty(model)
        loss.backward()
        optimizer.step()

    return Work(step, lambda: [weight.points() for weight in constrained_weights(model)])


def in_a_graph(work: Work) -> Work:
    """The same call of a CUDA device, captured: the host starts it by one launch."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # what is made lazily
            work.call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work.call()

    def replay() -> Work:
        graph.replay()
        return work  # held by this function: a graph does not keep alive what it reads

    return Work(replay, work.result)


AT_REST: dict[str, Callable[[nn.Linear], Any]] = {
    "plain": lambda layer: layer,
    "own": partial(stiefel.constrain, constraint="own", center=False),
    "cayley": partial(stiefel.constrain, constraint="cayley"),
    "own, learnable scale": partial(stiefel.constrain, constraint="own", center=False, scale="learnable"),
    "torch cayley": partial(orthogonal, orthogonal_map="cayley"),
}
"""A layer made ready for evaluation, by name; the first is what the others are compared with."""
ACCESSES = 50


def _rested(name: str, width: int, device: torch.device, dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(0)
    return AT_REST[name](nn.Linear(width, width).to(device, dtype)).eval()


def layer_at_rest(name: str, width: int, batch: int, device: torch.device, dtype: torch.dtype) -> Work:
    """A call of a layer that is not trained."""
    layer = _rested(name, width, device, dtype)
    x = torch.randn(batch, width, device=device, dtype=dtype)

    @torch.no_grad()
    def call() -> None:
        layer(x)

    return Work(call)


def accesses(name: str, width: int, device: torch.device, dtype: torch.dtype) -> Work:
    """``ACCESSES`` times ``layer.weight``, as a loop over an RNN's steps asks for it."""
    layer = _rested(name, width, device, dtype)

    @torch.no_grad()
    def call() -> None:
        for _ in range(ACCESSES):
            layer.weight  # noqa: B018

    return Work(call)
