"""Lists of parameters, which are read without a forward pass: their weights are computed together, and are right."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch
from torch import Tensor, nn

import stiefel
from stiefel.attach.proxy import prefetched
from stiefel.attach.proxy.bucket import Bucket

PROXIED = [m for m in stiefel.available() if not m.startswith("test_") and stiefel.get(m).place == "forward"]


def gates(method: str, count: int = 5) -> nn.ParameterList:
    torch.manual_seed(0)
    members = [torch.randn(4, 4, dtype=torch.float64) for _ in range(count)] + [torch.randn(3, 6, dtype=torch.float64)]
    return stiefel.constrain(nn.ParameterList(members), method)


def loss(weights: list[Tensor]) -> Tensor:
    return torch.stack([(w * torch.linspace(0, 1, w.numel()).reshape(w.shape)).sum().sin() for w in weights]).sum()


@pytest.fixture
def computed(monkeypatch):
    """How many weights each computation was of."""
    counts: list[int] = []
    points = Bucket.points
    monkeypatch.setattr(
        Bucket, "points", lambda self, stacked: counts.append(len(self.formulas)) or points(self, stacked)
    )
    return counts


@pytest.mark.parametrize("method", PROXIED)
def test_reading_trains_as_one_by_one_does_and_computes_together(method, computed):
    together, alone = gates(method), gates(method)
    optimizers = [stiefel.optimizer(each, torch.optim.SGD, lr=0.1, momentum=0.9) for each in (together, alone)]
    for _ in range(3):
        for each, optimizer in zip((together, alone), optimizers, strict=True):
            optimizer.zero_grad()
            if each is together:
                computed.clear()
                weights = list(each)
                assert sorted(computed) == [1, 5]
            else:
                weights = [each.parametrizations[str(i)]() for i in range(6)]
            loss(weights).backward()
            optimizer.step()
    for p, q in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


def test_a_read_after_a_change_is_of_the_change():
    net = gates("own")
    first = net[0]
    assert net[0] is first  # one weight, as long as nothing changes
    with torch.no_grad():
        net.parametrizations["1"].original.add_(torch.randn(4, 4))
    assert not torch.equal(net[1], first)
    torch.testing.assert_close(net[1], net.parametrizations["1"](), rtol=0, atol=1e-13)
    with torch.no_grad():
        assert not net[0].requires_grad
    assert net[0].requires_grad


def test_backward_twice_and_members_that_are_not_used():
    net = gates("own")
    loss([net[0], net[1]]).backward()
    once = net.parametrizations["0"].original.grad.clone()
    loss([net[0]]).backward()
    torch.testing.assert_close(net.parametrizations["0"].original.grad, 2 * once)
    assert net.parametrizations["2"].original.grad is None


def test_inside_a_model_with_a_forward_pass(computed):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.gates = nn.Linear(4, 4, dtype=torch.float64), nn.ParameterList([torch.eye(4).double()] * 3)

        def forward(self, x: Tensor) -> Tensor:
            for gate in self.gates:
                x = x @ gate
            return self.head(x)

    other, model = gates("own"), stiefel.constrain(Model(), "own", layers=["gates", "head"])
    x = torch.randn(2, 4, dtype=torch.float64)
    gc.collect()  # lists of other tests
    before = len(prefetched._passes.lists)
    other[0].sum()
    for _ in range(3):
        computed.clear()
        (model(x).sum() + other[0].sum()).backward()
        assert max(computed, default=0) <= 5
        assert not prefetched._passes.stack
    assert len(prefetched._passes.lists) == before + 6
    del other, model
    gc.collect()
    assert len(prefetched._passes.lists) == before


def test_copies_and_threads_have_weights_of_their_own():
    net = gates("own")
    net[0].sum()
    twin = copy.deepcopy(net)
    assert twin[0] is not net[0]
    torch.testing.assert_close(twin[0], net[0])
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(net[0]))
    thread.start()
    thread.join()
    assert found[0] is not net[0]
    torch.testing.assert_close(found[0], net[0])
