"""The law of sizes: where ``φ(3V) = φ(V)``, ``φ(cV) = φ(V)`` for every c > 0, down to denormal and up to huge proxies.

Which methods those are is found by trying: the ones for which ``forward(3 V) = forward(V)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import conformance
import pytest
import torch
from torch import Tensor, nn

import stiefel
from stiefel.attach.weights import constrained_weights
from stiefel.constraint import Constraint, Reparameterization
from stiefel.layout import Layout
from stiefel.linalg import gram_residual, unit_sized

SHAPES = [(3, 8), (5, 5), (8, 3), (1, 6), (40, 900), (190, 190)]
"""The last two are beyond the size up to which gradients are taken operation by operation."""


def gaussian(layout: Layout, dtype: torch.dtype, seed: int) -> Tensor:
    """The same one in every precision."""
    wide = torch.promote_types(dtype, torch.float64)
    return torch.randn(layout.matrix_shape, generator=torch.Generator().manual_seed(seed), dtype=wide).to(dtype)


def tuned(method: Constraint) -> Iterator[Constraint]:
    """A method, and with each single option of its tuning changed."""
    yield method
    for option, values in method.tuning.items():
        yield from (replace(method, **{option: v}) for v in values if v != getattr(method, option))


def weight(method: Reparameterization, v: Tensor, layout: Layout) -> Tensor:
    """The weight of a proxy V, with whatever else the method needs from a start that does not depend on it."""
    start = method.nearest(gaussian(layout, v.dtype, 1), layout)
    return method.forward(v, layout, **method.start(start, layout)[1])


def forgets_size(method: Constraint) -> bool:
    if not isinstance(method, Reparameterization):
        return False
    layout = Layout((4, 7))
    v = gaussian(layout, torch.float64, 0)
    return bool((weight(method, 3 * v, layout) - weight(method, v, layout)).abs().max() < 1e-12)


CATALOGUE = [m for name in stiefel.available() for form in conformance.variants(name) for m in tuned(form)]
FORGETFUL = [m for m in CATALOGUE if forgets_size(m)]
HELD = [m for m in FORGETFUL if m.claim is not None]

every_forgetful = pytest.mark.parametrize("method", FORGETFUL, ids=str)
every_held = pytest.mark.parametrize("method", HELD, ids=str)
every_precision = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)


def of(method: Constraint, dtype: torch.dtype) -> None:
    if dtype not in method.dtypes:
        pytest.skip("for real weights only")


def residual(x: Tensor) -> float:
    x = x.detach().to(torch.promote_types(x.dtype, torch.float64))
    # Not X Xᴴ − I itself: the sum of 900 nearly equal squares has an error of 4e-14 on some processors.
    return torch.linalg.matrix_norm(gram_residual(x)).max().item() / x.shape[-2] ** 0.5


def test_there_are_some() -> None:
    assert len(HELD) >= 4
    assert len(FORGETFUL) > len(HELD)


@pytest.mark.sampled(4)
@every_forgetful
@every_precision
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_size_gives_the_same_weight_and_the_gradient_divided_by_it(
    method: Reparameterization, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    """By powers of two, which change no digit: the weight is the same to rounding."""
    of(method, dtype)
    layout, info = Layout(shape), torch.finfo(dtype)
    v, g = gaussian(layout, dtype, 2), gaussian(layout, dtype, 3)
    found = {}
    for exponent in (0, -100, -66, -33, 33, 66, 100) if info.bits == 32 else (0, -990, -300, -40, 40, 300, 990):
        proxy = (v * 2.0**exponent).requires_grad_()
        x = weight(method, proxy, layout)
        (gradient,) = torch.autograd.grad(x, proxy, g)
        found[exponent] = x.detach(), gradient * 2.0**exponent
    x, gradient = found.pop(0)
    for exponent, (same, scaled) in found.items():
        assert (same - x).abs().max() <= 32 * info.eps, f"2^{exponent}"
        assert (scaled - gradient).abs().max() <= 256 * info.eps * gradient.abs().max(), f"2^{exponent}"


@pytest.mark.sampled(6)
@every_forgetful
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [1e-43, 1e-41, 1e-38, 1e-36, 1e38], ids=str)
def test_the_ends_of_single_precision(
    method: Reparameterization, dtype: torch.dtype, shape: tuple[int, int], size: float
) -> None:
    """Where digits are lost by V being denormal, the weight is that of what is left, as in double."""
    of(method, dtype)
    layout = Layout(shape)
    v = gaussian(layout, dtype, 2)
    v = size * (v / v.abs().max())
    wide = v.to(torch.promote_types(dtype, torch.float64)) / size
    x, exact = weight(method, v, layout), weight(method, wide, layout)
    condition = torch.linalg.cond(wide).max().item()
    assert condition < 1e4
    assert (x - exact).abs().max() <= 1e-6 * condition
    if method.claim is not None:
        assert method.claim.allows(residual(x), dtype, x.shape[-2])


@pytest.mark.sampled(3)
@every_forgetful
@every_precision
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_proxy_of_zero_has_a_weight_and_a_gradient(
    method: Reparameterization, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    """Those of [I, 0], of all that is held on the set."""
    of(method, dtype)
    layout, g = Layout(shape), gaussian(Layout(shape), dtype, 3)
    found = []
    for v in (torch.zeros_like(g), torch.eye(*g.shape[1:], dtype=dtype).expand_as(g)):
        proxy = v.clone().requires_grad_()
        x = weight(method, proxy, layout)
        found.append((x.detach(), torch.autograd.grad(x, proxy, g)[0]))
        assert all(torch.isfinite(t).all() for t in found[-1])
        assert method.claim is None or method.claim.allows(residual(x), dtype, x.shape[-2])
    if method.claim is not None:
        (x, gradient), (same, also) = found
        assert torch.equal(x, same)
        assert torch.allclose(gradient, also, rtol=1e-4, atol=1e-5 * also.abs().max().item())


@every_held
@every_precision
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("shape", [(6, 9), (9, 9), (40, 900)], ids=str)
def test_a_proxy_that_has_lost_a_rank_has_a_weight_on_the_set_and_a_gradient(
    method: Reparameterization, dtype: torch.dtype, rank: int, shape: tuple[int, int]
) -> None:
    """Exactly so, as ones and threes do: rounding would fill what is missing."""
    of(method, dtype)
    layout = Layout(shape)
    v = torch.ones(layout.matrix_shape, dtype=dtype)
    v[:, 0] *= 3
    v[:, :, : 3 * (rank - 1)] = 0
    v[:, -1, : 3 * (rank - 1)] = 5
    assert torch.linalg.matrix_rank(v) == rank
    v.requires_grad_()
    x = weight(method, v, layout)
    (gradient,) = torch.autograd.grad(x, v, gaussian(layout, dtype, 3))
    assert method.claim is not None
    assert method.claim.allows(residual(x), dtype, x.shape[-2])
    assert torch.isfinite(gradient).all()


def line(method: Constraint) -> nn.Module:
    return conformance.line(method, (3, 7), (5, 5), (2, 16, 40), dtype=torch.float32)


def check(model: nn.Module, where: str) -> None:
    for found in constrained_weights(model):
        error = found.residual()
        assert error == error, f"NaN {where}"
        assert found.allows(error), f"off by {error:.1e} {where}"


def plain(model: nn.Module, **hyper: float) -> torch.optim.Optimizer:
    """torch's own: :func:`stiefel.optimizer` turns off decay by which a proxy swings through zero."""
    return torch.optim.SGD(model.parameters(), **hyper)


