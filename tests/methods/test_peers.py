"""The catalogue against other packages: pogo-torch, torch's own parametrizations, geotorch, pymanopt and scipy.

geoopt's optimizers are compared with in test_riemannian.py. Everything is in double precision, where two right programs
differ by rounding alone: tolerances are 1e-12 for single maps (some thousand ε) and 1e-11 for whole trajectories.
"""

from contextlib import nullcontext

import geotorch
import numpy as np
import pogo
import pymanopt
import pytest
import scipy.linalg
import torch
from common import gaussian
from geotorch.sphere import Sphere, SphereEmbedded
from pogo.base import SGD as PogoSGD
from pymanopt.manifolds import Stiefel, UnitaryGroup
from torch import nn
from torch.nn.utils.parametrizations import orthogonal

import stiefel
from stiefel.attach.weights import constrained_weights
from stiefel.layout import Layout
from stiefel.linalg import householder_rows, householder_vectors, nearest_orthonormal, polar, skew
from stiefel.manifold import geometry, retractions
from stiefel.manifold.geometry import project_tangent

WIDTHS = [(2, 9), (3, 7), (3, 6), (4, 5), (4, 4), (1, 6), (1, 2)]
"""4p < n, 2p < n, 2p = n, near-square, square, one row: every branch of the low-rank maps, and its borders."""

every_width = pytest.mark.parametrize("shape", WIDTHS, ids=str)


def orthonormal(*shape, seed=10, dtype=torch.float64):
    q, _ = torch.linalg.qr(gaussian(*shape, seed=seed, dtype=dtype).mT)
    return q.mT.contiguous()


def close(a, b, tolerance=1e-12):
    """Equal to an absolute tolerance, never vacuously: NaN is unequal, and shapes must agree."""
    a, b = (torch.from_numpy(t) if isinstance(t, np.ndarray) else t.detach().as_subclass(torch.Tensor) for t in (a, b))
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=tolerance)


def gradient_of(f, v, g):
    """Gradient of ⟨f(v), g⟩ at v."""
    leaf = v.clone().requires_grad_()
    return torch.autograd.grad(f(leaf), leaf, g)[0]


class Bare(nn.Module):
    """One parameter without a layer, so that its gradient is whatever a test sets."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w.clone())


def shortened(model):
    return [int(found.binding.tally.shortened) for found in constrained_weights(model)]


# --- pogo-torch ---


def fields(n, steps, dtype=torch.float64):
    """One gradient of norm 1 per step, as a function of a weight with n columns: of a random quadratic."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        a, t = (torch.randn(n, n, generator=generator, dtype=dtype) for _ in range(2))

        def gradient(w, a=a, t=t):
            g = (w @ a - t[: w.shape[-2]] - 3) @ a.mH
            return g / torch.linalg.matrix_norm(g, keepdim=True)

        yield gradient


BASES = {
    "sgd": ({}, {}),
    # pogo-torch seeds its buffer with the first gradient and adds that gradient again, where torch only seeds. With
    # dampening equal to momentum both buffers start at the first gradient, and go on alike.
    "momentum": ({"momentum": 0.8, "dampening": 0.8}, {"momentum": 0.8, "dampening": 0.8}),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("shape", [(2, 3, 8), (1, 5, 5), (3, 1, 6)], ids=str)
def test_pogo_trajectories_equal_pogo_torch(shape, base, scale, dtype):
    """Fixed λ = ½, rows. With W = sX a step of X is lr/s times the gradient at W."""
    lr, (ours_base, theirs_base) = 0.3, BASES[base]
    start = orthonormal(*shape, dtype=dtype)
    model = stiefel.constrain(Bare(scale * start), "pogo", layers=["w"], scale=scale)
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=lr, **ours_base)
    theirs = nn.Parameter(start.clone())
    reference = pogo.POGO([theirs], PogoSGD(**theirs_base), lr=lr / scale)
    farthest, eye = 0.0, torch.eye(shape[-2], dtype=dtype)
    for gradient in fields(shape[-1], 50, dtype):
        model.w.grad = gradient(model.w.detach().as_subclass(torch.Tensor))
        theirs.grad = gradient(scale * theirs.detach())
        if ours_base:  # of a momentum's gradients we take the tangent part, they the whole
            theirs.grad = project_tangent(theirs.detach(), theirs.grad)
        optimizer.step()
        reference.step()
        x = theirs.detach()
        farthest = max(farthest, torch.linalg.matrix_norm(x @ x.mH - eye).max().item())
    assert shortened(model) == [0]  # the clamp, which theirs lacks, stayed out of the way
    assert close(model.w, scale * theirs, 1e-11)
    assert torch.linalg.norm(theirs.detach() - start) > 0.3  # they did move,
    assert farthest > 1e-8  # and not so slowly that any retraction would have agreed


