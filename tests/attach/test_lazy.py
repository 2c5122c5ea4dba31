"""Lazy layers: constrained in the forward pass that gives them a shape."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

import stiefel

METHODS = [m for m in stiefel.available() if not m.startswith("test_")]


def model() -> nn.Sequential:
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5), nn.ReLU(), nn.Linear(5, 3))


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", METHODS)
def test_layers_act_when_they_get_their_shape(method):
    net = stiefel.constrain(model(), method, exclude=["5"])
    assert is_lazy(net[3].weight)
    with pytest.raises(stiefel.WeightError, match="run one forward pass"):
        stiefel.report(net)
    with pytest.raises(stiefel.WeightError, match=r"'0.weight', '3.weight'.* run one forward pass"):
        stiefel.optimizer(net, torch.optim.SGD, lr=0.1)
    with pytest.raises(stiefel.WeightError, match="run one forward pass"):
        stiefel.minimize(net, lambda: net(X).sum())
    first = net(X)
    torch.testing.assert_close(net(X), first)  # the first pass had used the constrained weights
    rows = stiefel.report(net).rows
    assert [(r.name, r.layout) for r in rows] == [("0.weight", "4×27 rows"), ("3.weight", "5×64 rows")]
    optimizer = stiefel.optimizer(net, torch.optim.SGD, lr=0.05, momentum=0.9)
    for _ in range(5):
        optimizer.zero_grad()
        (net(X).square().sum() + stiefel.penalty(net)).backward()
        optimizer.step()
    assert all(w.allows(w.residual()) for w in stiefel.attach.constrained_weights(net))
    assert type(stiefel.release(net)[3]) is nn.Linear


def test_copies_wait_too_and_released_ones_stay_free():
    net = stiefel.constrain(model(), "own")
    twin, free = copy.deepcopy(net), stiefel.release(copy.deepcopy(net))
    for each in (net, twin):
        each(X)
        assert len(stiefel.report(each).rows) == 3
    free(X)
    assert type(free[0]) is nn.Conv2d
    with pytest.raises(stiefel.SelectionError, match="nothing in this Sequential is constrained"):
        stiefel.report(free)
    assert not free[0]._forward_pre_hooks


@pytest.mark.filterwarnings("error")
def test_a_lazy_layer_released_by_itself_counts_as_free_on_purpose():
    net = stiefel.constrain(nn.Sequential(nn.LazyLinear(5), nn.Linear(5, 5)), "own")
    stiefel.release(net[0])
    net(torch.randn(2, 4))
    stiefel.optimizer(net, torch.optim.SGD, lr=0.1)


def test_wishes_and_their_errors_come_in_the_first_pass():
    net = stiefel.constrain(nn.Sequential(nn.LazyLinear(20)), "own", blocks=[8, 12])
    net(torch.randn(2, 8))
    assert [r.layout for r in stiefel.report(net).rows] == ["8×8 rows", "12×8 columns"]
    net = stiefel.constrain(nn.Sequential(nn.LazyLinear(6)), "own", group_size=4)
    for _ in range(2):
        with pytest.raises(stiefel.LayoutError, match="group_size=4 does not divide the 6 outputs"):
            net(torch.randn(2, 8))


def test_prefetched_models_see_the_new_weights():
    net = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4), nn.LazyLinear(4))
    stiefel.constrain(net, "own")
    for _ in range(3):
        net(torch.randn(2, 4)).sum().backward()
    assert all(r.error < 1e-6 for r in stiefel.report(net).rows)
    for layer in net[1:]:
        assert layer.parametrizations.weight.original.grad is not None


def test_lazy_layers_that_share_a_weight_are_refused():
    net = nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(4))
    net[1].weight = net[0].weight
    with pytest.raises(stiefel.WeightError, match="other layers share it"):
        stiefel.constrain(net, "own")


@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_of_constrained_layers(method):
    trained = stiefel.constrain(model(), method)
    trained(X)
    net = stiefel.constrain(model(), method)
    if any("parametrizations" in key for key in trained.state_dict()):
        with pytest.raises(stiefel.WeightError, match=r"'0.weight' has no shape yet .* run one forward pass"):
            net.load_state_dict(trained.state_dict())
        net = stiefel.constrain(model(), method)
        net(X)
    net.load_state_dict(trained.state_dict())
    torch.testing.assert_close(net(X), trained(X))
    plain = stiefel.release(copy.deepcopy(trained)).state_dict()
    net = stiefel.constrain(model(), method)
    net.load_state_dict(plain)
    torch.testing.assert_close(net(X), trained(X), rtol=1e-4, atol=1e-5)
    assert len(stiefel.report(net).rows) == 3
    assert not any(hook for layer in net for hook in layer._load_state_dict_pre_hooks.values() if "refuse" in str(hook))


def test_a_lazy_layer_is_constrained_once():
    net = stiefel.constrain(nn.Sequential(nn.LazyLinear(4)), "own")
    with pytest.raises(stiefel.SelectionError, match="constrained already"):
        stiefel.constrain(net, "retraction", scale=2.0)
    net(torch.randn(2, 4))
    assert stiefel.report(net).rows[0].method == "own"
