"""What others published of very deep networks is what these networks do: a short form of ``talk.py depth``."""

import importlib
import math
from types import ModuleType

import pytest
import torch

RATES = {10: (0.05, 0.1, 0.2), 100: (0.008, 0.0113, 0.016)}
"""Around the best for linear networks: it falls as one over the depth."""


@pytest.fixture
def depth() -> ModuleType:
    return importlib.import_module("claims.depth")  # late: it registers methods, of which no other test may know


@pytest.fixture
def make(depth):
    def network(activation: str, layers: int, gain: float, start: str, steps: int = 300):
        return depth.Network(activation, layers, gain, start, depth.Size(steps=steps))

    return network


def test_inputs_are_white_on_the_training_data(depth) -> None:
    x = depth.whitened()[0][0].double()
    assert torch.allclose(x.mean(0), torch.zeros(x.shape[1], dtype=torch.float64), atol=1e-5)
    assert torch.allclose(torch.cov(x.T), torch.eye(x.shape[1], dtype=torch.float64), atol=1e-4)


def test_from_orthogonal_starts_linear_networks_of_100_layers_learn_as_fast_as_of_10(make) -> None:
    """Saxe, McClelland and Ganguli (2014): within twice the steps, rates √2 apart; never from Gaussian ones."""
    steps = {
        layers: min(make("linear", layers, 1.0, "orthogonal start").train(lr, 1000)[0] for lr in rates)
        for layers, rates in RATES.items()
    }
    assert steps[100] <= 2 * steps[10]
    for lr in (1e-3, RATES[100][0]):
        assert make("linear", 100, 1.0, "Gaussian start", steps=50).train(lr, 1000)[0] == math.inf


def test_from_orthogonal_starts_tanh_networks_of_100_layers_learn(make) -> None:
    """Pennington et al. (2017), Xiao et al. (2018): above .90 in 300 steps at a gain a little above 1, and below .5."""
    assert make("tanh", 100, 1.05, "orthogonal start").train(0.03, 1000)[0] <= 300
    assert make("tanh", 100, 1.05, "Gaussian start", steps=50).train(0.03, 1000)[1] < 0.5