def test_pogo_of_a_tall_weight_equals_pogo_torch_on_columns():
    layer = nn.Linear(4, 9, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(orthonormal(4, 9).mT)
    stiefel.constrain(layer, "pogo")
    optimizer = stiefel.optimizer(layer, torch.optim.SGD, lr=0.3)
    theirs = nn.Parameter(orthonormal(4, 9).mT.contiguous()[None])
    reference = pogo.POGO([theirs], PogoSGD(), lr=0.3, rows=False)
    for seed in range(50):
        g = gaussian(9, 4, seed=100 + seed % 7)
        layer.weight.grad, theirs.grad = g / 9, g[None] / 9
        optimizer.step()
        reference.step()
    assert shortened(layer) == [0]
    assert close(layer.weight, theirs[0], 1e-11)


def test_pogo_departs_from_pogo_torch_only_where_it_shortens():
    x, u = orthonormal(1, 3, 8), gaussian(1, 3, 8, seed=1)
    for size, same in ((0.5, True), (8.0, False)):
        displacement = size * u / torch.linalg.norm(u)
        moved, flag = stiefel.get("pogo").step(x, displacement, 1.0)
        theirs = nn.Parameter(x.clone())
        theirs.grad = -displacement.clone()
        pogo.POGO([theirs], PogoSGD(), lr=1.0).step()
        assert flag.tolist() == [not same]
        assert close(moved, theirs) == same


# --- torch.nn.utils.parametrizations.orthogonal ---

MAPS = ["matrix_exp", "cayley", "householder"]


def torchs(orthogonal_map, start):
    """torch's parametrized linear layer that starts at a given orthonormal weight."""
    layer = nn.Linear(*start.shape[::-1], bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(start)
    return orthogonal(layer, "weight", orthogonal_map=orthogonal_map)


@every_width
@pytest.mark.parametrize("tall", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("orthogonal_map", MAPS)
@pytest.mark.parametrize("size", [0.0, 0.3, 3.0])
def test_torch_orthogonal_has_torchs_values_and_gradients(shape, tall, orthogonal_map, size):
    """Xᵀ is torch's weight. torch transposes wide weights, and not square ones: there Wᵀ is parametrized as its W."""
    p, n = shape
    transposed = tall or p == n
    layout, x, v = Layout((n, p) if tall else (p, n)), orthonormal(p, n), size * gaussian(p, n, seed=1)
    layer = torchs(orthogonal_map, x.mT if transposed else x)
    method = stiefel.get("torch_orthogonal", map=orthogonal_map)
    base, theirs = layer.parametrizations.weight[0].base, layer.parametrizations.weight.original
    tensor = v.mT.tril(-1)
    if orthogonal_map == "householder":
        tensor = tensor - torch.eye(n, p, dtype=v.dtype)  # the diagonal that stands for no sign change
    with torch.no_grad():
        theirs.copy_(tensor if transposed else tensor.mT)

    def ours(u):
        return method.forward(u[None], layout, base=base[None])[0]

    weight = layer.weight.mT if transposed else layer.weight
    assert close(ours(v), weight)
    g = gaussian(p, n, seed=2)
    (expected,) = torch.autograd.grad(weight, theirs, g)
    expected = (expected if transposed else expected.mT).tril(-1).mT  # of torch's tensor only the lower part is free
    assert close(gradient_of(ours, v, g), expected, 1e-11)


@pytest.mark.parametrize("orthogonal_map", MAPS)
@pytest.mark.parametrize("shape", [(3, 7), (7, 3)], ids=str)
def test_torch_orthogonal_trains_as_torchs_own(orthogonal_map, shape):
    out, inputs = shape
    ours = nn.Linear(inputs, out, bias=False).double()
    with torch.no_grad():
        ours.weight.copy_(gaussian(out, inputs))
    stiefel.constrain(ours, "torch_orthogonal", map=orthogonal_map)
    theirs = torchs(orthogonal_map, ours.weight.detach())
    theirs.parametrizations.weight[0].base = ours.parametrizations.weight[0].parts.base[0].clone()
    assert close(ours.weight, theirs.weight)
    train_alike(ours, theirs)


def train_alike(ours, theirs):
    """Thirty steps of SGD with momentum on a cubic, from the same weight to the same weight, some way off."""
    start, c = ours.weight.detach().clone(), gaussian(*ours.weight.shape, seed=5)
    for layer in (ours, theirs):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.02, momentum=0.8)
        for _ in range(30):
            optimizer.zero_grad()
            ((layer.weight - c).pow(3) / 3 + c * layer.weight).sum().backward()
            optimizer.step()
    assert close(ours.weight, theirs.weight, 1e-10)
    assert torch.linalg.norm(ours.weight.detach() - start) > 0.3


def test_torchs_own_weight_collapses_under_decay_and_ours_does_not():
    """torch keeps ±1 on the trained tensor's diagonal and truncates it: what torch_orthogonal is said to mend."""
    ours = stiefel.constrain(nn.Linear(7, 3, bias=False).double(), "torch_orthogonal", map="householder")
    theirs = torchs("householder", orthonormal(3, 7))
    for layer in (ours, theirs):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1)
        (layer.weight * gaussian(3, 7, seed=4)).sum().backward()
        with pytest.warns(match="would move weight") if layer is ours else nullcontext():
            optimizer.step()
    assert theirs.weight.abs().max() == 0
    assert close(ours.weight @ ours.weight.mT, torch.eye(3, dtype=torch.float64))


def test_torchs_own_kernel_is_orthogonal_per_slice_and_ours_as_one_matrix():
    ours = stiefel.constrain(nn.Conv2d(3, 5, 3, bias=False).double(), "torch_orthogonal")
    theirs = orthogonal(nn.Conv2d(3, 5, 3, bias=False).double(), orthogonal_map="matrix_exp")
    eye = torch.eye(5, dtype=torch.float64)
    rows, slices = ours.weight.detach().flatten(1), theirs.weight.detach()
    assert close(rows @ rows.mT, eye)
    assert not close(slices.flatten(1) @ slices.flatten(1).mT, eye, 0.1)


# --- the thin maps against dense formulas ---


def rotation(x, v):
    """The n×n skew A with X₀ A = P(V), the tangent part of V at X₀; from the conditions that define it.

    A is the only skew matrix with that and no part outside the rows of X₀: (I − X₀ᵀX₀) A (I − X₀ᵀX₀) = 0.
    """
    tangent = v - (v @ x.mH + x @ v.mH) / 2 @ x
    a = x.mH @ tangent - tangent.mH @ x + x.mH @ (x @ tangent.mH) @ x
    normal = torch.eye(x.shape[-1], dtype=x.dtype) - x.mH @ x
    assert close(a, -a.mH)
    assert close(x @ a, tangent)
    assert close(normal @ a @ normal, torch.zeros_like(a))
    return a


def dense_exponential(x, a):
    return x @ torch.linalg.matrix_exp(a)


def dense_cayley(x, a):
    eye = torch.eye(x.shape[-1], dtype=x.dtype)
    return x @ (eye + a / 2) @ torch.linalg.inv(eye - a / 2)


DENSE = {
    "matrix_exp": (dense_exponential, lambda a: scipy.linalg.expm(a)),
    "cayley": (
        dense_cayley,
        lambda a: scipy.linalg.solve((np.eye(len(a)) - a / 2).T, (np.eye(len(a)) + a / 2).T).T,
    ),
}


@every_width
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("size", [1e-6, 1.0, 10.0])
def test_thin_trivializations_equal_the_dense_formulas(shape, dtype, name, size):
    """Values by scipy's expm and solve, gradients by autograd through torch's dense n×n forms."""
    x, v, g = orthonormal(*shape, dtype=dtype), *(gaussian(*shape, seed=s, dtype=dtype) for s in (1, 2))
    v, layout, method = size * v, Layout(shape), stiefel.get(name)
    proxy, parts = method.start(x[None], layout)
    assert close(method.forward(proxy, layout, **parts)[0], x)

    def thin(u):
        return method.forward(u[None], layout, **parts)[0]

    dense, by_scipy = DENSE[name]
    assert close(thin(v), x @ torch.from_numpy(by_scipy(rotation(x, v).numpy())), 1e-12 * (1 + size))
    gradient, expected = gradient_of(thin, v, g), gradient_of(lambda u: dense(x, rotation_graph(x, u)), v, g)
    assert close(gradient, expected, 1e-11 * (1 + expected.abs().max().item()))


def rotation_graph(x, v):
    """:func:`rotation` without its checks, for autograd."""
    tangent = v - (v @ x.mH + x @ v.mH) / 2 @ x
    return x.mH @ tangent - tangent.mH @ x + x.mH @ (x @ tangent.mH) @ x


@pytest.mark.parametrize("name", DENSE)
def test_gradients_of_thin_trivializations_by_differences(name):
    """Independent of autograd: central differences of scipy's dense form, error O(h²) ≈ 1e-9."""
    x, v, g, d = orthonormal(2, 9), *(gaussian(2, 9, seed=s) for s in (1, 2, 3))
    method, layout, h = stiefel.get(name), Layout((2, 9)), 1e-5

    def value(t):
        a = rotation(x, v + t * d).numpy()
        return (g.numpy() * (x.numpy() @ DENSE[name][1](a))).sum()

    slope = (gradient_of(lambda u: method.forward(u[None], layout, base=x[None])[0], v, g) * d).sum().item()
    assert slope == pytest.approx((value(h) - value(-h)) / (2 * h), abs=1e-8)


def reflections(v):
    """First p rows of H_p ⋯ H_1, by dense n×n products."""
    p, n = v.shape
    q = torch.eye(n, dtype=v.dtype)
    for row in v:
        q = (torch.eye(n, dtype=v.dtype) - 2 * torch.outer(row, row) / (row @ row)) @ q
    return q[:p]


@every_width
@pytest.mark.parametrize("size", [0.0, 1e-6, 1.0, 1e3])
def test_thin_householder_equals_dense_reflections_and_lapack(shape, size):
    p, n = shape
    method, layout, g = stiefel.get("householder"), Layout(shape), gaussian(*shape, seed=2)
    _, parts = method.start(orthonormal(*shape)[None], layout)
    signs = parts["signs"][0]
    assert signs.abs().eq(1).all()
    proxy = size * gaussian(*shape, seed=1)

    def thin(u):
        return method.forward(u[None], layout, **parts)[0]

    def explicit(u):
        return signs[:, None] * reflections(u.triu(1) + torch.eye(p, n, dtype=u.dtype))

    def lapack(u):
        a = u.mT.tril(-1)
        return signs[:, None] * torch.linalg.householder_product(a, 2 / (1 + (a * a).sum(0))).mT

    assert close(thin(proxy), explicit(proxy))
    assert close(thin(proxy), lapack(proxy))
    expected = gradient_of(explicit, proxy, g)
    tolerance = 1e-11 * (1 + expected.abs().max().item())
    assert close(gradient_of(thin, proxy, g), expected, tolerance)
    assert close(gradient_of(lapack, proxy, g), expected, tolerance)


@every_width
def test_householder_vectors_need_no_unit_diagonal(shape):
    v = gaussian(*shape, seed=7)
    assert close(householder_rows(v), reflections(v))
    assert close(householder_rows(v * torch.linspace(1e-6, 1e6, shape[0], dtype=v.dtype)[:, None]), reflections(v))


@every_width
def test_householder_starts_where_torchs_does(shape):
    """torch's form without a trivialization: the same vectors, below the diagonal of Xᵀ, and signs, on it."""
    p, n = shape
    x = orthonormal(p, n)
    layer = nn.Linear(p, n, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(x.mT)
    orthogonal(layer, "weight", orthogonal_map="householder", use_trivialization=False)
    vectors, signs = householder_vectors(x)
    theirs = layer.parametrizations.weight.original
    assert close(vectors.triu(1), theirs.tril(-1).mT)
    assert close(signs, theirs.diagonal())
    with torch.no_grad():
        theirs.add_(0.5 * gaussian(n, p, seed=3).tril(-1))
    moved = stiefel.get("householder").forward(theirs.mT[None], Layout(shape), signs=signs[None])[0]
    assert close(moved, layer.weight.mT)
    assert not close(moved, x, 1e-2)


@pytest.mark.parametrize("x", [torch.eye(3, 5), -torch.eye(3, 5), torch.eye(3), torch.eye(4)[[2, 0, 1, 3]]], ids=str)
def test_householder_vectors_of_permutations_and_signs(x):
    """LAPACK does not reflect where a column is done already (τ = 0): the signs must know."""
    x = x.double()
    vectors, signs = householder_vectors(x)
    assert close(signs[:, None] * reflections(vectors), x)


# --- geotorch ---


@every_width
@pytest.mark.parametrize("triv", ["expm", "cayley"])
@pytest.mark.parametrize("tall", [False, True], ids=["rows", "columns"])
def test_torch_orthogonal_equals_geotorchs_stiefel(shape, triv, tall):
    """geotorch: Xᵀ = B φ(L − Lᵀ)[:, :p], L the strict lower triangle of the tensor, φ = exp or Cayley.

    As torch, it transposes wide tensors and not square ones.
    """
    p, n = shape
    transposed = tall or p == n
    theirs = geotorch.Stiefel((n, p) if transposed else (p, n), triv=triv).double()
    theirs.base.copy_(orthonormal(n, n))
    method = stiefel.get("torch_orthogonal", map={"expm": "matrix_exp"}.get(triv, triv))
    layout, v, g = Layout((n, p) if tall else (p, n)), gaussian(p, n, seed=1), gaussian(p, n, seed=2)

    def ours(u):
        return method.forward(u[None], layout, base=theirs.base[None])[0]

    def reference(u):
        return theirs(u.mT).mT if transposed else theirs(u)

    assert close(ours(v), reference(v))
    assert close(gradient_of(ours, v, g), gradient_of(reference, v, g), 1e-11)
    assert theirs.in_manifold(ours(v), eps=1e-12)


@every_width
@pytest.mark.parametrize(("name", "triv"), [("matrix_exp", "expm"), ("cayley", "cayley")])
def test_thin_maps_reach_the_points_of_geotorchs_stiefel(shape, name, triv):
    """The same rotation in our coordinates: X₀ expm(A) with A = −B S Bᵀ, and the proxy V = X₀ A.

    S = L − Lᵀ; the first p columns of B are X₀ᵀ, and (B φ(S))ᵀ = φ(−S) Bᵀ. So it is with the Cayley map.
    """
    p, n = shape
    theirs = geotorch.Stiefel((n, p), triv=triv).double()
    theirs.base.copy_(orthonormal(n, n))
    x, lower = theirs.base[:, :p].mT, torch.zeros(n, n, dtype=torch.float64)
    v = gaussian(n, p, seed=1)
    lower[:, :p] = v.tril(-1)
    proxy = x @ (-theirs.base @ (lower - lower.mT) @ theirs.base.mT)
    ours = stiefel.get(name).forward(proxy[None], Layout(shape), base=x[None])[0]
    assert close(ours, theirs(v).mT)


@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("triv", ["expm", "cayley"])
def test_square_maps_equal_geotorchs_rotations(n, triv):
    theirs = geotorch.SO((n, n), triv=triv).double()
    theirs.base.copy_(orthonormal(n, n) if torch.det(orthonormal(n, n)) > 0 else orthonormal(n, n).flip(0))
    v = gaussian(n, n, seed=1)
    s = v.tril(-1) - v.tril(-1).mT
    name = "matrix_exp" if triv == "expm" else "cayley"
    ours = stiefel.get(name).forward((theirs.base @ s)[None], Layout((n, n)), base=theirs.base[None])[0]
    assert close(ours, theirs(v))
    assert theirs.in_manifold(ours, in_so=torch.det(theirs.base).item() > 0, eps=1e-12)


@pytest.mark.parametrize("triv", ["expm", "cayley"])
@pytest.mark.parametrize("shape", [(3, 7), (7, 3)], ids=str)
def test_torch_orthogonal_trains_as_geotorch(triv, shape):
    out, inputs = shape
    ours, theirs = (nn.Linear(inputs, out, bias=False).double() for _ in range(2))
    name = {"expm": "matrix_exp"}.get(triv, triv)
    with torch.no_grad():
        ours.weight.copy_(gaussian(out, inputs))
    stiefel.constrain(ours, "torch_orthogonal", map=name)
    geotorch.orthogonal(theirs, "weight", triv=triv)
    theirs.parametrizations.weight[0].base.copy_(ours.parametrizations.weight[0].parts.base[0])
    with torch.no_grad():
        theirs.parametrizations.weight.original.zero_()
    assert close(ours.weight, theirs.weight)
    train_alike(ours, theirs)


@pytest.mark.parametrize("n", [2, 3, 9])
def test_one_row_is_a_point_of_geotorchs_sphere(n):
    """On the sphere the exponential is the great circle, and every normalization of a proxy is v/‖v‖."""
    sphere, layout = Sphere((n,)).double(), Layout((1, n))
    sphere.base.copy_(orthonormal(1, n)[0])
    v, g = gaussian(n, seed=1), gaussian(n, seed=2)
    exponential = stiefel.get("matrix_exp")

    def ours(u):
        return exponential.forward(u[None, None], layout, base=sphere.base[None, None])[0, 0]

    assert close(ours(v), sphere(v))
    assert close(gradient_of(ours, v, g), gradient_of(sphere, v, g), 1e-11)
    embedded = SphereEmbedded((n,))
    for name in ("own", "oni", "bjorck", "spectral_norm"):
        method = stiefel.get(name, **({"center": False} if name in ("own", "oni") else {}))

        def normalized(u, method=method):
            return method.forward(u[None, None], layout)[0, 0]

        assert close(normalized(v), embedded(v)), name
        assert close(gradient_of(normalized, v, g), gradient_of(embedded, v, g), 1e-11), name


@pytest.mark.parametrize("method", [m for m in stiefel.available() if stiefel.get(m).feasible])
@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (4, 4)], ids=str)
def test_geotorch_finds_our_trained_weights_in_its_manifold(method, shape):
    out, inputs = shape
    torch.manual_seed(0)
    layer = stiefel.constrain(nn.Linear(inputs, out, bias=False).double(), method)
    start = layer.weight.detach().clone()
    optimizer = stiefel.optimizer(layer, torch.optim.SGD, lr=0.05)
    for seed in range(5):
        optimizer.zero_grad()
        (layer.weight * gaussian(out, inputs, seed=seed)).sum().backward()
        optimizer.step()
    w = layer.weight.detach().as_subclass(torch.Tensor)
    assert geotorch.Stiefel((out, inputs)).in_manifold(w, eps=1e-12)
    assert not close(w, start, 1e-3)


