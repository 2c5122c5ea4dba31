"""Penalties against closed forms and circulant matrices; strength and decoupling."""

import itertools
import math

import numpy as np
import pytest
import torch
from formulas import Bare, close, every_shape, gaussian, matrix, orthonormal, spectrum
from torch import nn

import stiefel
from stiefel.layout import Layout
from stiefel.linalg import nearest_orthonormal, spectral_radius


def phi(x, **options):
    return stiefel.get("soft", **options).penalty(x[None], Layout(tuple(x.shape)))[0]


def gradient_of_phi(x, **options):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(phi(leaf, **options), leaf)[0]


def test_penalties_by_hand():
    """X = (1 1; 0 2): XXᵀ = (2 2; 2 4), Δ = (1 2; 2 3); XᵀX − I = (0 1; 1 4); the eigenvalues of Δ are 2 ± √5."""
    x = matrix([[1.0, 1.0], [0.0, 2.0]])
    values = {"so": 18.0, "dso": 36.0, "mc": 3.0, "srip": 2 + math.sqrt(5), "ocnn": 18.0}
    for kind, value in values.items():
        assert phi(x, kind=kind).item() == pytest.approx(value, rel=1e-12)
    assert close(gradient_of_phi(x, kind="so"), 4 * matrix([[1.0, 5.0], [2.0, 8.0]]))  # 4ΔX
    assert close(gradient_of_phi(x, kind="mc"), matrix([[0.0, 0.0], [0.0, 4.0]]))  # Δ₂₂ = ⟨x₂, x₂⟩ − 1
    # The sign does not matter: rows shorter than 1, and a negative inner product.
    y = matrix([[0.5, 0.0], [0.0, 1.0]])
    assert [phi(y, kind=k).item() for k in ("so", "mc", "srip")] == pytest.approx([0.5625, 0.75, 0.75])
    z = matrix([[1.0, 0.0], [-0.6, 0.8]])
    assert [phi(z, kind=k).item() for k in ("so", "mc", "srip")] == pytest.approx([0.72, 0.6, 0.6])


@every_shape
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e3, 1e6])
def test_penalties_equal_their_definitions(shape, size):
    """Bansal, Chen and Wang (2018), eqs. 1 (SO), 2 (DSO), 3 (MC), 4 (SRIP), with numpy; DSO with both Gram matrices."""
    x = size * gaussian(*shape)
    a, (p, n) = x.numpy(), shape
    small, large = a @ a.T - np.eye(p), a.T @ a - np.eye(n)
    so = np.linalg.norm(small) ** 2
    assert phi(x, kind="so").item() == pytest.approx(so, rel=1e-12)
    assert phi(x, kind="dso").item() == pytest.approx(so + np.linalg.norm(large) ** 2, rel=1e-12)
    assert phi(x, kind="dso").item() == pytest.approx(2 * so + n - p, rel=1e-12)  # Massart (2022)
    assert phi(x, kind="mc").item() == pytest.approx(np.abs(small).max(), rel=1e-12)
    assert close(gradient_of_phi(x, kind="so"), 4 * small @ a, 1e-12 * max(1, size**3))
    assert close(gradient_of_phi(x, kind="dso"), 8 * small @ a, 1e-12 * max(1, size**3))
    sigma = np.linalg.norm(small, 2)
    assert 0.7 * sigma <= phi(x, kind="srip").item() <= sigma * (1 + 1e-12)


def hermitian_with(eigenvalues, seed=30):
    q = orthonormal(len(eigenvalues), len(eigenvalues), seed=seed)
    return q.mT @ (torch.as_tensor(eigenvalues, dtype=torch.float64)[:, None] * q), q


@pytest.mark.parametrize("eigenvalues", [[-5.0, 1.0, 0.5, 0.1], [4.0, -1.0, 1.0, 0.0], [3.0, 3.0, 1.0, -1.0]], ids=str)
def test_srip_is_exact_once_the_power_iteration_has_converged(eigenvalues):
    """At ratio r of the two largest, 16 iterations leave r³² of the square of the error's sine: below 1e-14 here."""
    h, q = hermitian_with(eigenvalues)
    h.requires_grad_()
    value = spectral_radius(h)
    assert value.item() == pytest.approx(max(map(abs, eigenvalues)), rel=1e-12)
    if abs(eigenvalues[0]) != abs(eigenvalues[1]):
        (gradient,) = torch.autograd.grad(value, h)
        leading = math.copysign(1, eigenvalues[0]) * torch.outer(q[0], q[0])
        assert close(gradient, leading, 1e-9)  # the vector itself converges as r¹⁶


