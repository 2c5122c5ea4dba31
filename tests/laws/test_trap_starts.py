"""Traps 1, 2 and 12: finite gradients at ``XXᵀ = I``; centred rows need p < n; ``det X`` keeps its sign on O(n)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from traps import (
    EPS,
    FORWARD,
    HELD,
    HELD_FORWARD,
    PENALTIES,
    SHAPES,
    VARIANTS,
    gaussian,
    holds,
    linear,
    orthonormal,
    over,
    skew,
    sym,
)

import stiefel


class Weight(nn.Module):
    """Calls nothing but a layer's weight, so that functional_call can replace what is trained."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> Tensor:
        return self.layer.weight


def weight_function(layer: nn.Module) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The weight as a function of everything trained, and the values that these have now."""
    module = Weight(layer)
    names, values = zip(*module.named_parameters(), strict=True)

    def weight(*v: Tensor) -> Tensor:
        return functional_call(module, dict(zip(names, v, strict=True)), ())

    return weight, tuple(v.detach().clone().requires_grad_() for v in values)


def starts(shape: tuple[int, int]) -> dict[str, Tensor]:
    eye = torch.eye(*shape, dtype=torch.float64)
    return {"random": orthonormal(*shape), "identity": eye, "reflection": -eye.flip(1)}


@over("method", HELD_FORWARD)
@pytest.mark.parametrize("start", ["random", "identity", "reflection"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_trap_01_gradients_are_exact_at_orthonormal_starts(
    method: stiefel.Constraint, start: str, shape: tuple[int, int]
) -> None:
    weight, values = weight_function(linear(starts(shape)[start], method))
    torch.testing.assert_close(weight(*values).detach(), starts(shape)[start], rtol=0, atol=64 * EPS)
    h = 1e-5
    for seed in (1, 2):
        g = gaussian(*shape, seed=seed)
        grads = torch.autograd.grad((weight(*values) * g).sum(), values)
        along = [gaussian(*v.shape, seed=seed + 2) for v in values]
        with torch.no_grad():
            ahead, behind = (weight(*(v + t * d for v, d in zip(values, along, strict=True))) for t in (h, -h))
        measured = ((ahead - behind) * g).sum() / (2 * h)
        # Central differences: truncation h² = 1e-10, rounding eps/h = 2e-11, times derivatives of order 10 to 100.
        expected = sum((d * a).sum() for d, a in zip(grads, along, strict=True))
        torch.testing.assert_close(measured, expected, rtol=0, atol=1e-7)


@over("method", [m for m in FORWARD if m.coefficients is not None])
def test_trap_01_the_first_step_is_the_tangent_one_that_the_method_declares(method: stiefel.Constraint) -> None:
    for shape in SHAPES.values():
        start, g = orthonormal(*shape), gaussian(*shape, seed=1)
        weight, values = weight_function(linear(start, method))
        grads = torch.autograd.grad((weight(*values) * g).sum(), values)
        h = 1e-5
        with torch.no_grad():
            ahead, behind = (weight(*(v - t * d for v, d in zip(values, grads, strict=True))) for t in (h, -h))
        x, g = (start, g) if shape[0] <= shape[1] else (start.mT, g.mT)
        a, b = method.coefficients
        expected = -(a * skew(g @ x.mT) @ x + b * (g - g @ x.mT @ x))
        moved = (ahead - behind) / (2 * h)
        moved = moved if shape[0] <= shape[1] else moved.mT
        scale = max(1, max(d.norm() for d in grads)) ** 3  # of the third derivative along a gradient of that length
        torch.testing.assert_close(moved, expected, rtol=0, atol=1e-8 * scale)


@over("method", [*FORWARD, *PENALTIES])
def test_trap_01_no_gradient_is_nan_where_the_gram_matrix_is_exactly_the_identity(method: stiefel.Constraint) -> None:
    for shape in SHAPES.values():
        g = gaussian(*shape, seed=1)
        layer = linear(torch.eye(*shape), method)
        ((layer.weight * g).sum() + stiefel.penalty(layer)).backward()
        grads = [p.grad for p in layer.parameters()]
        assert all(torch.isfinite(d).all() for d in grads)
        assert max(d.abs().max() for d in grads) > 0.1  # zeroing a NaN is no remedy


def test_trap_01_peer_autograd_through_eigh_is_nan_or_wrong() -> None:
    g = gaussian(4, 7, seed=1)
    for start in (torch.eye(4, 7, dtype=torch.float64), orthonormal(4, 7)):
        v = start.clone().requires_grad_()
        values, d = torch.linalg.eigh(v @ v.mT)
        ((d * values.rsqrt()) @ d.mT @ v * g).sum().backward()
        exact = g - sym(g @ start.mT) @ start
        assert not torch.allclose(v.grad, exact, rtol=0, atol=1e-3)


#
# Centred OWN with p = n cannot be orthogonal: one singular value is 0. In the released code that befalls every 100→100
# layer of the paper's MLP, and a first 3→64 3×3 convolution in groups of its fan-in, 27.

CENTRING = [name for name in stiefel.available() if "center" in {f.name for f in fields(stiefel.get(name))}]
START = stiefel.get("own")
"""Whose claim starts are held to: a method may claim nothing of its steps."""


NO_RANK_LEFT: dict[str, tuple[Callable[[], nn.Module], int | None, str]] = {
    "100 to 100": (lambda: nn.Linear(100, 100), None, "rank"),
    "groups of 27 over 27": (lambda: nn.Conv2d(3, 54, 3), 27, "rank"),
    "64 over 27": (lambda: nn.Conv2d(3, 64, 3), None, "column"),
    "one input": (lambda: nn.Linear(1, 1), None, "rank"),
}


@pytest.mark.parametrize("name", CENTRING)
@pytest.mark.parametrize("case", NO_RANK_LEFT)
def test_trap_02_centring_without_a_rank_to_spare_is_an_error(name: str, case: str) -> None:
    build, size, why = NO_RANK_LEFT[case]
    torch.manual_seed(0)
    layer = build().double()
    before = layer.weight.detach().clone()
    with pytest.raises(stiefel.LayoutError, match=f"center=True cannot hold.*{why}"):
        stiefel.constrain(layer, name, center=True, group_size=size)
    assert torch.equal(layer.weight, before)
    assert [n for n, _ in layer.named_parameters()] == ["weight", "bias"]


@pytest.mark.parametrize("name", CENTRING)
@pytest.mark.parametrize("case", NO_RANK_LEFT)
def test_trap_02_auto_does_not_centre_there_and_is_orthogonal(name: str, case: str) -> None:
    build, size, _ = NO_RANK_LEFT[case]
    torch.manual_seed(0)
    layer = stiefel.constrain(build().double(), name, group_size=size)
    rows = layer.weight.detach().flatten(1)
    rows = rows if size is None else rows.reshape(-1, size, rows.shape[1])
    assert holds(START, rows)


@pytest.mark.parametrize("name", CENTRING)
@pytest.mark.parametrize(("out", "inputs", "size"), [(99, 100, None), (52, 27, 26), (5, 2, 1)])
def test_trap_02_centred_rows_are_orthonormal_up_to_the_last_rank(
    name: str, out: int, inputs: int, size: int | None
) -> None:
    torch.manual_seed(0)
    layer = stiefel.constrain(nn.Linear(inputs, out).double(), name, center=True, group_size=size)
    rows = layer.weight.detach().reshape(-1, size or out, inputs)
    assert holds(START, rows)
    assert rows.sum(-1).abs().max() < 64 * EPS * math.sqrt(inputs)  # a sum of n entries of which the squares add to 1


@pytest.mark.parametrize("name", stiefel.available())
@pytest.mark.parametrize("size", [64, 32, 27])
def test_trap_02_groups_that_no_fan_in_of_27_can_hold_are_refused(name: str, size: int) -> None:
    with pytest.raises(stiefel.LayoutError, match=f"group_size={size} "):
        stiefel.constrain(nn.Conv2d(3, 64, 3), name, group_size=size)


def test_trap_02_peer_the_centred_whitening_of_a_square_weight_misses_one_direction() -> None:
    v = gaussian(100, 100)
    v = v - v.mean(dim=1, keepdim=True)
    values, d = torch.linalg.eigh(v @ v.mT)
    x = (d * values.clamp_min(1e-5).rsqrt()) @ d.mT @ v  # with a floor such as that of the released code
    assert torch.linalg.norm(x @ x.mT - torch.eye(100, dtype=x.dtype)) > 0.99


#
# A square orthogonal weight has determinant +1 or −1, with no continuous path between: a map that starts at the
# identity never reaches −1, and a method that jumps across does so unnoticed.

JUMPS = ("own_pca",)  # by its definition: eigenvectors change places where eigenvalues cross


@over("method", VARIANTS)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_trap_12_training_starts_in_the_component_of_the_given_weight(method: stiefel.Constraint, n: int) -> None:
    for sign in (1, -1):
        w = gaussian(n, n)
        w[0] *= sign * torch.linalg.det(w).sign()
        layer = linear(w, method)
        assert torch.linalg.det(layer.weight.detach()).item() == pytest.approx(sign, abs=1e-12)
        u, _, vh = torch.linalg.svd(w)
        torch.testing.assert_close(layer.weight.detach(), u @ vh, rtol=0, atol=1e-12)


@pytest.mark.sampled(3)
@over("method", [m for m in HELD if m.name not in JUMPS])
@pytest.mark.parametrize("sign", [1, -1])
def test_trap_12_continuous_methods_keep_the_determinants_sign(method: stiefel.Constraint, sign: int) -> None:
    n = 3
    w = orthonormal(n, n)
    w[0] *= sign * torch.linalg.det(w).sign()
    target = w.clone()
    target[1] *= -1  # in the other component, on the far side of a reflection
    layer = linear(w, method)
    optimizer = stiefel.optimizer(layer, torch.optim.SGD, lr=0.1)
    for step in range(25):
        optimizer.zero_grad()
        g = -target + 0.1 * gaussian(n, n, seed=step)
        (layer.weight * g / g.norm()).sum().backward()  # steps of 0.1: none can pass through a singular matrix
        optimizer.step()
        assert torch.linalg.det(layer.weight.detach()) * sign > 0.1