# --- pymanopt (column-orthonormal: every array is a transpose) ---

BATCH = 3


def columns(x):
    return np.ascontiguousarray(x.mT.numpy())


def rows(a):
    return torch.from_numpy(np.ascontiguousarray(np.swapaxes(a, -1, -2)))


def stiefel_of(p, n, **options):
    return Stiefel(n, p, k=BATCH, **options)


@every_width
def test_projection_gradient_and_transport_equal_pymanopts(shape):
    x, u = orthonormal(BATCH, *shape), gaussian(BATCH, *shape, seed=1)
    theirs = stiefel_of(*shape)
    assert close(geometry.project_tangent(x, u), rows(theirs.projection(columns(x), columns(u))))
    expected = rows(theirs.euclidean_to_riemannian_gradient(columns(x), columns(u)))
    assert close(geometry.euclidean_gradient(x, u), expected)
    y = orthonormal(BATCH, *shape, seed=11)
    tangent = geometry.project_tangent(x, u)
    moved = rows(theirs.transport(columns(x), columns(y), columns(tangent)))
    assert close(geometry.project_tangent(y, tangent), moved)


@every_width
def test_inner_product_and_norm_equal_pymanopts(shape):
    x, u, v = orthonormal(BATCH, *shape), *(gaussian(BATCH, *shape, seed=s) for s in (1, 2))
    theirs = stiefel_of(*shape)
    assert geometry.euclidean_inner(u, v).sum().item() == pytest.approx(
        float(theirs.inner_product(columns(x), columns(u), columns(v))), rel=1e-12, abs=1e-12
    )
    assert geometry.euclidean_inner(u, u).sum().sqrt().item() == pytest.approx(
        float(theirs.norm(columns(x), columns(u))), rel=1e-12
    )


