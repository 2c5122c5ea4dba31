"""OWN by PCA, weight and spectral normalization against their formulas."""

import numpy as np
import pytest
import torch
from conformance import CHECKS
from formulas import ORIENTATIONS, close, gaussian, orthonormal
from torch import nn

import stiefel
from stiefel.layout import Layout


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_own_pca_equals_numpys_eigenvectors(orientation, size):
    """Huang et al. (2018), section 3.2: Λ^{-1/2} Dᵀ V_c; signs by a positive largest entry of each eigenvector."""
    layout = ORIENTATIONS[orientation]
    _, p, n = layout.matrix_shape
    v = size * gaussian(p, n)
    centred = (v - v.mean(-1, keepdim=True) if orientation == "rows" else v).numpy()
    values, d = np.linalg.eigh(centred @ centred.T)
    d = d * np.sign(d[np.abs(d).argmax(0), np.arange(p)])
    ours = stiefel.get("own_pca").forward(v[None], layout)[0]
    assert close(ours, d.T @ centred / np.sqrt(values)[:, None], 1e-10)


def test_own_pca_is_differentiable_once_and_says_so():
    v = gaussian(2, 5).requires_grad_()
    x = stiefel.get("own_pca").forward(v[None], Layout((2, 5)))
    (gradient,) = torch.autograd.grad((x**3).sum(), v, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.square().sum().backward(retain_graph=True)
    # Silence would be worst beside a loss that has a second path to V: a gradient penalty, say.
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.square().sum() + x.sum(), v)


LAYERS = {
    "wide": lambda: nn.Linear(7, 3, bias=False),
    "tall": lambda: nn.Linear(3, 7, bias=False),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_weight_norm_trains_as_torchs(layer, scale):
    """A length per output filter: rows, or columns of a transposed matrix; at every scale the same steps."""
    torch.manual_seed(0)
    ours = stiefel.constrain(LAYERS[layer]().double(), "weight_norm", scale=scale)
    theirs = LAYERS[layer]().double()
    with torch.no_grad():
        theirs.weight.copy_(ours.weight)
    torch.nn.utils.parametrizations.weight_norm(theirs)
    start, c = ours.weight.detach().clone(), gaussian(*ours.weight.shape, seed=1)
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
        for _ in range(20):
            optimizer.zero_grad()
            (model.weight - c).pow(2).sum().backward()
            optimizer.step()
    assert close(ours.weight, theirs.weight, 1e-11)
    assert torch.linalg.norm(ours.weight.detach() - start) > 0.5


def proxy_and_gain(layer):
    parts = dict(layer.named_parameters())
    return parts["parametrizations.weight.original"], parts["parametrizations.weight.0.parts.gain"]


CENTRED = {
    "wide": (lambda: nn.Linear(7, 3, bias=False), None),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), None),
    "square, each row by itself": (lambda: nn.Linear(5, 5, bias=False), 1),
    "tall, each row by itself": (lambda: nn.Linear(3, 7, bias=False), 1),
}


@pytest.mark.parametrize("layer", CENTRED)
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_centred_weight_norm_equals_its_formula(layer, scale, size):
    """Huang et al. (ICCV 2017): w = g (v − mean v)/‖v − mean v‖ for each filter, and its gradient."""
    build, group_size = CENTRED[layer]
    ours = stiefel.constrain(build().double(), "weight_norm", scale=scale, center=True, group_size=group_size)
    proxy, gain = proxy_and_gain(ours)
    rows = ours.weight.detach().flatten(1)
    assert close(rows.sum(1), torch.zeros(len(rows)).double())
    assert close(rows.norm(dim=1), scale * torch.ones(len(rows)).double())
    if group_size is None:
        for block in rows.chunk(2 if layer == "grouped" else 1):
            assert close(block @ block.T, scale**2 * torch.eye(len(block)).double())
    v, g = size * (gaussian(*proxy.shape, seed=2) + 1), gaussian(*gain.shape, seed=3)
    c = gaussian(*proxy.shape, seed=4)
    with torch.no_grad():
        proxy.copy_(v)
        gain.copy_(g)
    v = v.requires_grad_()
    centred = v.flatten(1) - v.flatten(1).mean(1, keepdim=True)
    expected = (g.reshape(-1, 1) * centred / centred.norm(dim=1, keepdim=True)).reshape(v.shape)
    assert close(ours.weight, expected)
    (ours.weight * c).sum().backward()
    (gradient,) = torch.autograd.grad((expected * c).sum(), v)
    assert close(size * proxy.grad, size * gradient, 1e-11)