def test_srip_where_both_signs_lead():
    """Eigenvalues ±σ: v alternates, vᵀHv may vanish, ‖Hv‖ does not. The gradient is one of the norm's subgradients."""
    h, _ = hermitian_with([2.0, -2.0, 0.5])
    h.requires_grad_()
    value = spectral_radius(h)
    (gradient,) = torch.autograd.grad(value, h)
    assert value.item() == pytest.approx(2, rel=1e-12)
    assert (gradient * h).sum().item() == pytest.approx(2, rel=1e-12)
    assert torch.linalg.matrix_norm(gradient, ord="nuc").item() == pytest.approx(1, rel=1e-12)


def test_srip_is_as_accurate_as_documented():
    """On random 64×64 matrices: about 0.88 of the norm after 2 iterations and 0.98 after 16, and never above it."""
    for iterations, documented in ((2, 0.88), (16, 0.98)):
        h = gaussian(60, 64, 64, seed=8)
        h = h + h.mT
        ratio = spectral_radius(h, iterations) / torch.linalg.matrix_norm(h, ord=2)
        assert ratio.max() <= 1 + 1e-12
        assert ratio.mean().item() == pytest.approx(documented, abs=0.03)


@pytest.mark.parametrize("kind", ["so", "dso", "mc", "srip", "ocnn"])
@pytest.mark.parametrize("x", [torch.eye(3, 7), torch.eye(3), torch.eye(1, 4)], ids=["wide", "square", "row"])
def test_penalties_vanish_with_their_gradient_on_the_set(kind, x):
    """Released SRIP code divides by a norm that is 0 here. At Δ = 0 the norms have a kink; 0 is their subgradient."""
    x = x.double()
    floor = x.shape[1] - x.shape[0] if kind == "dso" else 0
    assert phi(x, kind=kind).item() == floor
    gradient = gradient_of_phi(x, kind=kind)
    assert torch.isfinite(gradient).all()
    if kind != "mc":  # of equal entries amax shares the gradient of |Δ| at 0, which is 0 too
        assert gradient.abs().max() == 0
    assert torch.isfinite(gradient_of_phi(orthonormal(*x.shape), kind=kind)).all()


def test_soft_is_stable_below_a_quarter_and_not_above():
    """Near the set gradient descent multiplies a singular value's deviation by 1 − 8 lr λ: |·| < 1 iff lr λ < ¼."""
    for rate, factor in ((0.05, 0.6), (0.24, -0.92), (0.26, -1.08)):
        model = stiefel.constrain(Bare(spectrum(2, 5, [1.0, 1.0])), "soft", layers=["w"], strength=1.0)
        u, _, vh = torch.linalg.svd(model.w.detach(), full_matrices=False)
        with torch.no_grad():
            model.w.copy_(u @ torch.diag(matrix([1 + 1e-7, 1 - 1e-7])) @ vh)
        optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=rate)
        stiefel.penalty(model).backward()
        optimizer.step()
        after = torch.diagonal(u.mT @ model.w.detach() @ vh.mT) - 1
        assert close(after, factor * matrix([1e-7, -1e-7]), 1e-12)


def circulant(kernels, stride, size):
    """The dense matrix of a periodic strided convolution: row (o, y), column (c, x), kernel entry j at x = S y + j."""
    out, channels, *k = kernels.shape
    positions = list(itertools.product(*(range(0, size, s) for s in stride)))
    dense = np.zeros((out * len(positions), channels, *[size] * len(k)))
    for o, (i, y) in itertools.product(range(out), enumerate(positions)):
        for c, *j in itertools.product(range(channels), *(range(m) for m in k)):
            at = tuple((a + b) % size for a, b in zip(y, j, strict=True))
            dense[(o * len(positions) + i, c, *at)] += kernels[(o, c, *j)].item()
    return dense.reshape(len(dense), -1), len(positions)


