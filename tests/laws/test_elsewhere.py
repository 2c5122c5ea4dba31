"""The law of devices where there is none: each branch that a method takes on an accelerator, on a stand-in for one.

Nothing makes the host wait; claims hold, also where the device has no float64; and a step is what a CPU's is.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import conformance
import pytest
import scipy.linalg
import test_claims
import test_conformance
import torch
from common import forms, gaussian
from costs.elsewhere import HostWait, NoDouble, elsewhere
from test_devices import DRAWING, TURNING, Training, hard, net
from torch import Tensor
from torch.optim import SGD, Adam

import stiefel
from stiefel.attach.weights import constrained_weights
from stiefel.constraint import Constraint
from stiefel.linalg import gram_residual, largest_singular_value, matrix_exponential, nearest_orthonormal, polar, qf
from stiefel.linalg.svd import nearest_in_step

WAITING = {"own_pca", "torch_orthogonal"}
"""Methods that are torch's own maps: these read numbers, and some have no kernel outside of CUDA."""
FORMS = [form for name in stiefel.available() for form in forms(name)]
FREE = [form for form in FORMS if form.name not in WAITING]
DEVICES = {"cuda": "fast", "mps": "none"}
every_device = pytest.mark.parametrize("kind", DEVICES)


def trained(method: Constraint, kind: str | None, steps: int = 3, cls: type = SGD) -> torch.nn.Module:
    """A net after some steps on a device, or on the CPU."""
    model = stiefel.constrain(net("cpu"), method)
    hyper = {} if cls is SGD else {"lr": 1e-2}
    training = Training(model, "cpu", cls, **hyper)
    if kind is None:
        training.steps(steps)
    else:
        with elsewhere(kind, double=DEVICES[kind]):
            training.steps(steps)
    return model


@pytest.mark.sampled(8, values=False)
@every_device
@pytest.mark.parametrize("method", FREE, ids=str)
def test_no_step_waits_and_none_needs_float64_where_there_is_none(method, kind):
    model = trained(method, kind)
    assert all(w.allows(w.residual()) for w in constrained_weights(model))