@pytest.mark.sampled(3, values=False)
@pytest.mark.parametrize("check", CHECKS)
def test_centred_weight_norm_obeys_every_law(check):
    CHECKS[check](stiefel.get("weight_norm", center="auto"), torch.float64, torch.device("cpu"))


def test_centred_weight_norm_keeps_its_mean_at_zero_while_it_trains():
    torch.manual_seed(0)
    layer = stiefel.constrain(nn.Linear(9, 4), "weight_norm", center=True)
    optimizer = stiefel.optimizer(layer, torch.optim.Adam, lr=0.1)
    start = layer.weight.detach().clone()
    for step in range(20):
        optimizer.zero_grad()
        (layer(gaussian(8, 9, seed=step, dtype=torch.float32)) - 1).square().mean().backward()
        optimizer.step()
    assert torch.linalg.norm(layer.weight.detach() - start) > 0.5
    assert layer.weight.detach().sum(1).abs().max() < 1e-5
    proxy, _ = proxy_and_gain(layer)
    with torch.no_grad():
        proxy[0] = 3.0  # a filter that is its own mean has no direction
    layer(torch.ones(2, 9)).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert layer.weight.detach().sum(1).abs().max() < 1e-5


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_spectral_norm_equals_numpys_and_torchs(layer, size):
    """torch's follows the norm by power iteration, which 2000 iterations make exact; per group ours is per block."""
    torch.manual_seed(0)
    ours = stiefel.constrain(LAYERS[layer]().double(), "spectral_norm")
    proxy = ours.parametrizations.weight.original
    w = size * gaussian(*proxy.shape, seed=2)
    with torch.no_grad():
        proxy.copy_(w)
    blocks = w.flatten(1).chunk(2 if layer == "grouped" else 1)
    expected = torch.cat([b / np.linalg.norm(b.numpy(), 2) for b in blocks]).reshape(w.shape)
    assert close(ours.weight, expected)
    if layer == "grouped":
        return
    theirs = LAYERS[layer]().double()
    with torch.no_grad():
        theirs.weight.copy_(w)
    torch.nn.utils.parametrizations.spectral_norm(theirs, n_power_iterations=2000)
    c, gradients = gaussian(*w.shape, seed=3), []
    for model in (ours, theirs):
        (model.weight * c).sum().backward()
        gradients.append(size * model.parametrizations.weight.original.grad)
    assert close(ours.weight, theirs.weight, 1e-10)
    assert close(*gradients, 1e-9)


@pytest.mark.parametrize("shape", [(3, 7), (4, 4)], ids=str)
def test_spectral_norm_at_its_start_takes_the_mean_of_the_leading_gradients(shape):
    """σ_max has the subgradients Σ w_i u_i v_iᵀ; at an orthonormal X their mean is X/p, whatever the basis."""
    v, g = orthonormal(1, *shape).requires_grad_(), gaussian(1, *shape, seed=1)
    x = stiefel.get("spectral_norm").forward(v, Layout(shape))
    (gradient,) = torch.autograd.grad(x, v, g)
    assert close(x, v)
    assert close(gradient, g - (g * v.detach()).sum() / shape[0] * v.detach(), 1e-11)
