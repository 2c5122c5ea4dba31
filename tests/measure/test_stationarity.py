"""How stationary a model is: in a user's loop, and in the records of comparisons."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import stiefel
from stiefel.errors import ObjectiveError

METHODS = [m for m in stiefel.available() if not m.startswith("test_")]


def model(method: str) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return stiefel.constrain(net, method, **stiefel.get(method).comparison)  # type: ignore


X = torch.randn(12, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("method", METHODS)
def test_the_norm_over_batches_is_that_of_their_mean(method):
    net = model(method)
    whole = stiefel.gradient_norm(net, lambda: net(X).square().mean())
    batches = stiefel.gradient_norm(net, lambda: (net(x).square().mean() for x in X.split(3)))
    assert whole > 0
    assert batches == pytest.approx(whole, rel=1e-12)
    with torch.no_grad():
        assert stiefel.gradient_norm(net, lambda: (net(x).square().mean() for x in X.split(3))) == batches
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_without_a_set_all_of_the_gradient_counts(method):
    """Of methods that keep weights on no set: the gradients of what is trained, penalties included."""
    if stiefel.get(method).claim is not None:
        pytest.skip("keeps weights on a set")
    net = model(method)
    found = stiefel.gradient_norm(net, lambda: net(X).square().mean() + stiefel.penalty(net))
    (net(X).square().mean() + stiefel.penalty(net)).backward()
    expected = torch.stack([p.grad.square().sum() for p in net.parameters()]).sum().sqrt().item()
    assert found == pytest.approx(expected, rel=1e-12)


def test_what_yields_nothing_is_told():
    with pytest.raises(ObjectiveError, match="yielded no number"):
        stiefel.gradient_norm(model("own"), lambda: iter(()))
    with pytest.raises(ObjectiveError, match="returned int"):
        stiefel.gradient_norm(model("own"), lambda: 3)


@pytest.mark.parametrize("method", ["own", "retraction", "soft"])
def test_a_monitor_measures_it_beside_orthogonality(method, tmp_path):
    net = model(method)
    optimizer = stiefel.optimizer(net, torch.optim.SGD, lr=0.1)
    monitor = stiefel.Monitor(net, every=5, sinks=[str(tmp_path / "log.csv")], loss=lambda: net(X).square().mean())
    for _ in range(20):
        with monitor:
            optimizer.zero_grad()
            loss = net(X).square().mean()
            loss.backward()
            optimizer.step()
        monitor.log(loss=loss)
    measured = [row["gradient_norm"] for row in monitor.rows if "worst" in row]
    assert measured[-1] == pytest.approx(stiefel.gradient_norm(net, lambda: net(X).square().mean()))
    assert measured[-1] < measured[0]
    assert monitor.summary()["gradient_norm"] == measured[-1]
    assert "‖P(∂L/∂W)‖" in str(monitor)
    monitor.close()
    assert "gradient_norm" in (tmp_path / "log.csv").read_text().splitlines()[0]
    with pytest.raises(stiefel.OptionError, match="'gradient_norm' is a name of the monitor's own"):
        monitor.log(gradient_norm=1.0)
    plain = stiefel.Monitor(net, every=1)
    plain.log(loss=1.0)
    assert "gradient_norm" not in plain.rows[0]
    assert plain.summary()["gradient_norm"] is None
