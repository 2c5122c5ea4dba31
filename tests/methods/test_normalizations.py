"""OWN by PCA, weight and spectral normalization against their formulas."""

import numpy as np
import pytest
import torch
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
