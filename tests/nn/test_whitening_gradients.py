"""Gradients of whitening layers, of any order and in every mode; where eigenvalues repeat, autograd's are NaN."""

import pytest
import scipy.linalg
import torch
from common import gaussian
from formulas import close, orthonormal
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

from stiefel.linalg.activations import whitened_samples
from stiefel.nn import Whitening1d, Whitening2d


def hadamard(p):
    """2p samples ±1 of p features whose covariance is I to the bit, and whose mean is 0."""
    h = torch.from_numpy(scipy.linalg.hadamard(p)).double()
    return torch.cat([h, -h])


def spectrum(count, values, seed=0):
    """Samples with a covariance of exactly these eigenvalues."""
    u = gaussian(count, len(values), seed=seed)
    u = torch.linalg.qr(u - u.mean(0))[0] * count**0.5
    return u * torch.tensor(values, dtype=torch.float64).sqrt() @ orthonormal(len(values), len(values), seed=1)


SAMPLES = {
    "identity": lambda: hadamard(4),
    "repeated": lambda: spectrum(7, [2.0, 2.0, 0.5]),
    "distinct": lambda: spectrum(7, [3.0, 1.0, 0.3]),
    "one feature": lambda: spectrum(5, [2.0]),
    "near ties": lambda: spectrum(7, [1.0, 1.0 + 1e-9, 1.0 - 1e-9]),
}


def by_autograd(x, eps=0.0):
    """ZCA whitening as one would write it."""
    centred = x - x.mean(0)
    values, d = torch.linalg.eigh(centred.T @ centred / len(x) + eps * torch.eye(x.shape[1], dtype=x.dtype))
    return centred @ ((d * values.rsqrt()) @ d.T)


def layer(p, **options):
    made = Whitening1d(p, track_running_stats=False, dtype=torch.float64, **options)
    if made.affine:
        with torch.no_grad():
            made.weight.copy_(gaussian(p, seed=5))
            made.bias.copy_(gaussian(p, seed=6))
    return made


def function_of(made):
    """The layer as a function of its input and its parameters."""
    names = [name for name, _ in made.named_parameters()]

    def function(x, *values):
        return functional_call(made, dict(zip(names, values, strict=True)), (x,))

    return function, [p.detach().clone().requires_grad_() for p in made.parameters()]


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("kind", ["zca", "newton"])
@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("affine", [True, False])
def test_first_and_second_derivatives_are_exact(name, kind, eps, affine):
    x = SAMPLES[name]().requires_grad_()
    function, parameters = function_of(layer(x.shape[1], kind=kind, eps=eps, affine=affine))
    assert gradcheck(function, (x, *parameters), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, (x, *parameters))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shape", [(3, 4, 2, 3), (3, 4, 5)])
def test_images_and_groups_have_exact_derivatives(groups, shape):
    cls = Whitening2d if len(shape) == 4 else Whitening1d
    made = cls(4, groups=groups, track_running_stats=False, dtype=torch.float64)
    function, parameters = function_of(made)
    x = gaussian(*shape).requires_grad_()
    assert gradcheck(function, (x, *parameters), check_forward_ad=True)
    assert gradgradcheck(function, (x, *parameters))


def test_a_third_derivative_is_exact():
    x = hadamard(2).requires_grad_()
    made = layer(2, eps=0.0, affine=False)

    def first(x):
        y = made(x)
        return torch.autograd.grad((y * gaussian(4, 2)).sum(), x, create_graph=True)[0]

    assert gradgradcheck(first, x)


def test_the_gradient_exists_where_autograds_does_not():
    """On a whitened batch, where a layer after a whitening layer begins, all eigenvalues are equal."""
    x, g = hadamard(4).requires_grad_(), gaussian(8, 4)
    assert torch.autograd.grad((by_autograd(x) * g).sum(), x)[0].isnan().any()
    (ours,) = torch.autograd.grad((layer(4, eps=0.0, affine=False)(x) * g).sum(), x)
    # At Σ = I: G less its mean, less the part of G that changes the covariance, ½ (A + Aᴴ) with A = (1/m) Gᵀ X.
    a = g.T @ x / len(x)
    assert close(ours, g - g.mean(0) - x @ (a + a.T) / 2)


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_the_gradient_is_autograds_where_that_exists(eps):
    x, g = spectrum(9, [3.0, 1.0, 0.3]).requires_grad_(), gaussian(9, 3)
    expected = torch.autograd.grad((by_autograd(x, eps) * g).sum(), x)[0]
    assert close(torch.autograd.grad((layer(3, eps=eps, affine=False)(x) * g).sum(), x)[0], expected, 1e-12)


