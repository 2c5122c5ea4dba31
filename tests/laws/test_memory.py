"""The law of memory: for p ≪ n a training step holds at most c·pn numbers, and no tensor of n² or more."""

import pytest
import torch
from common import PeakMemory, forms
from torch import nn

import stiefel
from stiefel.constraint import Constraint

P, N = 16, 3000
MOST = 12
"""Entries that a step may hold at one time beside the model and its gradients, in units of the weight's p·n."""

THIN = [form for name in stiefel.available() for form in forms(name) if form.thin]


@pytest.mark.parametrize("method", THIN, ids=str)
@pytest.mark.parametrize("layers", [1, 4])
def test_a_step_holds_a_few_times_the_weight(method: Constraint, layers: int) -> None:
    torch.manual_seed(0)
    model = stiefel.constrain(nn.ModuleList([nn.Linear(N, P, bias=False) for _ in range(layers)]), method)
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.1)
    x = torch.randn(1, N)

    def step() -> None:
        optimizer.zero_grad()
        loss = sum(layer(x).square().sum() for layer in model) + stiefel.penalty(model)
        loss.backward()
        optimizer.step()

    step()  # allocates what stays: gradients
    with PeakMemory() as peak:
        step()
    assert peak.entries <= MOST * layers * P * N
