"""OWN through the public face: the weight is the polar factor of its proxy, and trains as its formulas say."""

import math

import pytest
import scipy.linalg
import torch
from common import LAYERS, gaussian
from torch import nn

import stiefel

SCALES = [0.5, 1.0, math.sqrt(2), 3.0]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)  # for the layers' own initialization, which takes no generator


every_layer = pytest.mark.parametrize("name", LAYERS)


def layer_of(name, seed=0, **options):
    """A constrained layer in double precision that started at a random weight, its layout, and that weight."""
    make, plain = LAYERS[name]
    layer = make().double()
    start = gaussian(*plain.shape, seed=seed)
    with torch.no_grad():
        layer.weight.copy_(start)
    stiefel.constrain(layer, "own", **options)
    return layer, plain, start


def proxy(layer):
    return layer.parametrizations.weight.original


def polar_by_scipy(matrices):
    return torch.stack([torch.from_numpy(scipy.linalg.polar(m.detach().numpy(), side="left")[0]) for m in matrices])


def centred(matrices):
    return matrices - matrices.mean(dim=-1, keepdim=True)


def singular_values(matrices):
    return torch.linalg.svdvals(matrices.detach())


def is_centred(plain):
    _, p, n = plain.matrix_shape
    return not plain.columns and p < n


# --- the map ---