def test_pca_has_the_exact_first_derivative_where_eigenvalues_differ_and_a_bounded_one_elsewhere():
    function, parameters = function_of(layer(3, kind="pca", eps=0.0))
    x = SAMPLES["distinct"]().requires_grad_()
    assert gradcheck(function, (x, *parameters), check_forward_ad=True)
    x = hadamard(4).requires_grad_()
    y = layer(4, kind="pca", eps=0.0)(x)
    (gradient,) = torch.autograd.grad((y * gaussian(8, 4)).sum(), x, create_graph=True)
    assert gradient.isfinite().all()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(gradient.sum(), x)


@pytest.mark.parametrize("p", [5, 64, 96])
@pytest.mark.parametrize("condition", [1.0, 9.0, 90.0, 110.0, 1e4])
def test_float32_has_the_gradients_of_float64(p, condition):
    x = spectrum(300, torch.logspace(0, -float(torch.tensor(condition).log10()), p).tolist())
    g, found = gaussian(300, p, seed=4), []
    for dtype in (torch.float32, torch.float64):
        made = Whitening1d(p, eps=0.0, dtype=dtype)
        batch = x.float().to(dtype).requires_grad_()
        inputs = (batch, *made.parameters())
        found.append(torch.autograd.grad((made(batch) * g.to(dtype)).sum(), inputs))
    for ours, exact in zip(*found, strict=True):
        assert torch.linalg.norm(ours.double() - exact) < 2e-6 * condition**0.5 * torch.linalg.norm(exact)


def test_the_gradient_under_create_graph_is_the_plain_one():
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        made = layer(6).to(dtype)
        x, g = gaussian(20, 6, dtype=dtype).requires_grad_(), gaussian(20, 6, seed=1, dtype=dtype)
        plain = torch.autograd.grad((made(x) * g).sum(), (x, *made.parameters()))
        graph = torch.autograd.grad((made(x) * g).sum(), (x, *made.parameters()), create_graph=True)
        assert all(close(a.double(), b.double(), tolerance) for a, b in zip(plain, graph, strict=True))
        assert all(b.requires_grad for b in graph[:2])


def test_a_shift_or_a_scale_of_all_samples_has_no_gradient():
    x = gaussian(30, 4).requires_grad_()
    (gradient,) = torch.autograd.grad((layer(4, eps=0.0)(x) * gaussian(30, 4, seed=1)).sum(), x)
    assert gradient.sum(0).abs().max() < 1e-13
    assert ((x - x.mean(0)) * gradient).sum().abs() < 1e-12


@pytest.mark.parametrize("kind", ["zca", "pca", "newton"])
def test_functional_transforms_agree_with_autograd(kind):
    made = layer(3, kind=kind, eps=0.1, affine=False)
    x, g, direction = gaussian(5, 7, 3), gaussian(7, 3, seed=1), gaussian(7, 3, seed=2)

    def loss(x):
        return (made(x) * g).sum()

    plain = torch.stack([torch.autograd.grad(loss(b.requires_grad_()), b)[0] for b in x.clone().unbind()])
    assert close(vmap(grad(loss))(x), plain, 1e-11)
    assert close(vmap(made)(x), torch.stack([made(b) for b in x]), 1e-12)
    assert close(jvp(loss, (x[0],), (direction,))[1], (plain[0] * direction).sum(), 1e-11)
    if kind != "pca":
        h = hessian(loss)(x[0]).reshape(21, 21)
        assert close(h, torch.autograd.functional.hessian(loss, x[0]).reshape(21, 21), 1e-11)


def test_only_what_needs_a_gradient_gets_one():
    made = layer(3)
    made.weight.requires_grad_(False)
    x = gaussian(7, 3)
    made(x).pow(3).sum().backward()
    assert made.weight.grad is None
    assert made.bias.grad is not None
    made.requires_grad_(False)
    assert not made(x).requires_grad
    (gradient,) = torch.autograd.grad(made(x.requires_grad_()).pow(3).sum(), x, create_graph=True)
    assert gradient.requires_grad


def test_gradients_in_batches_are_those_one_by_one():
    x, made = gaussian(9, 3).requires_grad_(), layer(3)
    y, g = made(x), gaussian(4, 9, 3, seed=1)
    (together,) = torch.autograd.grad(y, x, g, is_grads_batched=True, retain_graph=True)
    assert close(together, torch.stack([torch.autograd.grad(y, x, each, retain_graph=True)[0] for each in g]), 1e-12)


