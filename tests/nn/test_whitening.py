"""Whitened batches against numpy: every kind, shape and group, any condition and scale; and what is refused."""

import copy

import numpy as np
import pytest
import torch
from common import gaussian
from formulas import close, orthonormal
from torch import nn

import stiefel
from stiefel.linalg.activations import whitened_samples
from stiefel.linalg.whitened_operation import whitened_in_graph
from stiefel.nn import Whitening1d, Whitening2d

KINDS = ["zca", "pca", "newton"]
EPS = {torch.float32: 1e-5, torch.float64: 1e-12}


def whitened(samples, kind, eps, iterations=5):
    """Whitened rows of a numpy array."""
    centred = samples - samples.mean(0)
    sigma = centred.T @ centred / len(samples) + eps * np.eye(samples.shape[1])
    values, d = np.linalg.eigh(sigma)
    if kind == "zca":
        w = (d / np.sqrt(values)) @ d.T
    elif kind == "pca":
        w = (d * np.sign(d[np.abs(d).argmax(0), np.arange(len(d))]) / np.sqrt(values)).T
    else:  # Huang et al. (CVPR 2019)
        trace, w = np.trace(sigma), np.eye(len(sigma))
        for _ in range(iterations):
            w = (3 * w - w @ w @ w @ sigma / trace) / 2
        w = w / np.sqrt(trace)
    return centred @ w.T


def rows(x):
    """A batch (N, C, …) as samples of C features."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def correlated(count, p, condition, seed=0, scale=1.0):
    """Samples whose covariance has exactly this condition number, with a mean."""
    u = gaussian(count, p, seed=seed)
    u = torch.linalg.qr(u - u.mean(0))[0] * count**0.5
    s = torch.logspace(0, -np.log10(condition) / 2, p, dtype=torch.float64)
    return scale * ((u * s) @ orthonormal(p, p, seed=seed + 1) + 1)


def covariance(y):
    return torch.cov(rows(y.detach().double()).T, correction=0).reshape(y.shape[1], y.shape[1])


BATCHES = {
    "1d": (Whitening1d, lambda: gaussian(40, 6)),
    "1d, length": (Whitening1d, lambda: gaussian(5, 6, 9)),
    "2d": (Whitening2d, lambda: gaussian(3, 6, 4, 5)),
    "2d, channels last": (Whitening2d, lambda: gaussian(3, 6, 4, 5).contiguous(memory_format=torch.channels_last)),
    "2d, a view": (Whitening2d, lambda: gaussian(3, 6, 5, 4).mT),
    "1d, a view": (Whitening1d, lambda: gaussian(6, 40).mT),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("batch", BATCHES)
def test_a_layer_equals_numpy(kind, groups, batch):
    cls, make = BATCHES[batch]
    x = make()
    layer = cls(6, eps=1e-3, groups=groups, kind=kind, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(gaussian(6, seed=1))
        layer.bias.copy_(gaussian(6, seed=2))
    y = layer(x)
    assert y.shape == x.shape
    parts = [whitened(part, kind, 1e-3) for part in np.split(rows(x).numpy(), groups, axis=1)]
    expected = np.concatenate(parts, axis=1) * layer.weight.detach().numpy() + layer.bias.detach().numpy()
    assert close(rows(y), expected, 1e-12)
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        assert y.stride() == x.stride()
    assert close(layer.running_mean, 0.1 * rows(x).mean(0), 1e-14)


def test_the_size_of_groups_is_the_same_as_their_number():
    assert str(Whitening1d(6, group_size=2)) == str(Whitening1d(6, groups=3))
    assert Whitening1d(6).groups == 1


@pytest.mark.parametrize(
    ("dtype", "conditions"), [(torch.float32, [1, 10, 90, 110, 1e4]), (torch.float64, [1, 1e2, 1e6])]
)
@pytest.mark.parametrize(("count", "p"), [(1024, 64), (1024, 128), (40, 5), (3000, 20)])
def test_outputs_have_covariance_one(dtype, conditions, count, p):
    for condition in conditions:
        x = correlated(count, p, condition).to(dtype)
        y = Whitening1d(p, eps=0.0, dtype=dtype)(x)
        assert (covariance(y) - torch.eye(p)).abs().max() < EPS[dtype]
        assert y.double().mean(0).abs().max() < EPS[dtype]


def test_the_symmetric_whitening_changes_samples_least():
    """ZCA's output is the whitened batch nearest to the centred one: √m times its polar factor."""
    x = correlated(200, 8, 100.0)
    y = Whitening1d(8, eps=0.0, dtype=torch.float64)(x).detach()
    u, _, v = np.linalg.svd((x - x.mean(0)).numpy(), full_matrices=False)
    assert close(y, 200**0.5 * u @ v, 1e-11)
    q = orthonormal(8, 8, seed=9)
    assert (y - x).norm() < (y @ q - x).norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_any_scale_is_whitened_alike(kind, dtype, scale):
    x = correlated(50, 4, 10.0).to(dtype)
    layer = Whitening1d(4, eps=0.0, kind=kind, track_running_stats=False, dtype=dtype)
    one, other = x.clone().requires_grad_(), (scale * x).requires_grad_()
    outputs = [layer(batch) for batch in (one, other)]
    assert close(outputs[1].double(), outputs[0].double(), 1e-10 if dtype == torch.float64 else 1e-4)
    g = gaussian(50, 4, dtype=dtype)
    gradients = [torch.autograd.grad((y * g).sum(), b)[0] for y, b in zip(outputs, (one, other), strict=True)]
    assert close(scale * gradients[1].double(), gradients[0].double(), 1e-9 if dtype == torch.float64 else 1e-3)


