"""Trap 10: a step whose length is cut stays in its tube, ``‖XXᵀ − I‖_F ≤ ε``, also from zero and from outside."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from traps import (
    IN_PLACE,
    LIFTED,
    SHAPES,
    STEPPED,
    gaussian,
    holds,
    linear,
    orthonormal,
    over,
    pogo_optimizer,
    residual,
    step_once,
    with_singular_values,
)

import stiefel


def tolerance(dtype: torch.dtype) -> float:
    return 64 * torch.finfo(dtype).eps


@over("method", STEPPED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_trap_10_a_zero_gradient_moves_nothing(method: stiefel.Constraint, dtype: torch.dtype) -> None:
    for shape in SHAPES.values():
        layer = linear(gaussian(*shape), method, dtype)
        start = layer.weight.detach().clone()
        after = step_once(layer, torch.optim.SGD, torch.zeros(shape, dtype=dtype), lr=0.1)
        torch.testing.assert_close(after, start, rtol=0, atol=tolerance(dtype))


@pytest.mark.sampled(3)
@over("method", STEPPED)
@pytest.mark.parametrize("singular", [(0.7, 1.2), (0.3, 1.5)], ids=str)
def test_trap_10_a_weight_outside_comes_back_without_a_gradient(
    method: stiefel.Constraint, singular: tuple[float, float]
) -> None:
    for shape in SHAPES.values():
        layer = linear(gaussian(*shape), method)
        with torch.no_grad():
            layer.weight.copy_(with_singular_values(*shape, *singular))
        optimizer = stiefel.optimizer(layer, torch.optim.SGD, lr=0.3)
        for _ in range(20):
            layer.weight.grad = torch.zeros_like(layer.weight)
            optimizer.step()
            assert torch.isfinite(layer.weight).all()
        assert residual(layer.weight) < 1e-4  # landing halves it per step at this rate, once inside


@pytest.mark.sampled(3)
@over("method", LIFTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 7), (4, 4), (1, 6)], ids=str)
def test_trap_10_no_displacement_breaks_the_claim(
    method: stiefel.StepMethod, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    b = 50
    x = torch.linalg.qr(gaussian(b, *shape[::-1]))[0].mT.to(dtype)
    direction = gaussian(b, *shape, seed=1).to(dtype)
    for exponent in (-300 if dtype == torch.float64 else -30, -1, 0, 3, 18):
        for lr in (1e-6, 3.0):
            torch.manual_seed(0)
            moved = method.step(x, direction * 10.0**exponent, lr)
            moved = moved[0] if isinstance(moved, tuple) else moved
            assert torch.isfinite(moved).all()
            if 10.0**exponent <= method.claim.rates[1]:
                assert holds(method, moved), (exponent, lr)


def off_the_set(shape: tuple[int, int], distances: Tensor) -> Tensor:
    """Points with ‖XXᵀ − I‖_F as given, below 1: σ² = 1 + δ with ‖δ‖ the distance."""
    b, (p, n) = len(distances), shape
    u, _, vh = torch.linalg.svd(gaussian(b, p, n, seed=7), full_matrices=False)
    delta = gaussian(b, p, seed=8)
    delta = distances[:, None] * delta / delta.norm(dim=1, keepdim=True)
    return (u * (1 + delta).sqrt().unsqueeze(-2)) @ vh


@over("method", [m for m in LIFTED if hasattr(m, "tube")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 7), (4, 4), (1, 6)], ids=str)
def test_trap_10_a_step_never_leads_out_of_the_tube_or_further_away(
    method: stiefel.StepMethod, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    x = off_the_set(shape, torch.linspace(0.01, 0.98, 100, dtype=torch.float64)).to(dtype)
    u = gaussian(len(x), *shape, seed=1).to(dtype)
    wide = x.double()
    before = torch.linalg.matrix_norm(wide @ wide.mT - torch.eye(shape[0]))
    wall = before.clamp_min(method.tube)  # in ‖XXᵀ − I‖_F: once inside, it may move up to it
    for exponent in (-30, -3, -1, 0, 1, 6, 18):
        for lr in (1e-6, 0.1, 2.0):
            moved, _ = method.step(x, u * 10.0**exponent, lr)
            assert torch.isfinite(moved).all()
            wide = moved.double()
            after = torch.linalg.matrix_norm(wide @ wide.mT - torch.eye(shape[0]))
            assert (after <= wall + tolerance(dtype) * shape[0] ** 0.5).all(), (exponent, lr)


@pytest.mark.sampled(3)
@over("method", IN_PLACE)
@pytest.mark.parametrize("size", [1e-2, 1e5])
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam])
def test_trap_10_two_weights_step_together_as_each_does_alone(
    method: stiefel.Constraint, size: float, cls: type[torch.optim.Optimizer]
) -> None:
    hyper: dict[str, Any] = {"lr": 0.1}
    g = gaussian(4, 7, seed=2)
    alone = step_once(linear(gaussian(4, 7, seed=1), method), cls, g, **hyper)
    model = nn.Sequential(linear(gaussian(4, 7), method), linear(gaussian(4, 7, seed=1), method))
    optimizer = stiefel.optimizer(model, cls, **hyper)
    model[0].weight.grad, model[1].weight.grad = size * gaussian(4, 7, seed=3), g.clone()
    torch.manual_seed(0)
    optimizer.step()
    # A batched product may round otherwise than a single one; a leak of a clipped rate is of the order of the step.
    torch.testing.assert_close(model[1].weight.detach(), alone, rtol=0, atol=1e-12)


@over("method", IN_PLACE)
@pytest.mark.parametrize("size", [1e-2, 1e5])
def test_trap_10_groups_of_one_weight_step_together_as_each_does_alone(method: stiefel.Constraint, size: float) -> None:
    if "ocnn" in str(method):
        pytest.skip("a convolution's penalty has no groups of rows")
    w, g = gaussian(6, 7), gaussian(6, 7, seed=1)
    alone = step_once(linear(w[3:], method), torch.optim.SGD, g[3:], lr=0.1)
    g[:3] *= size
    both = step_once(linear(w, replace(method, group_size=3)), torch.optim.SGD, g, lr=0.1)
    torch.testing.assert_close(both[3:], alone, rtol=0, atol=1e-12)


@over("method", LIFTED)
def test_trap_10_only_the_weight_that_was_clipped_counts_as_shortened(method: stiefel.StepMethod) -> None:
    model = nn.Sequential(linear(gaussian(4, 7), method), linear(gaussian(4, 7, seed=1), method))
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.1)
    model[0].weight.grad, model[1].weight.grad = 1e4 * gaussian(4, 7, seed=3), 1e-3 * gaussian(4, 7, seed=2)
    optimizer.step()
    assert [row.shortened for row in stiefel.report(model).rows] in ([None, None], [1, 0])


def test_trap_10_peer_pogo_is_nan_at_a_large_step() -> None:
    weight = nn.Parameter(orthonormal(4, 7)[None])
    optimizer = pogo_optimizer(weight, lr=10.0)
    for _ in range(10):
        weight.grad = gaussian(1, 4, 7, seed=1)
        optimizer.step()
    assert not torch.isfinite(weight).all()