def test_a_network_with_whitening_trains():
    torch.manual_seed(0)
    x = torch.randn(256, 8) @ torch.randn(8, 8)
    target = (x @ torch.randn(8, 3)).argmax(1)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 16),
        Whitening1d(16, group_size=8),
        torch.nn.ReLU(),
        torch.nn.Linear(16, 16),
        Whitening1d(16),
        torch.nn.ReLU(),
        torch.nn.Linear(16, 3),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(100):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    assert (model.eval()(x).argmax(1) == target).float().mean() > 0.95


@pytest.mark.parametrize("kind", ["zca", "pca", "newton"])
def test_first_derivatives_of_layers_mapped_over_batches(kind):
    made = layer(3, kind=kind, eps=0.1)
    x, direction = gaussian(5, 7, 3).requires_grad_(), gaussian(5, 7, 3, seed=2)

    def loss(x):
        return vmap(made)(x).pow(3).sum()

    plain = torch.stack([torch.autograd.grad(made(b).pow(3).sum(), b)[0] for b in x.detach().requires_grad_().unbind()])
    assert close(torch.autograd.grad(loss(x), x)[0], plain, 1e-12)
    assert close(grad(loss)(x.detach()), plain, 1e-12)
    assert close(jvp(loss, (x.detach(),), (direction,))[1], (plain * direction).sum(), 1e-11)


@pytest.mark.parametrize("kind", ["zca", "pca", "newton"])
def test_second_derivatives_in_every_order_of_modes(kind):
    made = layer(3, kind=kind, eps=0.1, affine=False)
    x, g, v = gaussian(7, 3), gaussian(7, 3, seed=1), gaussian(7, 3, seed=2)

    def loss(x):
        return (made(x) * g).sum()

    def along(x):
        return jvp(loss, (x,), (v,))[1]

    def dual(x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(loss(forward_ad.make_dual(x, v))).tangent

    orders = {
        "reverse, reverse": lambda: grad(lambda x: (grad(loss)(x) * v).sum())(x),
        "forward over reverse": lambda: jvp(grad(loss), (x,), (v,))[1],
        "reverse over forward": lambda: grad(along)(x),
        "backward after a dual level": lambda: torch.autograd.grad(dual(leaf), leaf)[0],
        "all entries": lambda: (jacrev(jacrev(loss))(x) * v).sum((-2, -1)),
    }
    step, leaf = 1e-4, x.clone().requires_grad_()
    expected = (grad(loss)(x + step * v) - grad(loss)(x - step * v)) / (2 * step)
    for order in orders.values():
        if kind == "pca":
            with pytest.raises(RuntimeError, match="differentiable once"):
                order()
        else:
            assert close(order(), expected, 1e-5)
    with pytest.raises(RuntimeError, match="forward-mode derivatives"):  # which torch would take for 0
        jvp(along, (x,), (v,))


def test_a_gain_that_depends_on_the_samples_counts_once_under_create_graph():
    x = gaussian(1, 3, 20).requires_grad_()

    def loss(x):
        weight = 1 + x.mean(-1, keepdim=True).square() + x.std(-1, keepdim=True)
        return whitened_samples(x, weight, x.amax(-1, keepdim=True), eps=1e-3).y.pow(3)

    (plain,) = torch.autograd.grad(loss(x).sum(), x)
    (graph,) = torch.autograd.grad(loss(x).sum(), x, create_graph=True)
    assert close(graph, plain, 1e-12)
    assert gradgradcheck(loss, x, fast_mode=True)


@pytest.mark.parametrize("kind", ["zca", "pca", "newton"])
def test_hooks_see_the_gradient_once_under_create_graph(kind):
    leaves = [t.requires_grad_() for t in (gaussian(1, 3, 9), gaussian(1, 3, 1, seed=1), gaussian(1, 3, 1, seed=2))]
    given = [t * 1 for t in leaves]
    for t in given:
        t.register_hook(lambda g: 2 * g)
    loss = whitened_samples(*given, kind=kind, eps=1e-3).y.pow(3).sum()
    plain = torch.autograd.grad(loss, leaves, retain_graph=True)
    graph = torch.autograd.grad(loss, leaves, create_graph=True)
    assert all(close(a, b, 1e-11) for a, b in zip(plain, graph, strict=True))
