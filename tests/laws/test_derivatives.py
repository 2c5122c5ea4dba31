"""The law of derivatives: ``⟨∂φ(V)[D], G⟩ = ⟨D, ∂φ(V)ᵀ[G]⟩`` of every reparameterization φ, and of its gradient again.

Against central differences in double, at ordinary proxies and at those where singular values repeat or vanish.
"""

import pytest
import torch
from formulas import close, every_proxy, gaussian, residual
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import stiefel
from stiefel.layout import Layout


def exactly_twice(name, options, at):
    """Whether second derivatives are claimed: not of own_pca, and of spectral_norm not at its kink.

    ONI's spectral bound takes the leading vector as a constant, so that its second derivative is not exact unless the
    iteration has forgotten the bound.
    """
    method = stiefel.get(name, **options)
    forgets = name != "oni" or method.bound == "frobenius" or method.count is None or method.count >= 12
    return name != "own_pca" and not (name == "spectral_norm" and at == "start") and forgets


def proxy_of(method, shape, at, dtype):
    """A function of the proxy and of what else is trained, and where to evaluate it."""
    layout = Layout(shape)
    x = method.nearest(gaussian(*layout.matrix_shape, seed=60, dtype=dtype), layout)
    proxy, parts = method.start(x, layout)
    if at == "random":
        proxy = gaussian(*proxy.shape, seed=61, dtype=dtype)
    trained = [key for key, part in parts.items() if isinstance(part, nn.Parameter)]

    def forward(v, *values):
        return method.forward(v, layout, **{**parts, **dict(zip(trained, values, strict=True))})

    return forward, (proxy.clone().requires_grad_(), *(parts[k].detach().clone().requires_grad_() for k in trained))


@pytest.mark.sampled(3)
@every_proxy
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
@pytest.mark.parametrize("at", ["start", "random"])
def test_derivatives_are_those_of_differences(name, options, dtype, at):
    method = stiefel.get(name, **options)
    if dtype not in method.dtypes:
        pytest.skip("for real weights only")
    for shape in [(2, 5), (3, 3), (5, 2), (1, 4)]:
        if name == "spectral_norm" and at == "start" and min(shape) > 1:
            continue  # a kink: its subgradient is tested above
        forward, inputs = proxy_of(method, shape, at, dtype)
        assert gradcheck(forward, inputs, fast_mode=dtype.is_complex or shape != (2, 5))
        if exactly_twice(name, options, at):
            assert gradgradcheck(forward, inputs, fast_mode=True)


@every_proxy
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
def test_training_starts_at_the_nearest_point_of_the_set(name, options, dtype):
    method = stiefel.get(name, **options)
    if dtype not in method.dtypes:
        pytest.skip("for real weights only")
    for shape in [(2, 5), (3, 3), (5, 2), (1, 4)]:
        layout = Layout(shape)
        x = method.nearest(gaussian(*layout.matrix_shape, seed=60, dtype=dtype), layout)
        forward, inputs = proxy_of(method, shape, "start", dtype)
        assert residual(x).max() < 1e-13
        assert close(forward(*inputs), x)


@pytest.mark.parametrize("kind", ["so", "dso", "mc", "srip", "ocnn"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
def test_derivatives_of_penalties(kind, dtype):
    method = stiefel.get("soft", kind=kind)
    for layout in (Layout((3, 7)), Layout((4, 4)), Layout((3, 2, 3), stride=(2,))):
        x = gaussian(*layout.matrix_shape, seed=62, dtype=dtype)
        x[..., 0, :] *= 3  # one eigenvalue stands out: srip's vector, which it takes as a constant, has converged
        x.requires_grad_()
        assert gradcheck(lambda v, layout=layout: method.penalty(v, layout), (x,), fast_mode=True, rtol=1e-5)
        if kind in ("so", "dso", "ocnn"):
            assert gradgradcheck(lambda v, layout=layout: method.penalty(v, layout), (x,), fast_mode=True)
