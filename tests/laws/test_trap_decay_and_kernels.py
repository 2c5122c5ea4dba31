"""Traps 6 and 7: decay does not move X along its set; a kernel is ``(out, in/groups · k…)``, per group."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from common import Largest
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from traps import (
    EPS,
    HELD,
    PENALTIES,
    SHAPES,
    STEPPED,
    VARIANTS,
    adam_with_decay,
    gaussian,
    holds,
    linear,
    over,
    residual,
)

import stiefel


@over("method", [*HELD, *PENALTIES])
def test_trap_06_no_weight_collapses_under_weight_decay(method: stiefel.Constraint) -> None:
    shape = (4, 7)
    # Alone, the decay would take a factor of 0.6 per step, 4e-5 in all. A penalty balances it somewhat below the set,
    # and less of it, since Adam's steps against it are no longer than lr per entry: 0.97 per step, 1e-2 in all.
    decay, steps, low = (5.0, 20, 0.9) if method.claim is not None else (0.4, 150, 0.4)
    layer = linear(gaussian(*shape), method, scale=1.5)
    optimizer = stiefel.optimizer(layer, adam_with_decay(method), lr=0.08, weight_decay=decay)
    for step in range(steps):
        optimizer.zero_grad()
        g = gaussian(*shape, seed=step)
        ((layer.weight * g).sum() / g.norm() + 100 * stiefel.penalty(layer)).backward()
        optimizer.step()
        if step in (0, 9, steps - 1):  # torch's collapses at the first
            bound = 0 if method.claim is None else method.claim.bound
            assert torch.linalg.svdvals(layer.weight.detach()).min() / 1.5 > low - bound
            assert method.claim is None or holds(method, layer.weight, 1.5)


@over("method", STEPPED)
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_trap_06_weight_decay_alone_does_not_move_an_orthogonal_weight(method: stiefel.Constraint, name: str) -> None:
    for shape in SHAPES.values():
        # A step along −W has no tangent part. Of what rounding leaves of it, no method may make a direction of its own.
        layer = linear(gaussian(*shape), method)
        start = layer.weight.detach().clone()
        if name == "adamw" and isinstance(method, stiefel.ManifoldMethod):
            pytest.skip("geoopt's Adam has no decoupled decay, and its L2 decay goes through the second moment")
        cls = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
        optimizer = stiefel.optimizer(layer, cls, lr=0.1, weight_decay=0.1)
        for _ in range(10):
            layer.weight.grad = torch.zeros_like(layer.weight)
            optimizer.step()
        torch.testing.assert_close(layer.weight.detach(), start, rtol=0, atol=1e-11)


def test_trap_06_peer_torchs_orthogonal_collapses_after_one_step() -> None:
    layer = orthogonal(nn.Linear(7, 4, bias=False))
    assert residual(layer.weight) < 1e-5
    optimizer = torch.optim.AdamW(layer.parameters())
    layer.weight.sum().backward()
    optimizer.step()
    assert not layer.weight.any()


#
# torch's and geotorch's orthogonal constrain each k×k slice of a kernel, not the kernel as a matrix of filters; torch's
# matrix_exp and geotorch's base are n×n: on a 64×576 weight 300 to 400 times the cost of OWN.

CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor]]] = {
    "conv2d": (lambda: nn.Conv2d(3, 6, 3), lambda w: w.flatten(1)),
    "conv2d of more filters than weights": (lambda: nn.Conv2d(1, 16, 3), lambda w: w.flatten(1)),
    "conv3d": (lambda: nn.Conv3d(2, 5, 2), lambda w: w.flatten(1)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda w: w.reshape(2, 3, 18)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 3, 2), lambda w: w.transpose(0, 1).flatten(1)),
}


@over("method", VARIANTS)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_trap_07_kernels_are_matrices_of_filters(method: stiefel.Constraint, kind: str) -> None:
    build, filters = CONVOLUTIONS[kind]
    torch.manual_seed(0)
    try:
        layer = stiefel.constrain(build().double(), method)
    except stiefel.LayoutError:
        pytest.skip(f"{method} is not defined for a {kind} convolution")
    assert residual(filters(layer.weight)) < 64 * EPS
    optimizer = stiefel.optimizer(layer, torch.optim.SGD, lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        g = gaussian(*layer.weight.shape, seed=step)
        (layer.weight * g / g.norm()).sum().backward()
        optimizer.step()
    if method.claim is not None:
        assert holds(method, filters(layer.weight))


def test_trap_07_peer_torch_and_geotorch_constrain_slices() -> None:
    import geotorch

    for constrained in (orthogonal, lambda layer: geotorch.orthogonal(layer, "weight")):
        torch.manual_seed(0)
        layer = nn.Conv2d(3, 6, 3).double()
        constrained(layer)
        assert residual(layer.weight) < 1e-12  # each of the last two dimensions
        assert residual(layer.weight.flatten(1)) > 0.5


@over("method", [m for m in VARIANTS if "ocnn" not in str(m)])  # whose Gram matrix is out×out by definition
@pytest.mark.parametrize("shape", [(3, 120), (120, 3)], ids=["wide", "tall"])
def test_trap_07_nothing_of_size_n_by_n_is_built_for_a_thin_weight(
    method: stiefel.Constraint, shape: tuple[int, int]
) -> None:
    layer = linear(gaussian(*shape), method)
    optimizer = stiefel.optimizer(layer, torch.optim.SGD, lr=0.1, momentum=0.9)
    with Largest() as largest:
        ((layer.weight * gaussian(*shape, seed=1)).sum() + stiefel.penalty(layer)).backward()
        optimizer.step()
    # The wrapper of torch's own form is the one that says it does.
    assert (largest.entries >= 120**2) == ("n×n" in method.summary)