@every_width
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e3])
@pytest.mark.parametrize(
    ("retraction", "ours"), [("qr", retractions.retract_qr), ("polar", retractions.retract_polar)], ids=["qr", "polar"]
)
def test_retractions_equal_pymanopts(shape, retraction, ours, size):
    """pymanopt 2.2's default is "qr", with R's diagonal made positive as ours; "polar" is its other one."""
    x = orthonormal(BATCH, *shape)
    u = size * geometry.project_tangent(x, gaussian(BATCH, *shape, seed=1))
    theirs = stiefel_of(*shape, retraction=retraction)
    # Rounding of X + U is relative to its size; the map divides by the smallest singular value, which is 1.
    assert close(ours(x, u), rows(theirs.retraction(columns(x), columns(u))), 1e-12 * (1 + size))


@every_width
def test_the_euclidean_geodesic_equals_pymanopts(shape):
    x = orthonormal(BATCH, *shape)
    u = geometry.project_tangent(x, gaussian(BATCH, *shape, seed=1))
    theirs = stiefel_of(*shape)
    assert close(retractions.exp_euclidean(x, u), rows(theirs.exp(columns(x), columns(u))), 1e-11)


def test_pymanopts_random_points_are_kept():
    theirs = stiefel_of(3, 7)
    np.random.seed(0)  # noqa: NPY002 (pymanopt draws from numpy's global generator)
    x = rows(theirs.random_point())
    u = rows(theirs.random_tangent_vector(columns(x)))
    assert close(polar(x), x)
    assert close(nearest_orthonormal(x), x)
    assert close(geometry.project_tangent(x, u), u)


