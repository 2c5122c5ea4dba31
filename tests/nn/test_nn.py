"""Layers that are orthogonal from the start, and moving averages of weights back to their set."""

import copy

import pytest
import torch
from torch import nn

import stiefel

HELD = [m for m in stiefel.available() if stiefel.get(m).feasible]


def layers(**options):
    yield stiefel.nn.OrthogonalLinear(6, 4, **options), torch.randn(5, 6), nn.Linear
    yield stiefel.nn.OrthogonalLinear(4, 6, bias=False, **options), torch.randn(5, 4), nn.Linear
    conv = stiefel.nn.OrthogonalConv2d(4, 6, 3, padding=1, stride=2, groups=2, **options)
    yield conv, torch.randn(2, 4, 5, 5), nn.Conv2d


@pytest.mark.parametrize("method", HELD)
def test_a_layer_is_orthogonal_and_trains(method):
    torch.manual_seed(0)
    for layer, x, kind in layers(constraint=method, scale="relu"):
        assert isinstance(layer, kind)
        (row,) = stiefel.report(layer).rows
        assert (row.name, row.method, row.scale) == ("weight", method, pytest.approx(2**0.5))
        start = layer.weight.detach().clone()
        optimizer = stiefel.optimizer(layer, torch.optim.SGD, lr=0.05)
        (layer(x) - 1).square().mean().backward()
        optimizer.step()
        assert not torch.equal(layer.weight, start)
        assert stiefel.report(layer).worst < 1e-5


def test_a_layer_computes_what_its_parent_does_with_the_same_weight():
    torch.manual_seed(0)
    for layer, x, kind in layers():
        plain = copy.deepcopy(layer)
        stiefel.release(plain)
        assert torch.equal(layer(x), plain(x))
        assert torch.equal(kind.forward(plain, x), plain(x))


def test_the_default_is_own_and_options_are_the_methods():
    layer = stiefel.nn.OrthogonalLinear(6, 4, center=False, dtype=torch.float64)
    assert layer.weight.dtype == torch.float64
    assert stiefel.report(layer).rows[0].method == "own"
    with pytest.raises(stiefel.OptionError, match="centre"):
        stiefel.nn.OrthogonalLinear(6, 4, centre=False)
    with pytest.raises(stiefel.LayoutError, match="center=True"):
        stiefel.nn.OrthogonalLinear(4, 4, center=True)


def test_a_network_of_such_layers_goes_through_a_checkpoint():
    def network():
        return nn.Sequential(stiefel.nn.OrthogonalConv2d(1, 4, 3), nn.Flatten(), stiefel.nn.OrthogonalLinear(36, 3))

    torch.manual_seed(0)
    one, other, x = network(), network(), torch.randn(2, 1, 5, 5)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))


def test_a_layer_holds_a_unitary_weight():
    layer = stiefel.nn.OrthogonalLinear(6, 4, dtype=torch.complex64)
    w = layer.weight.detach()
    assert torch.allclose(w @ w.mH, torch.eye(4, dtype=w.dtype), atol=1e-6)
    assert w.imag.abs().max() > 0.1


def test_project_moves_what_has_left_and_leaves_the_rest():
    torch.manual_seed(0)
    model = nn.ModuleDict({"moved": nn.Linear(6, 4), "kept": nn.Linear(6, 4), "proxy": nn.Linear(6, 4)})
    stiefel.constrain(model, "retraction", layers=["moved", "kept"], scale=2.0)
    stiefel.constrain(model, "oni", layers="proxy", iterations=2)
    with torch.no_grad():
        model["moved"].weight.mul_(1.3)
        model["proxy"].parametrizations.weight.original.add_(torch.randn(4, 6))
    kept, proxy = model["kept"].weight.detach().clone(), model["proxy"].weight.detach().clone()
    assert stiefel.project(model) is model
    w = model["moved"].weight.detach()
    assert torch.allclose(w @ w.T, 4 * torch.eye(4), atol=1e-5)
    assert torch.equal(model["kept"].weight, kept)
    assert torch.equal(model["proxy"].weight, proxy)


def test_the_report_shows_determinants_and_shortened_steps_where_there_are_any():
    torch.manual_seed(0)
    model = stiefel.constrain(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), "pogo")
    text = str(stiefel.report(model))
    assert "det" in text
    assert "shortened" not in text
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=100.0)
    for scale in (1.0, 1e-9):
        optimizer.zero_grad()
        (scale * model(torch.ones(2, 4)).square().sum()).backward()
        optimizer.step()
    rows = stiefel.report(model).rows
    assert [(r.shortened, r.steps) for r in rows] == [(1, 2), (1, 2)]
    assert rows[0].determinant == torch.linalg.det(model[0].weight).sign()
    assert rows[1].determinant is None
    assert "1 of 2" in str(stiefel.report(model))
    plain = stiefel.constrain(nn.Linear(4, 3), "own")
    assert "det" not in str(stiefel.report(plain))