@pytest.mark.filterwarnings("ignore:.*would move weight")
@every_held
def test_decay_without_a_gradient_shrinks_the_proxy_to_nothing_and_the_weight_not_at_all(method: Constraint) -> None:
    """A flat loss: after 500 steps the proxy is of size 1e-11, in the end it is denormal. Momentum makes it swing."""
    model = line(method)
    optimizer = plain(model, lr=0.1, momentum=0.9, weight_decay=0.1)
    sizes, kept = [], {k: w.detach().clone() for k, w in conformance.weights(model).items()}
    for step in range(2200):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        if step % 50 == 0:
            check(model, f"after {step} steps")
            sizes.append(max(p.abs().max().item() for p in model.parameters()))
            if sizes[-1] > 1e-36:  # of what is denormal, digits are lost
                for key, w in conformance.weights(model).items():
                    moved = min((w - sign * kept[key]).abs().max().item() for sign in (1, -1))
                    assert moved < 1e-3, f"{key} has moved after {step} steps"
    assert sizes[-1] < 1e-40
    assert sum(1e-36 < s < 1e-20 for s in sizes) > 5


@pytest.mark.filterwarnings("ignore:.*would move weight")
@every_held
def test_a_proxy_made_zero_and_enormous_gradients(method: Constraint) -> None:
    """lr 1 and decay 1 leave V = 0 where the gradient is zero; the next gradients are huge, and then ordinary again."""
    model = line(method)
    optimizer = plain(model, lr=1.0, weight_decay=1.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all((p == 0).all() for p in model.parameters())
    check(model, "at zero")
    for size in (1.0, 1e20, 1e-20, 1e30, 1.0):
        optimizer.zero_grad()
        (size * conformance.pull(model)).backward()
        optimizer.step()
        check(model, f"after gradients of size {size:g}")
        assert all(torch.isfinite(p).all() for p in model.parameters())


# --- what it rests on ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128], ids=str)
def test_unit_sized_changes_no_digit(dtype: torch.dtype) -> None:
    layout, info = Layout((3, 5)), torch.finfo(dtype)
    v = gaussian(layout, dtype, 0)
    low, high = math.floor(math.log2(info.tiny)) + 8, math.floor(math.log2(info.max)) - 3
    reference = unit_sized(v * 2.0**low)
    for exponent in range(low, high, 7):
        scaled = unit_sized(v * 2.0**exponent)
        ratio = (scaled / reference).real
        assert torch.equal(scaled, reference * ratio[0, 0, 0])
        if abs(exponent) > 30:
            entries = torch.view_as_real(scaled) if dtype.is_complex else scaled
            assert 0.5 <= entries.abs().max() < 1


@pytest.mark.parametrize("smallest", [2.0**-149, 3e-45, 1e-40])
def test_unit_sized_of_denormal_numbers(smallest: float) -> None:
    v = torch.tensor([[[smallest, 0.0, -smallest]]])
    assert torch.equal(unit_sized(v).sign(), v.sign())
    assert 0.5 <= unit_sized(v).max() < 1


def test_unit_sized_takes_each_matrix_by_itself_and_has_its_derivative() -> None:
    sizes = torch.tensor([1e-25, 1.0, 1e25, 0.0], dtype=torch.float64)[:, None, None]
    v = sizes * torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scaled = unit_sized(v)
    assert torch.equal(scaled[3], torch.eye(2, 3, dtype=torch.float64))
    assert all(torch.equal(scaled[k], unit_sized(v[k])) for k in (0, 2, 3))
    v.requires_grad_()
    (gradient,) = torch.autograd.grad(unit_sized(v).sum(), v)
    expected = torch.where(v == 0, 1.0, (scaled / v).detach())
    assert torch.allclose(gradient, expected, rtol=1e-14)