def test_one_step_of_pymanopts_problem_is_ours():
    """Its Riemannian gradient by automatic differentiation, and its retraction, against one step of the optimizer."""
    start, c, lr = orthonormal(3, 7), gaussian(3, 7, seed=1), 0.1
    manifold = Stiefel(7, 3)

    @pymanopt.function.pytorch(manifold)
    def cost(point):
        return ((point - c.mT) ** 4).sum()

    problem = pymanopt.Problem(manifold, cost)
    point = columns(start)
    expected = manifold.retraction(point, -lr * problem.riemannian_gradient(point))
    for name, options in (("riemannian", {}), ("retraction", {"map": "qr"})):
        model = stiefel.constrain(Bare(start), name, layers=["w"], **options)
        optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=lr)
        ((model.w - c) ** 4).sum().backward()
        optimizer.step()
        assert close(model.w.as_subclass(torch.Tensor), rows(expected)), name


@pytest.mark.parametrize("n", [1, 2, 5])
def test_unitary_steps_equal_pymanopts_unitary_group(n):
    """A tangent at a unitary X is X Ω with Ω skew-Hermitian. Square geodesics are the same in both metrics."""
    x, v = (gaussian(BATCH, n, n, seed=s, dtype=torch.complex128) for s in (1, 2))
    x = torch.from_numpy(np.linalg.qr(x.numpy())[0])
    omega = (v - v.mH) / 2
    u = x @ omega
    groups = {r: UnitaryGroup(n, k=BATCH, retraction=r) for r in ("qr", "polar")}
    assert close(geometry.project_tangent(x, u), u)
    for exponential in (retractions.exp_euclidean, retractions.exp_canonical):
        assert close(exponential(x, u), groups["qr"].exp(x.numpy(), omega.numpy()), 1e-11)
    assert close(retractions.retract_polar(x, u), groups["polar"].retraction(x.numpy(), omega.numpy()))
    # qf is of rows: that of Xᴴ + (XΩ)ᴴ = Xᴴ(I + X Uᴴ) in columns.
    columns_omega = (x @ u.mH).numpy()
    expected = groups["qr"].retraction(x.mH.contiguous().resolve_conj().numpy(), columns_omega)
    assert close(retractions.retract_qr(x, u), torch.from_numpy(expected).mH.resolve_conj())
    assert geometry.euclidean_inner(u, v).sum().item() == pytest.approx(
        float(groups["qr"].inner_product(x.numpy(), u.numpy(), v.numpy()).real), rel=1e-12
    )