@every_layer
@pytest.mark.parametrize("center", [False, "auto"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_weight_is_the_scaled_polar_factor_of_the_proxy(name, center, scale):
    layer, plain, _ = layer_of(name, center=center, scale=scale)
    with torch.no_grad():
        proxy(layer).copy_(gaussian(*plain.shape, seed=7))
    v = plain.matrices(proxy(layer))
    if center == "auto" and is_centred(plain):
        v = centred(v)
        assert plain.matrices(layer.weight).sum(-1).abs().max() < 1e-12
    assert torch.allclose(plain.matrices(layer.weight), scale * polar_by_scipy(v), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("shape", "size", "center"), [((12, 5), 4, "auto"), ((10, 5), 5, False), ((6, 9), 2, True)])
def test_groups_of_rows_are_polar_factors_of_their_own(shape, size, center):
    layer = nn.Linear(shape[1], shape[0]).double()
    stiefel.constrain(layer, "own", group_size=size, center=center)
    with torch.no_grad():
        proxy(layer).copy_(gaussian(*shape, seed=7))
    rows = proxy(layer).reshape(-1, size, shape[1])
    expected = polar_by_scipy(rows if center is False else centred(rows))
    assert torch.allclose(layer.weight.reshape(-1, size, shape[1]), expected, rtol=0, atol=1e-12)


def test_group_size_one_centred_is_centred_weight_normalization():
    layer = nn.Linear(6, 4).double()
    stiefel.constrain(layer, "own", group_size=1, center=True, scale=2.0)
    with torch.no_grad():
        proxy(layer).copy_(gaussian(4, 6, seed=7))
    v = centred(proxy(layer))
    assert torch.allclose(layer.weight, 2 * v / v.norm(dim=1, keepdim=True), rtol=0, atol=1e-12)


# --- centring ---


@pytest.mark.parametrize(("out", "inputs", "centres"), [(4, 9, True), (8, 9, True), (9, 9, False), (9, 8, False)])
def test_auto_centres_filters_where_a_rank_is_left(out, inputs, centres):
    layer = nn.Linear(inputs, out).double()
    with torch.no_grad():
        layer.weight.copy_(gaussian(out, inputs) + 1)
    stiefel.constrain(layer, "own")
    means = layer.weight.mean(dim=1).abs().max().item()
    assert (means < 1e-12) == centres
    assert stiefel.report(layer).worst < 1e-12


@pytest.mark.parametrize(
    ("out", "inputs", "group_size"), [(9, 9, None), (9, 8, None), (10, 5, 5)], ids=["square", "tall", "groups"]
)
def test_centring_without_a_rank_to_spare_is_refused(out, inputs, group_size):
    layer = nn.Linear(inputs, out)
    before = layer.weight.detach().clone()
    with pytest.raises(stiefel.LayoutError, match="center=True cannot hold"):
        stiefel.constrain(layer, "own", center=True, group_size=group_size)
    assert torch.equal(layer.weight, before)
    assert not hasattr(layer, "parametrizations")


# --- start and assignment ---


@every_layer
@pytest.mark.parametrize("scale", SCALES)
def test_training_starts_at_the_nearest_point(name, scale):
    layer, plain, start = layer_of(name, center=False, scale=scale)
    expected = plain.tensor(scale * polar_by_scipy(plain.matrices(start)))
    assert torch.allclose(layer.weight, expected, rtol=0, atol=1e-12)
    assert torch.allclose(proxy(layer), expected, rtol=0, atol=1e-12)  # the proxy starts at s X₀, not at X₀


@every_layer
def test_a_point_of_the_set_is_kept(name):
    layer, _, _ = layer_of(name, scale=2.0)
    w = layer.weight.detach().clone()
    layer.weight = w
    assert torch.allclose(layer.weight, w, rtol=0, atol=1e-13)


@every_layer
@pytest.mark.parametrize("center", [False, "auto"])
def test_an_assigned_weight_becomes_the_nearest_point(name, center):
    layer, plain, _ = layer_of(name, center=center, scale=3.0)
    w = gaussian(*plain.shape, seed=8)
    layer.weight = w
    v = plain.matrices(w)
    v = centred(v) if center == "auto" and is_centred(plain) else v
    assert torch.allclose(plain.matrices(layer.weight), 3 * polar_by_scipy(v), rtol=0, atol=1e-12)


# --- derivatives ---


@every_layer
@pytest.mark.parametrize("at", ["start", "random"])
def test_derivatives_through_the_layer(name, at):
    layer, plain, _ = layer_of(name, scale=1.5)
    v = proxy(layer).detach().clone() if at == "start" else gaussian(*plain.shape, seed=7)
    c = gaussian(*plain.shape, seed=9)

    class Weight(nn.Module):
        """Calls nothing but the layer's weight, so that functional_call can replace the proxy."""

        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self):
            return (self.layer.weight * c).sum() + (self.layer.weight.sum() ** 3) / 10

    def loss(value):
        return torch.func.functional_call(Weight(), {"layer.parametrizations.weight.original": value}, ())

    v.requires_grad_()
    assert torch.autograd.gradcheck(loss, (v,), fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, (v,), fast_mode=True)


@every_layer
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("center", [False, "auto"])
def test_one_step_is_the_projected_gradient_at_every_scale(name, scale, center):
    errors = []
    for lr in (1e-2, 1e-3):
        layer, plain, _ = layer_of(name, center=center, scale=scale)
        optimizer = stiefel.optimizer(layer, torch.optim.SGD, lr=lr)
        before, g = layer.weight.detach().clone(), gaussian(*plain.shape, seed=9)
        (layer.weight * g).sum().backward()
        optimizer.step()
        x, g = plain.matrices(before) / scale, plain.matrices(g)
        a = g @ x.mT
        expected = (a - a.mT) / 2 @ x + g - a @ x
        if center == "auto" and is_centred(plain):
            expected = centred(expected)
        moved = plain.matrices(layer.weight.detach() - before)
        errors.append(torch.linalg.norm(moved + lr * expected).item())
        assert errors[-1] < 0.5 * lr * torch.linalg.norm(expected)
    assert math.log10(errors[0] / errors[1]) >= 1.9


def test_coefficients_are_those_measured_above():
    assert stiefel.get("own").coefficients == (1.0, 1.0)


@every_layer
@pytest.mark.parametrize("center", [False, "auto"])
def test_under_plain_sgd_the_proxy_only_grows(name, center):
    layer, plain, _ = layer_of(name, center=center)
    optimizer = stiefel.optimizer(layer, torch.optim.SGD, lr=0.3)
    smallest, norm = 0.0, 0.0
    first = torch.linalg.norm(proxy(layer)).item()
    generator = torch.Generator().manual_seed(3)
    for _ in range(60):
        optimizer.zero_grad()
        c = torch.randn(plain.shape, generator=generator, dtype=torch.float64)
        (layer.weight * c).sum().backward()
        optimizer.step()
        v = plain.matrices(proxy(layer))
        v = centred(v) if center == "auto" and is_centred(plain) else v
        low, size = singular_values(v)[:, -1].min().item(), torch.linalg.norm(v).item()
        assert low >= smallest - 1e-12
        assert size >= norm - 1e-12
        smallest, norm = low, size
    assert norm > 1.05 * first
    assert stiefel.report(layer).worst < 1e-12


# --- learnable scale ---


def test_learnable_scale_multiplies_each_output():
    layer, plain, start = layer_of("wide", scale="learnable", center=False)
    gain = layer.parametrizations.weight[0].gain
    x = polar_by_scipy(plain.matrices(start))[0]
    assert torch.equal(gain, torch.ones(4, dtype=torch.float64))
    assert torch.allclose(layer.weight, x, rtol=0, atol=1e-12)
    with torch.no_grad():
        gain.copy_(torch.tensor([0.5, 1.0, 2.0, 3.0]))
    assert torch.allclose(layer.weight, gain[:, None] * x, rtol=0, atol=1e-12)
    assert stiefel.report(layer).worst < 1e-12  # measured without the factors
    c = gaussian(4, 9, seed=5)
    (layer.weight * c).sum().backward()
    assert torch.allclose(gain.grad, (c * x).sum(1), rtol=0, atol=1e-12)
    w = layer.weight.detach().clone()
    layer.weight = w
    assert torch.allclose(layer.weight, w, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["conv", "grouped"])
def test_learnable_scale_of_convolutions_follows_the_output_channels(name):
    layer, _, _ = layer_of(name, scale="learnable")
    before = layer.weight.detach().clone()
    factors = torch.arange(1.0, 7.0, dtype=torch.float64)
    with torch.no_grad():
        layer.parametrizations.weight[0].gain.copy_(factors)
    assert torch.allclose(layer.weight, factors[:, None, None, None] * before, rtol=1e-12, atol=0)


def test_learnable_scale_of_orthonormal_columns_is_refused():
    with pytest.raises(stiefel.LayoutError, match="learnable"):
        stiefel.constrain(nn.Linear(4, 9), "own", scale="learnable")


# --- degenerate proxies ---


@pytest.mark.parametrize("value", ["zero", "rank one"])
def test_a_degenerate_proxy_recovers_by_training(value):
    layer, plain, _ = layer_of("wide", center=False)
    v = torch.zeros(4, 9, dtype=torch.float64) if value == "zero" else torch.ones(4, 9, dtype=torch.float64)
    with torch.no_grad():
        proxy(layer).copy_(v)
    optimizer = stiefel.optimizer(layer, torch.optim.SGD, lr=1e-2)
    (layer.weight * gaussian(*plain.shape, seed=5)).sum().backward()
    assert torch.isfinite(proxy(layer).grad).all()
    optimizer.step()
    assert stiefel.report(layer).worst < 1e-10
