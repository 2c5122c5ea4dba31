"""Whitening matrices of a covariance, and covariances, against numpy; derivatives at repeated eigenvalues too."""

import numpy as np
import pytest
import torch
from common import gaussian
from formulas import close, orthonormal
from torch.autograd import gradcheck, gradgradcheck

import stiefel
from stiefel.linalg.covariance import SAMPLES, affine_map, covariance
from stiefel.linalg.norm import _Largest, spectral_radius
from stiefel.linalg.whitening import newton_matrix, pca_matrix
from stiefel.linalg.zca import zca_matrix, zca_matrix_by_iteration

SPECTRA = {
    "identity": [1.0, 1.0, 1.0, 1.0],
    "repeated": [2.0, 2.0, 0.5, 0.5],
    "one value": [3.0],
    "distinct": [4.0, 2.0, 1.0, 0.25],
    "ill": [1.0, 1e-2, 1e-4, 1e-6],
}


def symmetric(values, b=1, seed=0):
    d = orthonormal(b, len(values), len(values), seed=seed)
    return (d * torch.tensor(values, dtype=torch.float64)) @ d.mT


def sym(a):
    return (a + a.mT) / 2


@pytest.mark.parametrize("name", SPECTRA)
def test_zca_equals_numpys_inverse_root_and_its_derivatives_are_exact(name):
    sigma = symmetric(SPECTRA[name], b=2)
    values, d = np.linalg.eigh(sigma.numpy())
    expected = (d / np.sqrt(values)[..., None, :]) @ d.swapaxes(-1, -2)
    assert close(zca_matrix(sigma) / np.abs(expected).max(), expected / np.abs(expected).max(), 1e-10)
    if name == "ill":
        return
    sigma.requires_grad_()
    assert gradcheck(lambda m: zca_matrix(sym(m)), sigma, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(lambda m: zca_matrix(sym(m)), sigma)


def test_autograd_through_an_eigendecomposition_has_no_gradient_where_ours_has():
    """The reason for a formula of our own: at the identity, where a whitened batch is, torch's is NaN."""
    sigma, g = torch.eye(3, dtype=torch.float64).requires_grad_(), gaussian(3, 3)
    values, d = torch.linalg.eigh(sigma)
    (theirs,) = torch.autograd.grad((d / values.sqrt()) @ d.mT, sigma, g)
    assert theirs.isnan().any()
    (ours,) = torch.autograd.grad(zca_matrix(sigma[None]), sigma, g[None])
    assert close(ours, -sym(g) / 2)  # d Σ^{-1/2} = −½ dΣ at I


@pytest.mark.parametrize("p", [5, 64, 200])
def test_zca_of_float32_is_right_to_its_rounding(p):
    sigma = symmetric(torch.logspace(0, -2, p).tolist()).float()
    z, exact = zca_matrix(sigma).double(), zca_matrix(sigma.double())
    assert torch.linalg.matrix_norm(z - exact) < 1e-6 * torch.linalg.matrix_norm(exact)
    assert torch.linalg.matrix_norm(z @ sigma.double() @ z - torch.eye(p)) < 3e-6 * p**0.5


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e8])
def test_zca_by_iteration_is_that_by_eigenvalues(condition):
    sigma = symmetric(torch.logspace(0, -np.log10(condition), 24).tolist(), b=2).requires_grad_()
    g = gaussian(2, 24, 24, seed=1)
    z, exact = zca_matrix_by_iteration(sigma), zca_matrix(sigma)
    assert torch.linalg.matrix_norm(z - exact).max() < 1e-7 * torch.linalg.matrix_norm(exact).max()
    (ours,), (theirs,) = (torch.autograd.grad(w, sigma, g) for w in (z, exact))
    assert torch.linalg.matrix_norm(ours - theirs).max() < 1e-6 * torch.linalg.matrix_norm(theirs).max()


def test_zca_by_iteration_has_exact_second_derivatives():
    sigma = symmetric([2.0, 1.0, 1.0]).requires_grad_()
    assert gradgradcheck(lambda m: zca_matrix_by_iteration(sym(m)), sigma)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_singular_covariance_has_finite_matrices_and_gradients(rank):
    v = gaussian(1, 5, rank, seed=3)
    sigma = (v @ v.mT).requires_grad_()
    for function in (zca_matrix, pca_matrix, lambda m: newton_matrix(m, 5), zca_matrix_by_iteration):
        w = function(sigma)
        (gradient,) = torch.autograd.grad(w.sum(), sigma)
        assert w.isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("function", [zca_matrix, pca_matrix])
def test_a_covariance_that_is_not_finite_is_refused(function):
    sigma = torch.eye(3)[None].clone()
    sigma[0, 1, 1] = torch.nan
    with pytest.raises(stiefel.BatchError, match="not finite"):
        function(sigma)


