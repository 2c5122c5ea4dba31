"""Steps at the ends of what methods promise: long, normal to the set, or of rank one."""

import pytest
import torch
from torch import Tensor

import stiefel
from stiefel.layout import Layout
from stiefel.linalg import gram_residual, nearest_orthonormal, newton_schulz

SHAPES = [(1, 10), (2, 7), (8, 64), (32, 32), (16, 100)]


def point(p: int, n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nearest_orthonormal(torch.randn(3, p, n, generator=generator, dtype=dtype))


def residual(x: Tensor) -> float:
    wide = x.to(torch.promote_types(x.dtype, torch.float64))
    return torch.linalg.matrix_norm(gram_residual(wide)).max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize(("p", "n"), SHAPES)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4, 1e6, 1e7, 1e10, 1e18])
@pytest.mark.parametrize("name", ["pogo", "landing"])
def test_tubes_hold_for_long_steps_normal_to_the_set(
    name: str, size: float, p: int, n: int, dtype: torch.dtype
) -> None:
    """A normal displacement has no tangent part: what is left of it is rounding, which is tangent to nothing."""
    method, x = stiefel.get(name), point(p, n, dtype)
    generator = torch.Generator().manual_seed(1)
    assert isinstance(method, stiefel.StepMethod)
    assert method.claim is not None
    for k in range(40):
        s = torch.randn(3, p, p, generator=generator, dtype=dtype)
        u = (s + s.mH) @ x if k % 3 else torch.randn(x.shape, generator=generator, dtype=dtype)
        x = method.step(x, size * u / torch.linalg.matrix_norm(u, keepdim=True), 1.0)[0]
        assert residual(x) <= method.claim.bound + 64 * torch.finfo(dtype).eps * p**0.5


@pytest.mark.parametrize("rate", [1.0, 100.0, 300.0, 1000.0])
@pytest.mark.parametrize(("p", "n"), SHAPES)
@pytest.mark.parametrize("map_name", ["qr", "polar", "cayley"])
def test_retractions_hold_for_gradients_of_rank_one(map_name: str, p: int, n: int, rate: float) -> None:
    method, x = stiefel.get("retraction", map=map_name), point(p, n, torch.float32)
    assert isinstance(method, stiefel.StepMethod)
    assert method.claim is not None
    generator = torch.Generator().manual_seed(2)
    for _ in range(60):
        g = torch.randn(3, p, 1, generator=generator) @ torch.randn(3, 1, n, generator=generator)
        x = method.step(x, -rate * g / torch.linalg.matrix_norm(g, keepdim=True), rate)
        assert method.claim.allows(residual(x) / p**0.5, torch.float32, p)


@pytest.mark.parametrize("size", [1.0, 1e10, 1e26, 1e37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reflections_hold_for_proxies_of_any_size(dtype: torch.dtype, size: float) -> None:
    method, layout = stiefel.get("householder"), Layout((3, 5, 9), batched=True)
    assert isinstance(method, stiefel.Reparameterization)
    assert method.claim is not None
    proxy, parts = method.start(point(5, 9, dtype), layout)
    noise = torch.randn(proxy.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    proxy = (proxy + size * noise).requires_grad_()
    x = method.forward(proxy, layout, **parts)
    assert method.claim.allows(residual(x.detach()) / 5**0.5, dtype, 5)
    x.sum().backward()
    assert proxy.grad is not None
    assert proxy.grad.isfinite().all()
    assert proxy.grad.abs().max() > 1e-3 / size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_reflections_start_on_the_set(dtype: torch.dtype) -> None:
    """From a weight of rank one, 64 of them left 3.6e-5 in float32."""
    method, layout = stiefel.get("householder"), Layout((64, 576))
    x = newton_schulz(nearest_orthonormal(torch.ones(1, 64, 576, dtype=torch.float64))).to(dtype)
    assert isinstance(method, stiefel.Reparameterization)
    assert method.claim is not None
    proxy, parts = method.start(x, layout)
    started = method.forward(proxy, layout, **parts)
    assert method.claim.allows(residual(started) / 8, dtype, 64)
    assert (started - x).abs().max() < 1e3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("attraction", [1e-12, 1.0, 1e3])
@pytest.mark.parametrize("rate", [0.0, 1e-6, 1.0, 1e6, 1e18, 1e30])
def test_landing_lands_at_any_rate(rate: float, attraction: float, dtype: torch.dtype) -> None:
    """From within its tube, also where the pull alone is longer than the numbers that have squares."""
    method, x = stiefel.get("landing", attraction=attraction), point(8, 64, dtype)
    assert isinstance(method, stiefel.StepMethod)
    generator = torch.Generator().manual_seed(1)
    x = x + 0.02 * torch.randn(x.shape, generator=generator, dtype=dtype)
    first = residual(x)
    for size in (0.0, 1.0, 1e30):
        y = x
        for _ in range(40):
            u = torch.randn(x.shape, generator=generator, dtype=dtype)
            y = method.step(y, size * u / torch.linalg.matrix_norm(u, keepdim=True), rate)[0]
            assert residual(y) <= 0.5 + 64 * torch.finfo(dtype).eps * 8**0.5
        if size == 0 and rate * attraction >= 1:
            assert residual(y) < first / 100