def test_a_small_scale_counts_beside_eps():
    x = 1e-20 * gaussian(50, 4)
    y = Whitening1d(4, dtype=torch.float64)(x)
    assert close(y / 1e-20, (x - x.mean(0)) / 1e-20 / 1e-5**0.5, 1e-9)


def test_a_mean_far_from_zero_costs_no_digits():
    x = correlated(1024, 16, 10.0)
    far = (x + 1e4).float()
    layer = Whitening1d(16, eps=0.0, momentum=1.0)
    y = layer(far)
    assert (covariance(y) - torch.eye(16)).abs().max() < 1e-5
    assert y.double().mean(0).abs().max() < 1e-5
    assert close(layer.running_mean.double(), far.double().mean(0), 1e-3)
    (gradient,) = torch.autograd.grad((layer(far.requires_grad_()) * gaussian(1024, 16).float()).sum(), far)
    assert gradient.sum(0).abs().max() < 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_without_variance_stay_finite(kind, eps, dtype):
    """A unit that is dead, two that are equal, and a batch of one sample repeated."""
    x = gaussian(40, 5, dtype=dtype)
    x[:, 1], x[:, 3] = 2.0, x[:, 4]
    for batch in (x, x[:1].repeat(40, 1)):
        batch = batch.clone().requires_grad_()
        y = Whitening1d(5, eps=eps, kind=kind, dtype=dtype)(batch)
        (gradient,) = torch.autograd.grad((y * gaussian(40, 5, dtype=dtype)).sum(), batch)
        assert y.isfinite().all()
        assert gradient.isfinite().all()
        assert y[:, 1].abs().max() < 1e-2 or kind == "pca"


