"""Traps 9: a tall weight has ``WᵀW = s² I``, not ``WWᵀ``; a penalty acts: ``∂(λ s² Φ(W/s))/∂W ≠ 0`` off the set."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from traps import (
    HELD_FORWARD,
    PENALTIES,
    SHAPES,
    VARIANTS,
    gaussian,
    holds,
    linear,
    orthonormal,
    over,
    residual,
    trained_tensor,
    with_singular_values,
)

import stiefel


@over("method", [m for m in VARIANTS if not (m.claim is None and m.place == "forward")])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_trap_09_columns_are_what_rows_are_to_the_transposed_weight(
    method: stiefel.Constraint, momentum: float
) -> None:
    wide, tall = linear(gaussian(4, 7), method, scale=1.5), linear(gaussian(4, 7).mT, method, scale=1.5)
    for layer in (wide, tall):
        optimizer = stiefel.optimizer(layer, torch.optim.SGD, lr=0.05, momentum=momentum)
        torch.manual_seed(0)
        for step in range(3):
            optimizer.zero_grad()
            g = gaussian(4, 7, seed=step)
            ((layer.weight * (g if layer is wide else g.mT)).sum() + stiefel.penalty(layer)).backward()
            optimizer.step()
    torch.testing.assert_close(tall.weight, wide.weight.mT, rtol=0, atol=1e-12)
    assert (wide.weight - 1.5 * orthonormal(4, 7)).norm() > 0.05


@over("method", HELD_FORWARD)
@pytest.mark.parametrize("factor", [1e-3, 50.0])
def test_trap_09_a_proxy_of_any_length_is_normalized_on_either_side(method: stiefel.Constraint, factor: float) -> None:
    for shape in SHAPES.values():
        layer = linear(gaussian(*shape), method)
        with torch.no_grad():
            trained_tensor(layer).mul_(factor).add_(0.1 * factor * gaussian(*shape, seed=3))
        assert holds(method, layer.weight)


def penalty_by_hand(method: stiefel.Constraint, w: Tensor) -> Tensor:
    """λ s² Φ(W/s) of a matrix, from the definitions, with the Gram matrix on the smaller side."""
    s = method.fixed_scale
    x = (w if w.shape[0] <= w.shape[1] else w.mT) / s
    delta = x @ x.mT - torch.eye(len(x), dtype=x.dtype)
    other = x.mT @ x - torch.eye(x.shape[1], dtype=x.dtype)
    rows = w / s
    value = {
        "so": delta.square().sum(),
        "dso": delta.square().sum() + other.square().sum(),
        "mc": delta.abs().max(),
        "srip": torch.linalg.matrix_norm(delta, 2),
        # the row Gram of a convolution by a 1×1 kernel, which is a matrix: its outputs', on whichever side
        "ocnn": (rows @ rows.mT - torch.eye(len(rows), dtype=x.dtype)).square().sum(),
    }[method.kind]
    return method.strength * s**2 * value


@over("method", PENALTIES)
def test_trap_09_a_penalty_is_its_definition_on_the_smaller_side(method: stiefel.Constraint) -> None:
    for shape in SHAPES.values():
        method = replace(method, scale=1.5, strength=0.3)
        layer = linear(gaussian(*shape), method)
        if method.kind in ("so", "mc", "srip"):
            assert stiefel.penalty(layer).abs() < 1e-12  # on the larger side it could not vanish
        with torch.no_grad():
            layer.weight.copy_(1.5 * with_singular_values(*shape, 0.5, 1.2))  # one singular value leads, as SRIP needs
        stiefel.penalty(layer).backward()
        w = layer.weight.detach().clone().requires_grad_()
        expected = penalty_by_hand(method, w)
        expected.backward()
        # 16 products of SRIP's power iteration leave (0.75/0.44)^-16 of a wrong direction or less, squared in the value
        loose = method.kind == "srip"
        torch.testing.assert_close(stiefel.penalty(layer), expected, rtol=1e-3 if loose else 1e-12, atol=0)
        torch.testing.assert_close(layer.weight.grad, w.grad, rtol=0, atol=0.05 if loose else 1e-12)


@over("method", [replace(m, decoupled=d) for m in PENALTIES for d in (False, True) if m.kind != "ocnn"])
@pytest.mark.parametrize("shape", [(3, 5), (5, 3)], ids=["wide", "tall"])
def test_trap_09_a_penalty_acts_in_training(method: stiefel.Constraint, shape: tuple[int, int]) -> None:
    layer = linear(gaussian(*shape), replace(method, strength=1.0))
    with torch.no_grad():
        layer.weight.copy_(with_singular_values(*shape, 0.5, 1.3))
    before = residual(layer.weight)
    optimizer = stiefel.optimizer(layer, torch.optim.SGD, lr=0.02)
    for _ in range(80):
        optimizer.zero_grad()
        (0 * layer.weight.sum() + stiefel.penalty(layer)).backward()  # a loss that has nothing to say
        optimizer.step()
    assert residual(layer.weight) < 0.2 * before
