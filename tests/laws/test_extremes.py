"""The law of extreme steps: ``‖XXᵀ − I‖_F ≤ claim`` after a step U of any length, normal to the set, or of rank one."""

from collections.abc import Callable, Sequence

import conformance
import pytest
import torch
from common import forms
from torch import Tensor, nn
from torch.autograd import gradcheck

import stiefel
from stiefel.attach.weights import constrained_weights
from stiefel.constraint import ROUNDING, ManifoldMethod, StepMethod
from stiefel.layout import Layout
from stiefel.linalg import cayley, cayley_along, cayley_step, gram_residual, nearest_orthonormal, newton_schulz
from stiefel.manifold.geometry import canonical_gradient
from stiefel.manifold.retractions import retract_cayley, retract_exp_canonical, retract_exp_euclidean

SHAPES = [(1, 10), (2, 7), (8, 64), (32, 32), (16, 100)]


def point(p: int, n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nearest_orthonormal(torch.randn(3, p, n, generator=generator, dtype=dtype))


def residual(x: Tensor) -> float:
    wide = x.to(torch.promote_types(x.dtype, torch.float64))
    return torch.linalg.matrix_norm(gram_residual(wide)).max().item()


@pytest.mark.sampled(8)
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


def gradient(kind: str, shape: tuple[int, int, int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Of norm 1: dense, or of rank one."""
    b, p, n = shape
    if kind == "dense":
        g = torch.randn(shape, generator=generator, dtype=dtype)
    else:
        g = torch.randn(b, p, 1, generator=generator, dtype=dtype) @ torch.randn(
            b, 1, n, generator=generator, dtype=dtype
        )
    return g / torch.linalg.matrix_norm(g, keepdim=True)


LENGTHS = [1e-3, 0.1, 1.0, 1e3, 1e6, 1e8, 1e18, 1e30]
FEASIBLE = [
    method
    for name in stiefel.available()
    for method in forms(name)
    if isinstance(method, (StepMethod, ManifoldMethod)) and method.feasible
]


def mover(method: stiefel.Constraint, shape: tuple[int, int, int]) -> Callable[[Tensor, Tensor, float], Tensor]:
    """The step of a method from X, where the base optimizer would go by −lr G."""
    if isinstance(method, ManifoldMethod):
        manifold = method.manifold(Layout(shape, batched=True))
        return lambda x, g, lr: manifold.retract(x, -lr * manifold.gradient(x, g))
    assert isinstance(method, StepMethod)

    def move(x: Tensor, g: Tensor, lr: float) -> Tensor:
        result = method.step(x, -lr * g, lr)
        return result[0] if isinstance(result, tuple) else result

    return move


def check_steps(
    method: stiefel.Constraint,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    steps: int,
    lengths: Sequence[float] = LENGTHS,
) -> None:
    torch.manual_seed(6)  # for methods that draw
    generator, move = torch.Generator().manual_seed(7), mover(method, shape)
    for kind in ("dense", "rank one"):
        for length in lengths:
            x = point(*shape[1:], dtype)[: shape[0]]
            for _ in range(steps):
                x = move(x, gradient(kind, shape, dtype, generator), length)
                assert residual(x) <= ROUNDING * torch.finfo(dtype).eps * shape[1] ** 0.5, (kind, length)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize(("p", "n"), [(1, 1), (3, 3), (5, 7), (1, 10), (3, 9), (33, 33), (16, 48)])
@pytest.mark.parametrize("method", FEASIBLE, ids=str)
def test_steps_of_any_length_end_on_the_set(method: stiefel.Constraint, p: int, n: int, dtype: torch.dtype) -> None:
    if dtype in method.dtypes:
        check_steps(method, (2, p, n), dtype, 4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize(("p", "n"), [(64, 64), (128, 128), (256, 256), (64, 576)])
@pytest.mark.parametrize("method", FEASIBLE, ids=str)
def test_steps_of_any_length_end_on_large_sets(method: stiefel.Constraint, p: int, n: int, dtype: torch.dtype) -> None:
    if dtype in method.dtypes:
        check_steps(method, (1, p, n), dtype, 640 // n + 1)


@pytest.mark.slow
@pytest.mark.parametrize("method", FEASIBLE, ids=str)
def test_steps_of_any_length_end_on_the_largest_set(method: stiefel.Constraint) -> None:
    check_steps(method, (1, 512, 4608), torch.float32, 1, (0.1, 1e3, 1e18))


@pytest.mark.sampled(8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize(("p", "n"), [(1, 1), (3, 3), (5, 7), (3, 7), (1, 10), (33, 33), (8, 64)])
@pytest.mark.parametrize("retract", [retract_cayley, retract_exp_euclidean, retract_exp_canonical])
def test_rotations_of_any_length_end_on_the_set(retract, p: int, n: int, dtype: torch.dtype) -> None:
    x, generator = point(p, n, dtype), torch.Generator().manual_seed(3)
    for kind in ("dense", "rank one"):
        for length in LENGTHS * 3:
            x = retract(x, length * canonical_gradient(x, gradient(kind, (3, p, n), dtype, generator)))
            assert residual(x) <= ROUNDING * torch.finfo(dtype).eps * p**0.5


@pytest.mark.parametrize(("p", "n"), [(5, 5), (5, 7), (3, 7), (1, 10), (33, 33)])
@pytest.mark.parametrize("length", [1e-3, 1.0, 1e3, 1e8])
def test_cayley_without_reading_numbers_is_the_same(monkeypatch, length: float, p: int, n: int) -> None:
    x, generator = point(p, n, torch.float32), torch.Generator().manual_seed(4)
    u = length * canonical_gradient(x, gradient("dense", (3, p, n), torch.float32, generator))
    here = retract_cayley(x, u)
    monkeypatch.setattr(cayley, "readable", lambda tensor: False)  # as on a GPU
    torch.testing.assert_close(retract_cayley(x, u), here, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("p", "n"), [(3, 3), (3, 4), (2, 7)])
@pytest.mark.parametrize("size", [0.1, 10.0])
@pytest.mark.parametrize("along", [cayley_step, cayley_along])
def test_derivative_of_cayley_at_any_length(monkeypatch, along, size: float, p: int, n: int) -> None:
    monkeypatch.setattr(cayley, "LONGEST", 5.0)  # where the length ends, the derivative along it does
    x, generator = point(p, n, torch.float64), torch.Generator().manual_seed(5)
    b = size * gradient("dense", (3, p, n), torch.float64, generator)
    assert gradcheck(along, (x.requires_grad_(), b.requires_grad_()))


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


@pytest.mark.parametrize("name", [n for n in stiefel.available() if stiefel.get(n).lifts])
def test_a_displacement_whose_powers_overflow_a_double_ends_on_the_set(name: str) -> None:
    method = stiefel.get(name)
    assert isinstance(method, StepMethod)
    x = point(3, 8, torch.float64)
    u = 1e60 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moved = method.step(x, u, 1.0)
    moved = moved[0] if isinstance(moved, tuple) else moved
    assert method.claim is not None
    assert method.claim.allows(residual(moved) / 3**0.5, torch.float64, 3)


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


CLAIMED = conformance.claimed()


@pytest.mark.parametrize(("dtype", "lr"), [(torch.float32, 2.4e-4), (torch.float32, 1e-3), (torch.float64, 1e-8)])
@pytest.mark.parametrize("method", CLAIMED, ids=str)
def test_a_sparse_start_is_left_on_the_set_by_adam(method: stiefel.Constraint, dtype: torch.dtype, lr: float) -> None:
    """Of the identity its first step makes rows of a large entry and many small ones, all of one size.

    A product of matrices loses the squares of the small ones, one by one, beside the large one's.
    """
    if not method.thin:
        pytest.skip("builds n×n matrices")
    layer = nn.Linear(1152, 16, bias=False, dtype=dtype)
    nn.init.eye_(layer.weight)
    stiefel.constrain(layer, method)
    optimizer = stiefel.optimizer(layer, torch.optim.Adam, lr=lr)
    g = torch.randn(16, 1152, generator=torch.Generator().manual_seed(0), dtype=dtype)
    for _ in range(2):
        optimizer.zero_grad()
        (layer.weight * g).sum().backward()
        optimizer.step()
        (found,) = constrained_weights(layer)
        assert found.allows(found.residual())
