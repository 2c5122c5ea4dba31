"""The law of one small step, ``ΔW = −lr [a skew(GXᵀ)X + b G(I − XᵀX)]``, and claims over shapes and scales."""

import itertools
import math

import pytest
import torch
from formulas import (
    SHAPES,
    close,
    every_dtype,
    every_step,
    gaussian,
    orthonormal,
    residual,
    spectrum,
    stepped,
    variants,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import stiefel
from stiefel.constraint import Reparameterization, StepMethod
from stiefel.layout import Layout
from stiefel.linalg import nearest_orthonormal
from stiefel.manifold.geometry import project_tangent
from stiefel.methods import method_class
from stiefel.methods.riemannian import METRICS, RETRACTIONS


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("name", "options"), [case for kind in (Reparameterization, StepMethod) for case in variants(kind)]
)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_one_small_step_has_the_stated_coefficients(name, options, scale):
    """ΔW = −lr [a skew(GXᵀ)X + b G(I − XᵀX)], at every scale, up to O(lr)."""
    method = stiefel.get(name, **{**method_class(name).comparison, **options}, scale=scale)
    if method.coefficients is None:
        pytest.skip("no such form")
    (a, b), lr = method.coefficients, 1e-6
    for shape in [(3, 7), (4, 4), (7, 3)]:
        torch.manual_seed(0)
        layer = stiefel.constrain(nn.Linear(*shape[::-1], bias=False).double(), method)
        layout, before = Layout(shape, scale=scale), layer.weight.detach().clone()
        g = gaussian(*shape, seed=1)
        (layer.weight * g).sum().backward()
        stiefel.optimizer(layer, torch.optim.SGD, lr=lr).step()
        x, gx = layout.points(before)[0], layout.matrices(g)[0]
        expected = a * (gx @ x.mT - x @ gx.mT) / 2 @ x + b * (gx - gx @ x.mT @ x)
        moved = layout.matrices((before - layer.weight.detach()).as_subclass(torch.Tensor) / lr)[0]
        assert torch.linalg.norm(moved - expected) < 1e-4 * torch.linalg.norm(expected)


def farthest(method):
    """The longest step that a claim covers: its largest rate, at a gradient of norm one."""
    return method.claim.rates[1]


@every_step
@every_dtype
def test_step_methods_keep_their_claim_at_any_length(name, options, dtype):
    method = stiefel.get(name, **options)
    torch.manual_seed(0)
    failed = {}
    for shape, size, lr in itertools.product(SHAPES, [0.0, 1e-6, 1e-3, 1.0, 1e3, 1e6], [1e-6, 0.1, 1e6]):
        u = gaussian(12, *shape, seed=1)
        u = min(size, farthest(method)) * u / torch.linalg.matrix_norm(u, keepdim=True)
        moved = stepped(method, orthonormal(12, *shape).to(dtype), u.to(dtype), min(lr, farthest(method)))
        worst = residual(moved).max().item() / shape[0] ** 0.5
        if not method.claim.allows(worst, dtype, shape[0]):
            failed[shape, size] = worst
    assert not failed


@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize("metric", METRICS)
@every_dtype
def test_riemannian_retractions_keep_their_claim_at_any_length(retraction, metric, dtype):
    method = stiefel.get("riemannian", metric=metric, retraction=retraction)
    failed = {}
    for shape, size in itertools.product(SHAPES, [0.0, 1e-6, 1e-3, 1.0, 1e3, 1e6]):
        x, u = orthonormal(6, *shape).to(dtype), gaussian(6, *shape, seed=1)
        u = min(size, farthest(method)) * u / torch.linalg.matrix_norm(u, keepdim=True)
        moved = method.manifold(Layout(shape)).retract(x, project_tangent(x, u.to(dtype)))
        worst = residual(moved).max().item() / shape[0] ** 0.5
        if not method.claim.allows(worst, dtype, shape[0]):
            failed[shape, size] = worst
    assert not failed


@st.composite
def problems(draw):
    """A shape p ≤ n, a power of ten, and a seed."""
    p = draw(st.integers(1, 6))
    return (p, draw(st.integers(p, 12))), 10.0 ** draw(st.integers(-6, 6)), draw(st.integers(0, 10_000))


properties = settings(max_examples=30, deadline=None, derandomize=True)


@every_step
@properties
@given(problem=problems())
def test_a_few_steps_of_any_length_stay_within_the_claim(name, options, problem):
    """Not only the first step, from the set: each of the next too, from wherever the method has left the weight."""
    (p, n), size, seed = problem
    method, x = stiefel.get(name, **options), orthonormal(4, p, n, seed=seed)
    torch.manual_seed(seed)
    for step in range(4):
        u = gaussian(4, p, n, seed=seed + step + 2)
        u = min(size, farthest(method)) * u / torch.linalg.matrix_norm(u, keepdim=True)
        x = stepped(method, x, u, 0.1)
        assert method.claim.allows(residual(x).max().item() / p**0.5, torch.float64, p)


