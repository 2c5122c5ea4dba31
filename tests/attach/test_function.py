"""``orthogonalize``: the maps as functions of a tensor, with gradients, under vmap, of rotations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp, vmap

import stiefel

MAPS = [
    m
    for m in stiefel.available()
    if not m.startswith("test_") and stiefel.get(m).place == "forward" and stiefel.get(m).claim is not None
]
FORWARD = [m for m in MAPS if m != "own_pca"]  # that has no forward derivative, and no second one
DOUBLE = torch.float64


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (4, 4), (2, 5, 3, 7), (5, 6, 2), (1, 9)], ids=str)
@pytest.mark.parametrize("method", MAPS)
def test_the_result_is_orthonormal_and_has_a_gradient(method, shape):
    v = gaussian(*shape).requires_grad_()
    x = stiefel.orthogonalize(v, method, scale=2.0)
    assert (x.shape, x.dtype) == (v.shape, v.dtype)
    rows = x.detach() if shape[-2] <= shape[-1] else x.detach().mT
    expected = 4 * torch.eye(rows.shape[-2], dtype=DOUBLE).expand(*rows.shape[:-1], rows.shape[-2])
    torch.testing.assert_close(rows @ rows.mT, expected, rtol=0, atol=1e-12)
    (x * gaussian(*shape, seed=1)).sum().backward()
    assert v.grad is not None
    assert v.grad.isfinite().all()
    assert shape == (1, 9) or v.grad.abs().max() > 1e-6


@pytest.mark.parametrize("method", MAPS)
def test_gradients_are_those_of_finite_differences(method):
    v = gaussian(2, 3, 5, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: stiefel.orthogonalize(t, method), (v,), atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (4, 4)], ids=str)
def test_own_is_the_polar_factor(shape):
    v = gaussian(*shape)
    u, _, vh = torch.linalg.svd(v, full_matrices=False)
    torch.testing.assert_close(stiefel.orthogonalize(v), u @ vh, rtol=0, atol=1e-13)


@pytest.mark.parametrize("method", MAPS)
def test_it_maps_over_a_batch(method):
    v = gaussian(4, 3, 5)
    one_by_one = torch.stack([stiefel.orthogonalize(each, method) for each in v])
    torch.testing.assert_close(vmap(lambda t: stiefel.orthogonalize(t, method))(v), one_by_one, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 5), (3, 3), (5, 2)], ids=str)
@pytest.mark.parametrize("method", MAPS)
def test_it_has_derivatives_mapped_over_a_batch(method, shape):
    v, direction, c = gaussian(4, *shape).requires_grad_(), gaussian(4, *shape, seed=2), gaussian(*shape, seed=1)

    def loss(t: Tensor) -> Tensor:
        return (stiefel.orthogonalize(t, method) * c).pow(3).sum()

    def total(t: Tensor) -> Tensor:
        return vmap(loss)(t).sum()

    plain = torch.stack([torch.autograd.grad(loss(t), t)[0] for t in v.detach().requires_grad_().unbind()])
    torch.testing.assert_close(torch.autograd.grad(total(v), v)[0], plain, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(grad(total)(v.detach()), plain, rtol=1e-11, atol=1e-12)
    if method in FORWARD:
        along = jvp(total, (v.detach(),), (direction,))[1]
        torch.testing.assert_close(along, (plain * direction).sum(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", [(3, 5), (3, 3)], ids=str)
@pytest.mark.parametrize("method", FORWARD)
def test_second_derivatives_in_every_order_of_modes(method, shape):
    v, d, c = gaussian(*shape), gaussian(*shape, seed=2), gaussian(*shape, seed=1)

    def loss(t: Tensor) -> Tensor:
        return (stiefel.orthogonalize(t, method) * c).pow(3).sum()

    def along(t: Tensor) -> Tensor:
        return jvp(loss, (t,), (d,))[1]

    step, leaf = 1e-5, v.clone().requires_grad_()
    expected = (grad(loss)(v + step * d) - grad(loss)(v - step * d)) / (2 * step)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(loss(forward_ad.make_dual(leaf, d))).tangent
    for found in (
        grad(lambda t: (grad(loss)(t) * d).sum())(v),
        jvp(grad(loss), (v,), (d,))[1],
        grad(along)(v),
        torch.autograd.grad(dual, leaf)[0],
        (jacrev(jacrev(loss))(v) * d).sum((-2, -1)),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    twice, message = (expected * d).sum(), "forward-mode derivatives"
    try:
        twice = jvp(along, (v,), (d,))[1]
    except RuntimeError as error:  # where torch would give a wrong value
        message = str(error)
    assert "forward-mode derivatives" in message
    torch.testing.assert_close(twice, (expected * d).sum(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("method", MAPS)
def test_a_network_puts_out_rotations(method, sign):
    torch.manual_seed(0)
    net = nn.Linear(4, 9, dtype=DOUBLE)
    x = stiefel.orthogonalize(net(gaussian(50, 4)).unflatten(-1, (3, 3)), method, determinant=sign)
    assert set(torch.linalg.det(x.detach()).round().tolist()) == {float(sign)}
    x.square().mean().backward()
    assert net.weight.grad is not None
    assert net.weight.grad.isfinite().all()


def test_complex_matrices_are_unitary():
    x = stiefel.orthogonalize(gaussian(3, 4, 4, dtype=torch.complex128))
    torch.testing.assert_close(x @ x.mH, torch.eye(4, dtype=torch.complex128).expand(3, 4, 4), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: stiefel.orthogonalize(torch.ones(3, 3), "retraction"), stiefel.OptionError, "one of .*own"),
        (lambda: stiefel.orthogonalize(torch.ones(3, 3), "soft"), stiefel.OptionError, "one of .*own"),
        (lambda: stiefel.orthogonalize(torch.ones(3, 3), scale="learnable"), stiefel.OptionError, "a number"),
        (lambda: stiefel.orthogonalize(torch.ones(3)), stiefel.LayoutError, r"\(3,\)"),
        (lambda: stiefel.orthogonalize(torch.ones(3, 3).half()), stiefel.WeightError, "float16"),
        (lambda: stiefel.orthogonalize(torch.ones(3, 4), determinant=1), stiefel.LayoutError, "square"),
        (lambda: stiefel.orthogonalize(torch.ones(3, 3), "ow"), stiefel.UnknownMethodError, "own"),
    ],
)
def test_what_is_wrong_is_told(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "values", [[3.0, 2.0, 1.0], [2.0, 2.0, 1.0], [1.0, 1.0, 1e-3], [1.0, 1e-8, 1e-9], [1.0, 0.5, 0.0]]
)
@pytest.mark.parametrize("size", [1e-170, 1.0, 1e160])
def test_the_nearest_rotation_of_any_size_and_condition(values, size):
    u, w = (torch.linalg.qr(gaussian(3, 3, seed=s))[0] for s in (1, 2))
    u, w = (q * torch.linalg.det(q) for q in (u, w))
    flip = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    for sign in (1, -1):
        expected = u @ (w if sign > 0 else flip @ w)
        for v in (u @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ flip @ w,):
            x = stiefel.orthogonalize(size * v, determinant=sign)
            assert torch.linalg.det(x) == pytest.approx(sign)
            if values[-1] > 0:
                assert (x - expected).abs().max() < 1e-12 / min(values)


def test_the_gradient_of_a_reflected_polar_factor_needs_no_gap_but_the_smallest():
    v = torch.diag(torch.tensor([-1.0, 2.0, 2.0], dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: stiefel.orthogonalize(v, determinant=1), (v,), eps=1e-7, atol=1e-6)
    v = (gaussian(4, 4, 4) - 3 * torch.eye(4, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: stiefel.orthogonalize(v, determinant=1), (v,), eps=1e-7, atol=1e-5)


def test_transforms_of_an_orthogonal_matrix_have_finite_gradients():
    eye = torch.eye(4, dtype=torch.float64)
    a = gaussian(4, 4)

    def loss(v: torch.Tensor) -> torch.Tensor:
        return (stiefel.orthogonalize(v, determinant=1) * a).sum()

    found = torch.func.grad(loss)(eye)
    leaf = eye.clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(found, leaf.grad)
    batch = torch.stack([eye, -eye, eye.flip(0)])
    each = torch.func.vmap(torch.func.grad(loss))(batch)
    assert each.isfinite().all()
    torch.testing.assert_close(each[0], leaf.grad)