# --- scipy ---


def spectrum(p, n, values, dtype=torch.float64):
    """A p×n matrix with given singular values."""
    s = torch.as_tensor(values, dtype=torch.float64).to(dtype)
    return orthonormal(p, p, seed=21, dtype=dtype) @ (s[:, None] * orthonormal(p, n, seed=22, dtype=dtype))


@every_width
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_own_and_polar_projection_equal_scipys_polar(shape, dtype, size):
    v = size * gaussian(*shape, dtype=dtype)
    expected = torch.from_numpy(scipy.linalg.polar(v.numpy(), side="left")[0])
    layout = Layout(shape)
    tolerance = 1e-15 * np.linalg.cond(v.numpy()) * 1e2
    assert close(stiefel.get("own", center=False).forward(v[None], layout)[0], expected, tolerance)
    assert close(stiefel.get("projection").step(v[None], torch.zeros_like(v)[None], 0.1)[0], expected, tolerance)
    assert close(nearest_orthonormal(v), expected, tolerance)


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (4, 4)], ids=str)
def test_the_start_solves_scipys_procrustes_problem(shape):
    """The orthonormal matrix nearest to a square W is the rotation that best maps the identity to it."""
    out, inputs = shape
    w = gaussian(out, inputs)
    layer = nn.Linear(inputs, out, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(w)
    stiefel.constrain(layer, "own", center=False)
    side = "left" if out <= inputs else "right"
    assert close(layer.weight, scipy.linalg.polar(w.numpy(), side=side)[0])
    if out == inputs:
        assert close(layer.weight, scipy.linalg.orthogonal_procrustes(np.eye(out), w.numpy())[0])


@pytest.mark.parametrize("n", [2, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
def test_square_geodesics_equal_scipys_expm(n, dtype):
    x, k = orthonormal(n, n, dtype=dtype), skew(gaussian(n, n, seed=1, dtype=dtype))
    expected = torch.from_numpy(scipy.linalg.expm(k.numpy())) @ x
    assert close(retractions.exp_euclidean(x, k @ x), expected)
    assert close(retractions.exp_canonical(x, k @ x), expected)
    assert close(stiefel.get("matrix_exp").forward((k @ x)[None], Layout((n, n)), base=x[None])[0], expected)


@pytest.mark.parametrize("shape", [(2, 9), (3, 7), (4, 4)], ids=str)
def test_the_gradient_of_own_equals_scipys_sylvester_solution(shape):
    """dX = Ω X + H⁻¹ dV (I − XᵀX) with HΩ + ΩH = dV Xᵀ − X dVᵀ (Higham 2008, section 8.2), H = (V Vᵀ)^{1/2}."""
    v, d, g = (gaussian(*shape, seed=s) for s in (1, 2, 3))
    x, h = (torch.from_numpy(a) for a in scipy.linalg.polar(v.numpy(), side="left"))
    omega = scipy.linalg.solve_sylvester(h.numpy(), h.numpy(), (d @ x.mT - x @ d.mT).numpy())
    derivative = torch.from_numpy(omega) @ x + torch.linalg.solve(h, d - d @ x.mT @ x)
    own = stiefel.get("own", center=False)
    slope = (gradient_of(lambda u: own.forward(u[None], Layout(shape))[0], v, g) * d).sum()
    assert slope.item() == pytest.approx((g * derivative).sum().item(), rel=1e-11)