def test_pca_equals_numpys_with_fixed_signs_and_its_derivative_is_exact():
    sigma = symmetric(SPECTRA["distinct"], b=2).requires_grad_()
    values, d = np.linalg.eigh(sigma.detach().numpy())
    largest = np.abs(d).argmax(-2, keepdims=True)
    d = d * np.sign(np.take_along_axis(d, largest, -2))
    assert close(pca_matrix(sigma), (d / np.sqrt(values)[..., None, :]).swapaxes(-1, -2), 1e-12)
    assert gradcheck(lambda m: pca_matrix(sym(m)), sigma, check_forward_ad=True)


def test_pca_is_bounded_at_a_tie_and_refuses_a_second_derivative():
    sigma = torch.eye(4, dtype=torch.float64)[None].requires_grad_()
    w = pca_matrix(sigma)
    (gradient,) = torch.autograd.grad(w.square().sum() + w.sum(), sigma, create_graph=True)
    assert gradient.isfinite().all()
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


def published(sigma, iterations):
    """Huang et al. (CVPR 2019), as printed."""
    trace = np.trace(sigma)
    n, p = sigma / trace, np.eye(len(sigma))
    for _ in range(iterations):
        p = (3 * p - p @ p @ p @ n) / 2
    return p / np.sqrt(trace)


@pytest.mark.parametrize("iterations", [1, 5, 9])
def test_newton_equals_the_published_iteration_and_its_derivatives_are_exact(iterations):
    sigma = symmetric(SPECTRA["repeated"], b=2).requires_grad_()
    expected = np.stack([published(m, iterations) for m in sigma.detach().numpy()])
    assert close(newton_matrix(sigma, iterations), expected, 1e-13)
    assert gradcheck(lambda m: newton_matrix(sym(m), iterations), sigma, check_forward_ad=True)
    assert gradgradcheck(lambda m: newton_matrix(sym(m), iterations), sigma)


def test_newton_tends_to_zca():
    sigma = symmetric(SPECTRA["distinct"])
    assert close(newton_matrix(sigma, 30), zca_matrix(sigma), 1e-12)


def test_newton_of_a_large_matrix_has_the_derivatives_of_its_steps():
    """From 181 rows on the backward pass stores no steps: the first and second derivative must not notice."""
    sigma = symmetric(torch.linspace(1, 3, 200).tolist()).requires_grad_()
    g, h = gaussian(1, 200, 200, seed=1), gaussian(1, 200, 200, seed=2)

    def plain(m):
        trace = m.diagonal(dim1=-2, dim2=-1).sum()
        n, p = m / trace, torch.eye(200, dtype=m.dtype)
        for _ in range(4):
            p = (3 * p - p @ p @ p @ n) / 2
        return p / trace.sqrt()

    results = []
    for function in (lambda m: newton_matrix(m, 4), plain):
        (first,) = torch.autograd.grad(function(sym(sigma)), sigma, g, create_graph=True)
        (second,) = torch.autograd.grad(first, sigma, h)
        results.append((first, second))
    for ours, theirs in zip(*results, strict=True):
        assert torch.linalg.matrix_norm(ours - theirs) < 1e-11 * torch.linalg.matrix_norm(theirs)


@pytest.mark.parametrize("count", [7, SAMPLES + 1, 3 * SAMPLES])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("rows", [True, False])
def test_covariance_equals_numpys_in_any_number_of_chunks(count, double, rows):
    x = gaussian(2, count, 3).mT if rows else gaussian(2, 3, count)
    mean, sigma = covariance(x, double)
    for i in range(2):
        assert close(mean[i], x[i].mean(-1), 1e-14)
        assert close(sigma[i], np.cov(x[i].numpy(), bias=True), 1e-13)
    single = covariance(x.float(), double)[1]
    assert single.dtype == (torch.float64 if double else torch.float32)
    assert close(single.double(), sigma, 1e-6)


def test_covariance_has_exact_derivatives_of_any_order():
    x = gaussian(2, 3, 5).requires_grad_()
    assert gradcheck(covariance, x, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(covariance, x)


def test_an_affine_map_keeps_the_layout_of_its_samples():
    w, x, c = gaussian(2, 3, 3), gaussian(2, 3, 7, seed=1), gaussian(2, 3, 1, seed=2)
    for samples in (x, x.mT.contiguous().mT):
        y = affine_map(w, samples, c)
        assert close(y, w @ x + c, 1e-14)
        assert y.stride() == samples.stride()


def test_hooks_of_what_a_norm_is_taken_of_are_called_once():
    for norm in (spectral_radius, lambda h: _Largest.apply(h)[0]):
        h, calls = symmetric([3.0, 2.0, 1.0]).requires_grad_(), []
        h.register_hook(lambda g, calls=calls: calls.append(1))
        torch.autograd.grad(norm(h).sum(), h, create_graph=True)
        assert len(calls) == 1
