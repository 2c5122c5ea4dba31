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


@pytest.mark.sampled(3)
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


@pytest.fixture
def _small_batches():
    stiefel.bucket_bytes(4 * P * P * 16)
    yield
    stiefel.bucket_bytes(2**28)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", ["own", "projection", "retraction", "riemannian", "cayley", "pogo"])
def test_bounded_batches_take_less_memory_and_give_the_same_weights(
    method: str, request: pytest.FixtureRequest
) -> None:
    found = {}
    for bounded in (False, True):
        if bounded:
            request.getfixturevalue("_small_batches")
        torch.manual_seed(0)
        model = stiefel.constrain(nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(32)]), method)
        optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.1, momentum=0.9)
        x = torch.randn(2, 64)
        for _ in range(3):
            with PeakMemory() as peak:
                optimizer.zero_grad()
                model(x).square().sum().backward()
                optimizer.step()
        found[bounded] = peak.entries, [p.detach() for p in model.parameters()]
    assert found[True][0] < 0.75 * found[False][0]
    for a, b in zip(found[True][1], found[False][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("most", [0, -1, 2.5, "1 GB", True])
def test_a_bound_is_a_positive_number_of_bytes(most: object) -> None:
    with pytest.raises(stiefel.OptionError, match="expected a positive number of bytes"):
        stiefel.bucket_bytes(most)  # type: ignore[arg-type]