@pytest.mark.sampled(8, values=False)
@every_device
@pytest.mark.parametrize("method", [f for f in FREE if f.name not in DRAWING | TURNING], ids=str)
def test_a_step_is_what_a_cpu_takes(method, kind):
    there, here = trained(method, kind), trained(method, None)
    for a, b in zip(there.parameters(), here.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.sampled(8, values=False)
@pytest.mark.parametrize(
    ("shape", "double", "count"),
    [
        pytest.param((8, 40), "slow", 8, id="rows-slow"),
        pytest.param((16, 16), "fast", 8, id="square-fast"),
        *(
            pytest.param(shape, double, 15, id=f"{shape[0]}x{shape[1]}-{double}", marks=pytest.mark.slow)
            for shape in ((16, 16), (8, 40), (64, 64), (64, 576))
            for double in ("fast", "slow")
        ),
    ],
)
@pytest.mark.parametrize("method", [m for m in test_claims.CLAIMED if m.name not in WAITING], ids=str)
def test_claims_hold(method, shape, double, count):
    with elsewhere(double=double, waits=True):
        test_claims.check(method, shape, torch.float32, ["momentum", "AdamW"][: 1 + (count > 8)], count, "cpu")


@every_device
@pytest.mark.parametrize("shape", [(5, 5), (8, 24), (64, 64)], ids=str)
@pytest.mark.parametrize("kinds", ["zero", "zero row", "equal rows", *"135"])
@pytest.mark.parametrize("orthonormalize", [qf, nearest_orthonormal, nearest_in_step], ids=lambda f: f.__name__)
def test_any_matrix_is_made_orthonormal(orthonormalize: Callable[[Tensor], Tensor], kinds, shape, kind):
    v = hard(kinds, *shape, torch.float32, "cpu")
    with elsewhere(kind, double=DEVICES[kind], waits=orthonormalize is nearest_orthonormal):
        x = orthonormalize(v)
    assert torch.linalg.matrix_norm(gram_residual(x.double())).max() / shape[0] ** 0.5 <= 1e-6


@every_device
@pytest.mark.parametrize("decades", range(5))
@pytest.mark.parametrize("shape", [(1, 6), (6, 6), (16, 144), (60, 90)], ids=str)
def test_the_polar_factor_and_its_gradient(shape, decades, kind):
    v, g = hard(str(decades or "0"), *shape, torch.float32, "cpu"), gaussian(3, *shape, dtype=torch.float32, seed=2)
    exact = v.double().requires_grad_()
    x = polar(exact)
    x.backward(g.double())
    leaf = v.clone().requires_grad_()
    with elsewhere(kind, double=DEVICES[kind]):
        y = polar(leaf)
        y.backward(g)
    assert torch.linalg.norm(y.detach() - x.detach()) <= (2e-5 + 2e-7 * 10**decades) * shape[0] ** 0.5 * 3
    assert torch.linalg.norm(leaf.grad - exact.grad) <= (2e-5 + 1e-6 * 10**decades) * torch.linalg.norm(exact.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("length", [0.0, 1e-3, 1.0, 30.0, 1e3])
def test_the_exponential_is_scipys(length, dtype):
    wide = torch.promote_types(dtype, torch.float64)
    a = gaussian(3, 6, 6, dtype=wide)
    a = a - a.mH
    a = (length * a / torch.linalg.matrix_norm(a, keepdim=True)).to(dtype)
    with elsewhere():
        x = matrix_exponential(a)
    expected = torch.stack([torch.from_numpy(scipy.linalg.expm(m.to(wide).numpy())) for m in a])
    assert (x - expected).abs().max() <= 8 * torch.finfo(dtype).eps * max(1.0, length)


@pytest.mark.parametrize("shape", [(1, 6), (6, 6), (16, 144)], ids=str)
@pytest.mark.parametrize("ties", [1, 2, 6])
def test_the_largest_singular_value_and_its_gradient(shape, ties):
    u, s, wh = torch.linalg.svd(gaussian(3, *shape, dtype=torch.float64), full_matrices=False)
    s = s.clone()
    s[..., : min(ties, shape[0])] = s[..., :1]
    v = ((u * s.unsqueeze(-2)) @ wh).requires_grad_()
    with elsewhere():
        sigma = largest_singular_value(v)
        sigma.sum().backward()
    torch.testing.assert_close(sigma, s[..., 0])
    here = v.detach().clone().requires_grad_()
    largest_singular_value(here).sum().backward()
    torch.testing.assert_close(v.grad, here.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", FREE, ids=str)
def test_meta_tensors_train(method):
    """They have no values: whatever the host would read raises by itself."""
    model = stiefel.constrain(net("cpu"), method).to("meta")
    Training(model, "meta").steps(2)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("kind", DEVICES)
def test_a_model_there_is_constrained_reported_and_projected(kind):
    model = net("cpu")
    with elsewhere(kind, double=DEVICES[kind], waits=True):
        stiefel.constrain(model, "retraction")
        rows = stiefel.report(model).rows
        stiefel.project(model)
    assert [r.layout for r in rows] == ["8×27 rows", "48×288 rows", "48×48 rows"]
    assert max(r.relative for r in rows) < 1e-6


def test_double_can_be_chosen_by_hand():
    assert stiefel.linalg.has_double(torch.device("cpu"))
    try:
        for when, expected in (("always", True), ("never", False)):
            stiefel.use_double(when)
            assert stiefel.linalg.has_double(torch.device("cuda", 0)) is expected
            assert not stiefel.linalg.has_double(torch.device("mps"))
            assert stiefel.linalg.has_double(torch.device("cpu"))
    finally:
        stiefel.use_double("auto")
    with pytest.raises(stiefel.OptionError, match="expected one of 'auto', 'always', 'never'"):
        stiefel.use_double("sometimes")


@pytest.mark.parametrize(("double", "expected"), [(1.9e-3, True), (64e-3, False)])
def test_slow_float64_is_found_by_timing(monkeypatch, double, expected):
    from stiefel.linalg import precision

    taken = {torch.float64: double, torch.float32: 1e-3}
    monkeypatch.setattr(precision, "_seconds", lambda device, dtype: taken[dtype])
    precision._ratio.cache_clear()
    try:
        assert precision.has_double(torch.device("cuda", 0)) is expected
    finally:
        precision._ratio.cache_clear()


# --- the stand-in itself ---


def test_the_stand_in_refuses_what_a_device_would_wait_for():
    v = torch.randn(3, 3)
    with elsewhere() as counts:
        assert v.is_cuda
        assert v.device == torch.device("cuda", 0)
        assert not torch.zeros(3).is_cuda
        for read in (lambda: v.sum().item(), lambda: bool(v.any()), lambda: v.cpu(), lambda: torch.linalg.svd(v)):
            with pytest.raises(HostWait):
                read()
        before = counts.launches
        (v @ v).T.reshape(-1)
        assert counts.launches == before + 2  # the product, and the copy into another order
        torch.zeros(3).sum().item()  # the host's own
    with elsewhere("mps", double="none"), pytest.raises(NoDouble):
        v.double()
    with elsewhere(waits=True) as counts:
        v.sum().item()
    assert counts.waits == ["item"]


def test_the_stand_in_changes_no_number():
    model = stiefel.constrain(net("cpu"), "soft")
    twin = copy.deepcopy(model)
    Training(model, "cpu").steps(3)
    training = Training(twin, "cpu")
    with elsewhere():
        training.steps(3)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.sampled(8, values=False)
@pytest.mark.parametrize("cls", [Adam])
@pytest.mark.parametrize("method", [f for f in FREE if f.moves or f.claim], ids=str)
def test_adam_trains_there(method, cls):
    model = trained(method, "cuda", cls=cls)
    assert all(w.allows(w.residual()) for w in constrained_weights(model))


@pytest.mark.sampled(6, values=False)
@pytest.mark.parametrize("method", FREE, ids=str)
@pytest.mark.parametrize("check", ["divergence", "memory", "momentum"])
def test_conforms_there(check, method):
    conforms(check, method)


@pytest.mark.slow
@pytest.mark.parametrize("method", {f.name: f for f in reversed(FREE)}.values(), ids=str)
@pytest.mark.parametrize("check", sorted({*conformance.CHECKS} - {"fixed_points"}))
def test_conforms_there_in_all(check, method):
    conforms(check, method)


def conforms(check: str, method: Constraint) -> None:
    """The law of conformance where tensors say that they are elsewhere; the checks themselves read values."""
    for dtype in test_conformance.dtypes(check, method):
        if test_conformance.is_quick(check, dtype):
            with elsewhere("cuda", waits=True):
                conformance.run(method, check, dtype, torch.device("cuda"))


@every_device
def test_second_derivatives_come_back_to_the_device(kind):
    """They take eigenvalues in double, on the CPU where the device has none."""
    v = gaussian(2, 4, 6, dtype=torch.float32, seed=1)

    def second(v: Tensor) -> tuple[Tensor, Tensor]:
        leaf = v.clone().requires_grad_()
        x = polar(leaf)
        (g,) = torch.autograd.grad(x.pow(3).sum(), leaf, create_graph=True)
        return g, torch.autograd.grad(g.square().sum(), leaf)[0]

    with elsewhere(kind, double=DEVICES[kind], waits=True):
        found = second(v)
        # What a function returns is taken to be on the device: so its forward pass is looked at by itself.
        parts = sys.modules["stiefel.linalg.polar"]._Polar.forward(v, 1e-6)
        assert all(t.device.type == kind for t in parts)
    for a, b in zip(found, second(v.double()), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)


@pytest.mark.sampled(8, values=False)
@pytest.mark.parametrize("method", [f for f in FREE if f.name not in DRAWING | TURNING], ids=str)
def test_float64_models_train_where_float64_is_slow(method):
    """What is in double stays on its device, in double."""
    models = [stiefel.constrain(net("cpu").double(), method) for _ in range(2)]
    here, there = (Training(model, "cpu") for model in models)
    here.steps(2)
    with elsewhere(double="slow", waits=True) as counts:
        there.steps(2)
        assert "to('cpu')" not in counts.waits
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
