"""The rectifier that passes on mean 0 and variance 1: its constants by quadrature, and its use."""

import math

import pytest
import torch
from scipy.integrate import quad

import stiefel
from stiefel.nn import PropagatedReLU


def expectation(function):
    """Of a function of a standard normal variable."""
    density = 1 / math.sqrt(2 * math.pi)
    halves = [quad(lambda x: function(x) * density * math.exp(-x * x / 2), *ends)[0] for ends in ((-40, 0), (0, 40))]
    return sum(halves)


def value(x):
    return float(PropagatedReLU()(torch.tensor(x, dtype=torch.float64)))


def test_a_standard_normal_input_gives_mean_zero_and_variance_one():
    assert abs(expectation(value)) < 1e-12
    assert abs(expectation(lambda x: value(x) ** 2) - 1) < 1e-12


def test_it_is_the_rectifier_shifted_and_scaled_in_any_precision():
    x = torch.linspace(-3, 3, 13)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        y = PropagatedReLU()(x.to(dtype))
        assert y.dtype == dtype
        expected = (x.relu() - 1 / math.sqrt(2 * math.pi)) / math.sqrt((1 - 1 / math.pi) / 2)
        assert torch.allclose(y.float(), expected, atol=2e-2 if dtype == torch.bfloat16 else 1e-6)
    assert torch.autograd.gradcheck(PropagatedReLU(), (x[x != 0].double().requires_grad_(),))


@pytest.mark.parametrize("depth", [10])
def test_orthogonal_layers_keep_mean_and_variance_through_depth(depth):
    torch.manual_seed(0)
    x = torch.randn(2000, 256)
    for _ in range(depth):
        x = PropagatedReLU()(stiefel.nn.OrthogonalLinear(256, 256, bias=False)(x)).detach()
    assert abs(float(x.mean())) < 0.05
    assert abs(float(x.var()) - 1) < 0.1