CONVOLUTIONS = [
    (nn.Conv1d, (3, 2, 3), 1, 6),
    (nn.Conv1d, (3, 2, 4), 2, 8),
    (nn.Conv1d, (4, 1, 5), 3, 9),
    (nn.Conv1d, (4, 3, 2), 3, 6),  # patches that do not overlap, with gaps
    (nn.Conv1d, (5, 2, 1), 1, 3),
    (nn.Conv2d, (3, 2, (3, 3)), 1, 5),
    (nn.Conv2d, (4, 2, (3, 3)), 2, 6),
    (nn.Conv2d, (3, 2, (2, 4)), (1, 2), 8),
    (nn.Conv2d, (9, 1, (2, 2)), 2, 4),
    (nn.Conv2d, (2, 3, (1, 3)), (2, 1), 6),
    (nn.Conv3d, (2, 2, (2, 2, 2)), 1, 3),
    (nn.Conv3d, (3, 1, (2, 1, 3)), (2, 1, 2), 6),
]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("cls", "kernel", "stride", "size"), CONVOLUTIONS, ids=str)
def test_ocnn_is_the_row_gram_of_the_convolution(cls, kernel, stride, size, groups):
    """Wang, Chen, Chakraborty and Yu (2020), eqs. 6 to 8: ‖conv(K, K) − I₀‖² = ‖𝒦𝒦ᵀ − I‖_F² per output position.

    𝒦 is the dense matrix of the convolution on a periodic image, wide enough that two kernels meet at most once.
    Groups are independent convolutions: the blocks of a block-diagonal 𝒦.
    """
    out, channels, k = kernel
    layer = cls(groups * channels, groups * out, k, stride=stride, groups=groups, bias=False).double()
    stiefel.constrain(layer, "soft", kind="ocnn", strength=1.0)
    with torch.no_grad():
        layer.weight.copy_(0.5 * gaussian(*layer.weight.shape, seed=4))
    expected = 0.0
    for block in layer.weight.detach().chunk(groups):
        dense, positions = circulant(block, layer.stride, size)
        expected += np.linalg.norm(dense @ dense.T - np.eye(len(dense))) ** 2 / positions
    assert stiefel.penalty(layer).item() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize(
    ("kernel", "stride"), [((5, 1, 2), (2,)), ((5, 2, 3), (1,)), ((3, 2, 3), (1,)), ((6, 1, 2, 2), (2, 2))], ids=str
)
def test_ocnn_cannot_vanish_where_outputs_exceed_inputs_times_squared_stride(kernel, stride):
    """𝒦 has in · Πsize columns and out · Π(size/stride) rows: rank leaves at least out − in · Πstride per position."""
    out, channels, *k = kernel
    layout = Layout(kernel, stride=stride)
    method, floor = stiefel.get("soft", kind="ocnn"), max(0, out - channels * math.prod(stride))
    x = 0.5 * gaussian(out, channels * math.prod(k), seed=6)
    x = (x.mT if layout.columns else x).contiguous().requires_grad_()
    optimizer = torch.optim.LBFGS([x], max_iter=500, line_search_fn="strong_wolfe", tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        value = method.penalty(x[None], layout).sum()
        value.backward()
        return value

    optimizer.step(closure)
    value = method.penalty(x[None], layout).item()
    assert value >= floor - 1e-12
    if floor == 0:
        assert value < 1e-6
    if stride == tuple(k):  # disjoint patches: an orthonormal start attains the bound
        start = method.nearest(gaussian(*layout.matrix_shape, seed=7), layout)
        assert method.penalty(start, layout).item() == pytest.approx(floor, abs=1e-12)


def test_ocnn_of_a_complex_kernel():
    x = gaussian(3, 8, dtype=torch.complex128)
    layout = Layout((3, 2, 4))
    value = stiefel.get("soft", kind="ocnn").penalty(x[None], layout).item()
    kernel, expected = x.reshape(3, 2, 4).numpy(), 0.0
    for shift in range(-3, 4):
        a, b = kernel[..., max(0, shift) : 4 + min(0, shift)], kernel[..., max(0, -shift) : 4 - max(0, shift)]
        expected += np.linalg.norm(np.einsum("ack,bck->ab", a, b.conj()) - (np.eye(3) if shift == 0 else 0)) ** 2
    assert value == pytest.approx(expected, rel=1e-12)


def train_penalized(decoupled, kind="so", scale=1.0, steps=20, lr=0.02, strength=0.3, base=torch.optim.SGD, **hyper):
    model = stiefel.constrain(
        Bare(gaussian(3, 7)), "soft", layers=["w"], kind=kind, strength=strength, scale=scale, decoupled=decoupled
    )
    with torch.no_grad():
        model.w.add_(0.3 * gaussian(3, 7, seed=1))
    optimizer = stiefel.optimizer(model, base, lr=lr, **hyper)
    for step in range(steps):
        optimizer.zero_grad()
        ((model.w * gaussian(3, 7, seed=40 + step)).sum() + stiefel.penalty(model)).backward()
        optimizer.step()
    return model.w.detach().as_subclass(torch.Tensor)


@pytest.mark.parametrize("kind", ["so", "dso", "mc", "srip", "ocnn"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_decoupled_equals_coupled_under_plain_sgd(kind, scale):
    assert close(train_penalized(True, kind, scale), train_penalized(False, kind, scale))


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_decoupled_keeps_the_penalty_out_of_the_momentum(scale):
    """m ← μm + G, W ← W − lr m − lr λ s ∇Φ(W/s), with ∇Φ = 4ΔX."""
    hyper, lr, strength = {"momentum": 0.9}, 0.02, 0.3
    ours = train_penalized(True, scale=scale, lr=lr, strength=strength, **hyper)
    assert not close(ours, train_penalized(False, scale=scale, lr=lr, strength=strength, **hyper), 1e-3)
    w = scale * nearest_orthonormal(gaussian(3, 7)) + 0.3 * gaussian(3, 7, seed=1)
    m = torch.zeros_like(w)
    for step in range(20):
        x = w / scale
        m = 0.9 * m + gaussian(3, 7, seed=40 + step)
        w = w - lr * m - lr * strength * scale * 4 * (x @ x.mT - torch.eye(3)) @ x
    assert close(ours, w)


def test_decoupled_is_out_of_reach_of_adam():
    lr, strength = 0.02, 0.3
    ours = train_penalized(True, lr=lr, strength=strength, base=torch.optim.Adam)
    assert not close(ours, train_penalized(False, lr=lr, strength=strength, base=torch.optim.Adam), 1e-3)
    w, m, v = nearest_orthonormal(gaussian(3, 7)) + 0.3 * gaussian(3, 7, seed=1), 0.0, 0.0
    for t in range(1, 21):
        g = gaussian(3, 7, seed=39 + t)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        pull = 4 * (w @ w.mT - torch.eye(3)) @ w
        w = w - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8) - lr * strength * pull
    assert close(ours, w)


class Released:
    """The schedule of SRIP's released code, with steps for epochs: base rate times 1, 1e-3, 1e-4, 1e-6, 0."""

    def __call__(self, step):
        return 0.3 * [1, 1e-3, 1e-4, 1e-6, 0][np.searchsorted([2, 5, 7, 12], step, side="right")]


@pytest.mark.parametrize("decoupled", [False, True])
def test_scheduled_strength_by_hand(decoupled):
    lr, schedule, ours = 0.05, Released(), train_penalized(decoupled, lr=0.05, strength=Released(), steps=15)
    w = nearest_orthonormal(gaussian(3, 7)) + 0.3 * gaussian(3, 7, seed=1)
    for step in range(15):
        pull = 4 * (w @ w.mT - torch.eye(3)) @ w
        w = w - lr * gaussian(3, 7, seed=40 + step) - lr * schedule(step) * pull
    assert [schedule(s) for s in (0, 1, 2, 5, 7, 12)] == pytest.approx([0.3, 0.3, 3e-4, 3e-5, 3e-7, 0])
    assert close(ours, w)
