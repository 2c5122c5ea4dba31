"""The paper's methods and baselines as released: parts/as_released.py beside the formulas of the Lua files."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import stiefel
from stiefel.attach.weights import constrained_weights
from stiefel.compare import load_problem
from stiefel.linalg import gram_residual, nearest_orthonormal, qf

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def released(name, weights, biases, batches, lr, halve_after):
    """The released training, layer by layer: weights (out, in) with sums of gradients, ReLU between, a free head."""
    weights, biases = [w.clone() for w in weights], [b.clone() for b in biases]
    sums = [torch.zeros_like(w) for w in weights[:-1]]
    scheduled = lr
    for step, (x, y) in enumerate(batches):
        if step == halve_after:
            scheduled = lr / 2
        leaves = [t.clone().requires_grad_() for t in (*weights, *biases)]
        w, b = leaves[: len(weights)], leaves[len(weights) :]
        h = x
        for i in range(len(w)):
            h = (h if i == 0 else h.relu()) @ w[i].T + b[i]
        grads = torch.autograd.grad(nn.functional.cross_entropy(h, y), leaves)
        for i, total in enumerate(sums):
            total += grads[i]
            tall = weights[i].shape[0] >= weights[i].shape[1]
            m, g = (weights[i], total) if tall else (weights[i].T, total.T)
            new = update(name if name != "cayt" or i == 0 else "ei_qr", m, g, lr)
            weights[i] = new if tall else new.T
        weights[-1] = weights[-1] - scheduled * grads[len(weights) - 1]
        biases = [bias - scheduled * grad for bias, grad in zip(biases, grads[len(weights) :], strict=True)]
    return weights


def update(name, w, g, lr):
    n, p = w.shape
    if name == "cayt":
        a, eye = g @ w.T - w @ g.T, torch.eye(n, dtype=w.dtype)
        return torch.linalg.inv(eye + lr / 2 * a) @ ((eye - lr / 2 * a) @ w)
    direction = {
        "ei_qr": lambda: g - w @ (w.T @ g + (w.T @ g).T) / 2,
        "ci_qr": lambda: g - w @ (g.T @ w),
        "qr": lambda: g,
    }[name]()
    q, r = torch.linalg.qr(w - lr * direction)
    for i in range(p):
        if r[i, i] < 0:
            q[:, i] *= -1
    return q


@pytest.mark.parametrize("first", [(7, 12), (7, 4)], ids=["wide", "tall"])
@pytest.mark.parametrize("name", ["ei_qr", "ci_qr", "qr", "cayt"])
def test_as_released_is_the_released_loop(name, first):
    load_problem(BENCHMARKS / "omdsm.py")
    torch.manual_seed(0)
    width, inputs = first
    sizes = [inputs, width, width, width, 3]
    model = nn.Sequential()
    for i, (a, b) in enumerate(pairwise(sizes)):
        model.append(nn.Linear(a, b))
        if i < 3:
            model.append(nn.ReLU())
    stiefel.constrain(model.double(), f"{name}_as_released", exclude=["6"])
    layers = [model[i] for i in (0, 2, 4, 6)]
    weights, biases = [m.weight.detach().clone() for m in layers], [m.bias.detach().clone() for m in layers]
    start = [w @ w.T if len(w) <= w.shape[1] else w.T @ w for w in weights[:3]]
    on_the_set = [torch.allclose(s, torch.eye(len(s), dtype=s.dtype), atol=1e-8) for s in start]
    assert on_the_set == [name == "cayt", False, False]
    batches = [(torch.randn(8, inputs, dtype=torch.float64), torch.randint(3, (8,))) for _ in range(6)]
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.3)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
    for layer, expected in zip(layers, released(name, weights, biases, batches, 0.3, 3), strict=True):
        assert torch.allclose(layer.weight, expected, atol=1e-10)


def released_proxy(name, v, g):
    """The released layer, group by group: W of a proxy V (out, in), and the gradient that it gives V where W's is G.

    ``K_ij = 1/(λ_j − λ_i)`` off the diagonal, as there: exact where eigenvalues differ.
    """
    n = v.shape[1]
    centred = v - v.mean(1, keepdims=True)
    d, eig, _ = np.linalg.svd(centred @ centred.T / n + 1e-7 * np.eye(len(v)))
    u = np.diag(eig**-0.5) @ d.T
    zca = name == "olm"
    w = (d @ u if zca else u) @ centred * (1 / n) ** 0.5
    hat, d_hat = u @ centred, (d.T @ g if zca else g)
    f, mean = d_hat @ hat.T / n, d_hat.mean(1, keepdims=True)
    s = eig[:, None] * f.T
    if zca:
        s = s + np.sqrt(eig)[:, None] * f * np.sqrt(eig)[None]
    gaps = eig[:, None] - eig[None]
    k = np.divide(1, gaps, out=np.zeros_like(gaps), where=gaps != 0)
    s = s * k.T
    s = s + s.T - np.diag(np.diag(f))
    return w, u.T @ (s.T @ hat + d_hat - mean) * (1 / n) ** 0.5


@pytest.mark.parametrize("shape", [(5, 12), (5, 5), (1, 4)], ids=str)
@pytest.mark.parametrize("name", ["olm", "olm_var"])
def test_the_papers_own_layers_are_the_released_ones(name, shape):
    load_problem(BENCHMARKS / "omdsm.py")
    torch.manual_seed(3)
    layer = stiefel.constrain(nn.Linear(shape[1], shape[0]).double(), f"{name}_as_released")
    proxy = layer.parametrizations.weight.original
    assert proxy.abs().max() <= shape[1] ** -0.5
    g = torch.randn(shape, dtype=torch.float64)
    expected, gradient = released_proxy(name, proxy.detach().numpy(), np.zeros(shape))
    # The signs of PCA's rows are whatever LAPACK gives there, so that those of the gradient's rows follow.
    signs = np.sign((expected * layer.weight.detach().numpy()).sum(1, keepdims=True)) if name == "olm_var" else 1.0
    expected, gradient = released_proxy(name, proxy.detach().numpy(), g.numpy() * signs)
    assert np.abs(layer.weight.detach().numpy() - signs * expected).max() < 1e-9
    (layer.weight * g).sum().backward()
    assert np.abs(proxy.grad.numpy() - gradient).max() < 1e-6 * max(1, np.abs(gradient).max())
    sigma = torch.linalg.svdvals(layer.weight.detach())
    square = shape[0] == shape[1]
    assert torch.allclose(sigma[: len(sigma) - square], torch.ones(len(sigma) - square, dtype=torch.float64), atol=1e-4)
    if square:  # centring takes a rank away
        assert sigma[-1] < 1e-3


def test_the_papers_own_layers_have_groups_and_no_bias():
    problem = load_problem(BENCHMARKS / "omdsm.py")(depth=2)
    model = problem.constrain(problem.make_model(), stiefel.get("olm_as_released"))
    assert model.hidden1.bias is None
    assert model.hidden2.bias is None
    assert model.head.bias is not None
    # 64 inputs bear 50 of the 100 rows together.
    assert [w.binding.layout.matrix_shape for w in constrained_weights(model)] == [(2, 50, 64), (1, 100, 100)]
    plain = problem.constrain(problem.make_model(), stiefel.get("own"))
    assert plain.hidden1.bias is not None


def test_as_released_scales_with_the_set():
    """At scale s: s times the start, and after a step on s times the set."""
    load_problem(BENCHMARKS / "omdsm.py")
    starts = []
    for scale in (1.0, 2.0):
        torch.manual_seed(0)
        layer = stiefel.constrain(nn.Linear(9, 5).double(), "ei_qr_as_released", scale=scale)
        starts.append(layer.weight.detach().clone())
    assert torch.allclose(2 * starts[0], starts[1])
    assert starts[0].abs().max() <= 1 / 3
    optimizer = stiefel.optimizer(layer, torch.optim.SGD, lr=0.1)
    layer(torch.randn(4, 9, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    assert stiefel.report(layer).worst < 1e-12


def test_the_published_qr_baseline_can_ascend():
    """On the loss Re⟨G, W⟩, where GXᵀ has twice below the diagonal what it has above; a retraction descends."""
    load_problem(BENCHMARKS / "omdsm.py")
    x = nearest_orthonormal(torch.randn(1, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    above = torch.ones(5, 5, dtype=torch.float64).triu(1)
    g = (above + 2 * above.mT) @ x
    loss = {}
    for name, options in (("qr_projection", {}), ("projection", {"map": "qr"})):
        method = stiefel.get(name, **options)
        moved = method.step(x, -1e-3 * g, 1e-3)
        assert torch.linalg.matrix_norm(gram_residual(moved)) < 1e-14
        assert bool(method.faults) == (name == "qr_projection")
        loss[name] = float((g * (moved - x)).sum())
    torch.testing.assert_close(stiefel.get("qr_projection").step(x, -g, 1.0), qf(x - g))
    assert loss["qr_projection"] > 1e-3 > 0 > loss["projection"]