@pytest.mark.parametrize("cls", [Whitening1d, Whitening2d])
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_one_feature_are_batch_normalization(cls, momentum, kind):
    ours = cls(6, group_size=1, momentum=momentum, kind=kind, iterations=40, dtype=torch.float64)
    theirs = (nn.BatchNorm1d if cls is Whitening1d else nn.BatchNorm2d)(6, momentum=momentum, dtype=torch.float64)
    shape = (20, 6) if cls is Whitening1d else (5, 6, 3, 4)
    for seed in range(3):
        x = 3 * gaussian(*shape, seed=seed) + 1
        assert close(ours(x), theirs(x), 1e-12)
    assert close(ours.running_cov.flatten(), theirs.running_var, 1e-13)
    assert close(ours.running_mean, theirs.running_mean, 1e-14)
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 3
    assert close(ours.eval()(x), theirs.eval()(x), 1e-12)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_goes_in_and_out_and_not_inside(mode, dtype):
    layer, x = Whitening1d(8, eps=0.0), correlated(500, 8, 50.0)
    getattr(layer, mode)()
    y = layer(x.to(dtype))
    assert y.dtype == dtype
    assert close(y.float(), layer(x.to(dtype).float()).to(dtype).float(), 1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within, gradient = [], []
        for batch in (x.float().requires_grad_(), x.float().requires_grad_()):
            within.append(layer(batch))
            gradient.append(torch.autograd.grad(within[-1].sum() + within[-1].pow(3).sum(), batch)[0])
    outside = layer(batch)
    assert within[0].dtype == torch.float32
    assert close(within[0], outside, 1e-5)
    plain = torch.autograd.grad(outside.sum() + outside.pow(3).sum(), batch)[0]
    assert close(gradient[0], plain, 1e-4 * float(plain.abs().max()))


# --- what is refused ---


BAD_OPTIONS = {
    "num_features": ({"num_features": 0}, "positive whole"),
    "eps": ({"eps": -1e-5}, "at least 0"),
    "momentum": ({"momentum": 1.5}, "from 0 to 1"),
    "kind": ({"kind": "zcaa"}, "'zca'"),
    "iterations": ({"iterations": 0}, "positive whole"),
    "groups": ({"groups": 4}, r"one of \[1, 2, 3, 6\]"),
    "group_size": ({"group_size": 4}, r"one of \[1, 2, 3, 6\]"),
    "both": ({"groups": 2, "group_size": 3}, "one of the two"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_options_out_of_range_are_named(case):
    options, words = BAD_OPTIONS[case]
    with pytest.raises(stiefel.OptionError, match=words):
        Whitening1d(**{"num_features": 6, **options})


@pytest.mark.parametrize(
    ("layer", "shape", "words"),
    [
        (Whitening1d(6), (3, 6, 4, 4), r"\(N, C\) or \(N, C, L\).*\(3, 6, 4, 4\)"),
        (Whitening2d(6), (30, 6), r"\(N, C, H, W\)"),
        (Whitening1d(6), (30, 5), "C = 6"),
    ],
)
def test_a_batch_of_another_shape_is_refused(layer, shape, words):
    with pytest.raises(stiefel.BatchError, match=words):
        layer(torch.zeros(shape))


def test_integers_complex_numbers_and_layers_in_half_precision_are_refused():
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(stiefel.BatchError, match="real numbers"):
            Whitening1d(2)(torch.zeros(5, 2, dtype=dtype))
    layer = Whitening1d(2).bfloat16()
    with pytest.raises(stiefel.BatchError, match="keep the layer in float32"):
        layer(torch.zeros(5, 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", EPS)
def test_a_batch_that_is_not_finite_is_refused(kind, dtype):
    for value in (torch.nan, torch.inf):
        x = gaussian(20, 3, dtype=dtype)
        x[4, 1] = value
        for options in ({}, {"group_size": 1}, {"iterations": 9}):
            with pytest.raises(stiefel.BatchError, match="not finite"):
                Whitening1d(3, kind=kind, dtype=dtype, **options)(x)


def test_a_batch_of_too_few_samples_is_refused_with_what_to_do():
    """With m ≤ p samples the whitened ones are a regular simplex, whatever they were: their distances say nothing."""
    x = gaussian(8, 12)
    centred = x - x.mean(0)
    y = 8**0.5 * stiefel.orthogonalize(centred)
    assert close(torch.cdist(y, y).square(), 16 * (1 - torch.eye(8, dtype=x.dtype)), 1e-12)
    for count in (0, 1, 8, 12):
        with pytest.raises(stiefel.BatchError, match=f"batch of {count} samples") as caught:
            Whitening1d(12, eps=1.0)(torch.zeros(count, 12))
        assert "eval()" in str(caught.value)
        assert ("group_size=6" in str(caught.value)) == (count > 6)
    for layer in (Whitening1d(12, group_size=6), Whitening1d(12, kind="newton"), Whitening1d(12).eval()):
        assert layer(x.float()).isfinite().all()
    with pytest.raises(stiefel.BatchError, match="batch of 1 samples"):
        Whitening1d(12, kind="newton")(x[:1])
    assert Whitening2d(12)(gaussian(1, 12, 4, 4, dtype=torch.float32)).isfinite().all()  # pixels are samples


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_batch_leaves_the_layer_as_it_was(kind):
    layer = Whitening1d(4, kind=kind)
    before = copy.deepcopy(layer.state_dict())
    x = gaussian(20, 4, dtype=torch.float32)
    x[0, 0] = torch.nan
    for batch in (x[:1], x):
        with pytest.raises(stiefel.BatchError):
            layer(batch)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), layer.state_dict().values(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_without_eps_samples_whose_squares_vanish_are_whitened(kind):
    x = gaussian(1, 3, 40)
    found = whitened_samples(x * 1e-200, kind=kind, statistics=True)
    exact = whitened_samples(x, kind=kind)
    assert close(found.y, exact.y, 1e-12)
    assert close(found.mean / 1e-200, x.mean(-1), 1e-12)
    assert close(found.covariance, torch.zeros_like(found.covariance), 1e-300)
    leaf = (x * 1e-160).requires_grad_()  # its factor squared overflows, and the gradient does not
    (gradient,) = torch.autograd.grad(whitened_samples(leaf, kind=kind).y[..., 0].sum(), leaf)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(whitened_samples(leaf, kind=kind).y[..., 0].sum(), leaf)
    assert close(gradient * 1e-160, expected, 1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e-9, 1e-4, 1e-3])
def test_eps_costs_a_small_covariance_no_digits(kind, size):
    x = size * gaussian(1, 3, 40, dtype=torch.float32)
    found = whitened_samples(x, kind=kind, eps=1.0, statistics=True).covariance.double()
    assert close(found[0] / size**2, np.cov(x[0].double().numpy(), bias=True) / size**2, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_operation_of_a_graph_knows_its_results_layout(kind):
    ones = torch.ones(2, 3, 1)
    x = gaussian(2, 12, 40, dtype=torch.float32)
    for samples in (x[:, :3], x[:, :3, ::2], x[:, ::4], x[..., :3].mT, x[..., :6:2].mT):
        arguments = (samples, ones, 0 * ones, kind, 1e-5, 5)
        torch.library.opcheck(whitened_in_graph, arguments, test_utils=("test_schema", "test_faketensor"))
