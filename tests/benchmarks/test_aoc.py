"""Orthogonal convolution operators beside orthonormal kernels: what each makes of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import stiefel
from stiefel.compare import load_problem

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SIDE = 6


@pytest.fixture(autouse=True)
def _loaded():
    pytest.importorskip("orthogonium")
    load_problem(BENCHMARKS / "cnn.py")


def singular_values(layer):
    """Of a circular convolution on images of SIDE × SIDE, from its dense matrix."""
    images = torch.eye(layer.in_channels * SIDE**2, dtype=layer.weight.dtype).reshape(-1, layer.in_channels, SIDE, SIDE)
    with torch.no_grad():
        matrix = nn.functional.conv2d(
            nn.functional.pad(images, (1, 1, 1, 1), mode="circular"), layer.weight, groups=layer.groups
        )
    return np.linalg.svd(matrix.flatten(1).numpy(), compute_uv=False)


@pytest.mark.parametrize(("channels", "groups"), [((3, 3), 1), ((2, 5), 1), ((5, 2), 1), ((4, 6), 2)], ids=str)
def test_the_operator_is_orthogonal_before_and_after_steps(channels, groups):
    torch.manual_seed(1)
    layers = [nn.Conv2d(*channels, 3, padding=1, groups=groups) for _ in range(2)]  # two, which are computed together
    net = stiefel.constrain(nn.ModuleList(layers).double(), "aoc")
    optimizer = stiefel.optimizer(net, torch.optim.SGD, lr=0.3, momentum=0.9)
    for _ in range(3):
        assert all(np.abs(singular_values(layer) - 1).max() < 1e-12 for layer in net)
        optimizer.zero_grad()
        before = net[0].weight.detach().clone()
        sum((layer.weight * torch.randn_like(layer.weight)).sum() for layer in net).backward()
        optimizer.step()
        assert (net[0].weight - before).abs().max() > 1e-3


def test_an_orthonormal_kernel_is_no_orthogonal_operator():
    """All its filters along one window direction: constant images are enlarged k-fold."""
    layer = stiefel.constrain(nn.Conv2d(1, 1, 3, padding=1).double(), "own", center=False)
    with torch.no_grad():
        layer.weight = torch.ones_like(layer.weight)
    assert stiefel.report(layer).worst < 1e-12
    assert singular_values(layer).max() == pytest.approx(3)


@pytest.mark.parametrize(
    "layer", [nn.Linear(4, 4), nn.Conv2d(4, 4, (1, 3)), nn.Conv2d(4, 4, 3, stride=2), nn.Conv2d(1, 1, 3)], ids=str
)
def test_other_weights_are_refused_by_name(layer):
    with pytest.raises(stiefel.LayoutError, match="aoc"):
        stiefel.constrain(layer, "aoc")


def test_it_is_a_row_of_the_convolutional_networks():
    problem = load_problem(BENCHMARKS / "cnn.py")(width=0.03125, pixels=8)
    model = problem.constrain(problem.make_model(), stiefel.get("aoc"))
    assert len(list(stiefel.attach.constrained_weights(model))) == 6