CLAIMED = [case for case in variants(Reparameterization) if stiefel.get(case.values[0], **case.values[1]).claim]


SCALE_FREE = ("own", "own_pca", "oni", "bjorck", "spectral_norm")


@pytest.mark.parametrize(("name", "options"), CLAIMED)
@every_dtype
@properties
@given(problem=problems())
def test_reparameterized_weights_are_within_the_claim(name, options, dtype, problem):
    """At proxies of condition number 5 and any size; trivializations at rotations up to some turns."""
    (p, n), size, seed = problem
    method, layout = stiefel.get(name, **{**method_class(name).comparison, **options}), Layout((p, n))
    _, parts = method.start(orthonormal(1, p, n, seed=seed).to(dtype), layout)
    if name not in (*SCALE_FREE, "householder"):
        size = min(size, farthest(method))
    proxy = (size * spectrum(p, n, torch.linspace(0.3, 1.5, p), seed=seed)[None]).to(dtype)
    worst = residual(method.forward(proxy, layout, **parts)).max().item() / p**0.5
    assert method.claim.allows(worst, dtype, p)


@pytest.mark.parametrize("name", SCALE_FREE)
@every_dtype
@properties
@given(problem=problems())
def test_weights_do_not_depend_on_the_size_of_their_proxy(name, dtype, problem):
    """What weight decay relies on. A power of two changes no digit, so that only the methods' own ε could tell."""
    (p, n), size, seed = problem
    factor = 2.0 ** round(math.log2(size))
    method = stiefel.get(name, **method_class(name).comparison)
    v = spectrum(p, n, torch.linspace(0.3, 1.5, p), seed=seed)[None].to(dtype)
    x, y = (method.forward(f * v, Layout((p, n))) for f in (1.0, factor))
    assert close(x, y, 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("kind", stiefel.get("soft").tuning["kind"])
@every_dtype
@properties
@given(problem=problems())
def test_penalties_fall_along_their_gradient_at_any_size(kind, dtype, problem):
    """A step of a millionth of the weight's length, in double; in single precision both are finite."""
    (p, n), size, seed = problem
    method, layout = stiefel.get("soft", kind=kind), Layout((p, n))
    x = (size * gaussian(1, p, n, seed=seed)).to(dtype).requires_grad_()
    value = method.penalty(x, layout).sum()
    (gradient,) = torch.autograd.grad(value, x)
    assert value >= 0
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()
    if dtype == torch.float64:
        down = gradient / torch.linalg.norm(gradient) * torch.linalg.norm(x)
        assert method.penalty(x - 1e-6 * down, layout).sum() <= value * (1 + 1e-14)


@properties
@given(problem=problems())
def test_tangent_projection_is_idempotent_and_shortens(problem):
    (p, n), size, seed = problem
    x, u = orthonormal(p, n, seed=seed), size * gaussian(p, n, seed=seed + 1)
    tangent = project_tangent(x, u)
    assert close(project_tangent(x, tangent), tangent, 1e-13 * size)
    assert torch.linalg.norm(tangent) <= torch.linalg.norm(u) * (1 + 1e-13)
    assert close(tangent @ x.mT + x @ tangent.mT, torch.zeros(p, p, dtype=torch.float64), 1e-13 * size)


@st.composite
def layouts(draw):
    """Any layout: plain, packed in blocks, transposed, batched, cut into groups; at any scale."""
    kind = draw(st.sampled_from(["plain", "transposed", "batched"]))
    k = tuple(draw(st.lists(st.integers(1, 3), max_size=3)))
    blocks = draw(st.integers(1, 3)) if kind != "batched" else 1
    out, inputs = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    if kind == "transposed":
        shape = (blocks * inputs, out, *k)
    else:
        shape = (*k, out, inputs) if kind == "batched" else (blocks * out, inputs, *k)
    fan = inputs * (math.prod(k) if kind != "batched" else 1)
    sizes = [None, *(g for g in range(1, min(out, fan) + 1) if out % g == 0)]
    return Layout(
        shape,
        blocks=blocks,
        transposed=kind == "transposed",
        batched=kind == "batched",
        group_size=draw(st.sampled_from(sizes)),
        scale=10.0 ** draw(st.integers(-6, 6)),
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(layout=layouts())
def test_layouts_are_isometries_with_an_inverse(layout):
    w = gaussian(*layout.shape, seed=7)
    x = layout.matrices(w)
    b, p, n = layout.matrix_shape
    assert x.shape == (b, p, n)
    assert p <= n
    assert torch.equal(layout.tensor(x), w)
    assert torch.equal(x.flatten().sort().values, w.flatten().sort().values)
    assert torch.allclose(layout.weight(layout.points(w)), w, rtol=1e-15, atol=0)
    assert torch.allclose(layout.points(w) * layout.scale, x, rtol=1e-15, atol=0)
    start = layout.weight(nearest_orthonormal(layout.points(w)))
    assert residual(layout.points(start)).max() < 1e-12
