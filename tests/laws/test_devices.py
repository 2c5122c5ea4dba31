"""The law of devices: ``W_gpu(t) = W_cpu(t)`` to rounding, and no step makes the host wait for the device.

What only a GPU can show; skipped where there is none.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import budget
import pytest
import test_claims
import test_fixed_points
import torch
from common import forms
from costs.cases import Work
from costs.nets import in_a_graph
from fixed_points import departure
from torch import Tensor, nn
from torch.optim import SGD

import stiefel
from stiefel.attach.weights import constrained_weights
from stiefel.constraint import Constraint
from stiefel.linalg import gram_residual, nearest_orthonormal, qf
from stiefel.linalg.svd import nearest_in_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

WAITING = {"own_pca", "torch_orthogonal"}
"""Methods that torch itself makes wait: it chooses the order of an exponential on the host, and checks an SVD there."""
DRAWING = {"rsdm"}
"""Methods that draw at each step, from generators that differ between devices."""
TURNING = {"manifold_muon", "spectral_norm", "spel"}
"""Methods whose steps raise small singular values to 1, or divide by an estimate: in double devices agree on them."""
KINKED = {"manifold_muon"}
"""Methods whose direction is one of many that are as good: rounding chooses it, on one device too (1e-15: 3e-4)."""
FORMS = [form for name in stiefel.available() for form in forms(name)]
FREE = [form for form in FORMS if form.name not in WAITING]


def net(device: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 48), nn.ReLU(), nn.Linear(48, 48)).to(
        device
    )


class Training:
    """A model with its optimizer and a batch on its device, a step of which copies nothing to the device."""

    def __init__(self, model: nn.Module, device: str, cls: type[torch.optim.Optimizer] = SGD, **hyper: Any) -> None:
        self.model = model
        self.optimizer = stiefel.optimizer(model, cls, **({"lr": 0.05, "momentum": 0.9} if cls is SGD else hyper))
        dtype = next(model.parameters()).dtype
        self.x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(device, dtype)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            (self.model(self.x).square().mean() + stiefel.penalty(self.model)).backward()
            self.optimizer.step()


@pytest.mark.parametrize("method", FREE, ids=str)
def test_no_step_waits_for_the_device(method: Constraint) -> None:
    model = stiefel.constrain(net("cuda"), method)
    training = Training(model, "cuda")
    training.steps(3)  # what is made lazily
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.steps(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", [f for f in FORMS if f.name not in DRAWING], ids=str)
def test_a_gpu_trains_as_a_cpu_does(method: Constraint, dtype: torch.dtype) -> None:
    if method.name in (TURNING if dtype is torch.float32 else KINKED):
        pytest.skip("its steps differ by more than the rounding of their gradients")
    models = {device: stiefel.constrain(net("cpu").to(dtype), method).to(device) for device in ("cpu", "cuda")}
    for device, model in models.items():
        Training(model, device).steps(3)
    close = {"rtol": 1e-3, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 1e-8, "atol": 1e-9}
    for a, b in zip(models["cpu"].parameters(), models["cuda"].parameters(), strict=True):
        torch.testing.assert_close(b.cpu(), a, **close)


@pytest.mark.parametrize("shape", [(8, 27), (64, 576)], ids=str)
def test_a_direction_among_equals_is_as_good_on_a_gpu(shape: tuple[int, int]) -> None:
    method = stiefel.get("manifold_muon")
    x, g = (torch.randn(3, *shape, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in (0, 1))
    x = nearest_orthonormal(x)
    here, there = ((g.to(d) * method.direction(x.to(d), g.to(d))).sum((1, 2)).cpu() for d in ("cpu", "cuda"))  # type: ignore[attr-defined]
    torch.testing.assert_close(there, here, rtol=1e-3, atol=0)


def test_a_monitor_keeps_every_number_and_waits_for_none() -> None:
    model = stiefel.constrain(net("cuda"), "pogo")
    monitor = stiefel.Monitor(model, every=10_000, energy=False)
    running, count = torch.zeros((), device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")

    def step() -> None:
        with monitor:
            running.add_(0.5)
            count.add_(2)
        monitor.log(loss=running, count=count, rate=0.1)

    step()  # the first is measured
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2_499):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    steps = range(1, 2_501)
    assert monitor.history["loss"] == [(n, n / 2) for n in steps]
    assert monitor.history["count"] == [(n, 2 * n) for n in steps]
    assert monitor.history["rate"] == [(n, 0.1) for n in steps]


def test_divergence_is_told_at_the_latest_a_few_steps_later() -> None:
    model = stiefel.constrain(net("cuda"), "pogo")
    optimizer = stiefel.optimizer(model, SGD, lr=0.1)
    x = torch.full((2, 3, 8, 8), float("nan"), device="cuda")

    def steps() -> None:
        for _ in range(3):
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()
            torch.cuda.synchronize()

    with pytest.raises(stiefel.DivergenceError):
        steps()


@pytest.mark.parametrize("where", ["displacement", "result"])
def test_what_is_not_finite_leaves_a_weight_where_it_was(where: str) -> None:
    """The host is told later; until then training goes on from there, not from zero."""
    model = stiefel.constrain(nn.Linear(12, 8, bias=False).to("cuda"), "soft", decoupled=True, strength=1e30)
    with torch.no_grad():
        model.weight.mul_(1e5)
    before = model.weight.detach().clone()
    optimizer = stiefel.optimizer(model, SGD, lr=1e30 if where == "displacement" else 1.0)
    model.weight.sum().mul(1e30 if where == "displacement" else 1e-3).backward()

    def step() -> None:
        optimizer.step()
        torch.cuda.synchronize()

    step()
    assert torch.equal(model.weight, before)
    with pytest.raises(stiefel.DivergenceError):
        step()


# --- the laws of the catalogue, at the sizes that layers have and at the solution ---

CLAIMED = test_claims.CLAIMED


@pytest.mark.parametrize("base", ["momentum", "Adam"])
@pytest.mark.parametrize("method", CLAIMED, ids=str)
def test_a_solution_stays(method: Constraint, base: str) -> None:
    cls, hyper = test_claims.OPTIMIZERS[base]
    if cls is SGD:
        limit = 1e-10
    else:
        limit = test_fixed_points.limit(method, test_fixed_points.BASES.index((cls, hyper)), {}, 20, 1.0)
    assert departure(method, cls, hyper, 20, device="cuda") <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (64, 576)], ids=str)
@pytest.mark.parametrize("method", CLAIMED, ids=str)
def test_claims_hold(method: Constraint, shape: tuple[int, int], dtype: torch.dtype) -> None:
    if dtype not in method.dtypes or (not method.thin and shape[1] > 100):
        pytest.skip("not for this dtype, or n×n matrices")
    test_claims.check(method, shape, dtype, ["momentum", "AdamW"], 15, "cuda")


def hard(kind: str, p: int, n: int, dtype: torch.dtype, device: str = "cuda") -> Tensor:
    """A matrix without full rank, or nearly so."""
    wide = torch.promote_types(dtype, torch.float64)
    a = torch.randn(3, p, n, generator=torch.Generator().manual_seed(0), dtype=wide)
    if kind == "zero":
        a.zero_()
    elif kind == "zero row":
        a[:, 1] = 0
    elif kind == "equal rows":
        a[:, 1] = a[:, 0]
    else:
        u, s, vh = torch.linalg.svd(a, full_matrices=False)
        a = (u * torch.logspace(0, -float(kind), s.shape[-1], dtype=s.dtype)) @ vh
    return a.to(dtype).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(5, 5), (8, 24), (64, 64), (64, 576)], ids=str)
@pytest.mark.parametrize("kind", ["zero", "zero row", "equal rows", *"1234567"])
@pytest.mark.parametrize("orthonormalize", [qf, nearest_orthonormal, nearest_in_step], ids=lambda f: f.__name__)
def test_any_matrix_is_made_orthonormal(
    orthonormalize: Callable[[Tensor], Tensor], kind: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x = orthonormalize(hard(kind, *shape, dtype)).to(torch.promote_types(dtype, torch.float64))
    assert torch.linalg.matrix_norm(gram_residual(x)).max() / shape[0] ** 0.5 <= 8 * torch.finfo(dtype).eps


# --- what a training loop on a GPU has besides ---


def orthogonal_to_rounding(model: nn.Module, method: Constraint) -> bool:
    return all(w.allows(w.residual()) for w in constrained_weights(model)) if method.claim else True


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("method", FORMS, ids=str)
def test_tf32_outside_changes_no_constraint(method: Constraint) -> None:
    model = stiefel.constrain(net("cuda"), method)
    Training(model, "cuda").steps(5)
    assert torch.get_float32_matmul_precision() == "high"
    assert orthogonal_to_rounding(model, method)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", FORMS, ids=str)
def test_mixed_precision_with_a_gradient_scaler(method: Constraint, dtype: torch.dtype) -> None:
    model = stiefel.constrain(net("cuda"), method)
    optimizer = stiefel.optimizer(model, SGD, lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype is torch.float16, init_scale=2.0**30, growth_interval=2)
    x = torch.randn(16, 3, 8, 8, device="cuda")
    for _ in range(12):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype):
            loss = model(x).float().square().mean() + stiefel.penalty(model)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert orthogonal_to_rounding(model, method)


@pytest.mark.parametrize("method", FORMS, ids=str)
def test_fused_optimizers_train_proxies(method: Constraint) -> None:
    model = stiefel.constrain(net("cuda"), method)
    try:
        training = Training(model, "cuda", torch.optim.AdamW, lr=1e-3, fused=True)
    except stiefel.OptimizerError as refusal:
        pytest.skip(str(refusal))
    before = [p.detach().clone() for p in model.parameters()]
    training.steps(3)
    assert all((a != b).any() for a, b in zip(before, model.parameters(), strict=True))
    assert orthogonal_to_rounding(model, method)


def test_a_report_of_a_model_on_a_gpu_says_what_one_on_the_cpu_says() -> None:
    model = stiefel.constrain(net("cuda"), "own")
    on_gpu, on_cpu = stiefel.report(model), stiefel.report(copy.deepcopy(model).cpu())
    assert len(on_gpu.rows) == 3
    for a, b in zip(on_gpu.rows, on_cpu.rows, strict=True):
        assert (a.name, a.layout, a.determinant) == (b.name, b.layout, b.determinant)
        assert a.condition == pytest.approx(b.condition, abs=1e-5)
        assert max(a.relative, b.relative) < 1e-6


@pytest.mark.parametrize("method", [f for f in FREE if f.name not in DRAWING], ids=str)
def test_a_whole_step_is_captured_in_a_graph(method: Constraint) -> None:
    """Replayed, it is the step: nothing in it was decided by numbers that were there when it was captured."""
    models = [stiefel.constrain(net("cuda"), method) for _ in range(2)]
    eager, captured = (Training(model, "cuda") for model in models)
    try:
        graph = in_a_graph(Work(lambda: captured.steps(1)))  # after three steps
    except stiefel.StiefelError as refusal:
        pytest.skip(str(refusal))
    for _ in range(3):
        graph.call()
    eager.steps(6)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", FORMS, ids=str)
def test_channels_last_changes_nothing(method: Constraint) -> None:
    models = [stiefel.constrain(net("cuda"), method) for _ in range(2)]
    models[1].to(memory_format=torch.channels_last)
    for model in models:
        Training(model, "cuda").steps(3)
    if method.name in DRAWING | TURNING:
        assert orthogonal_to_rounding(models[1], method)
        return
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", FREE, ids=str)
def test_float32_alone_holds_the_claims_too(method: Constraint) -> None:
    stiefel.use_double("never")
    try:
        model = stiefel.constrain(net("cuda"), method)
        Training(model, "cuda").steps(10)
        assert orthogonal_to_rounding(model, method)
    finally:
        stiefel.use_double("auto")


@pytest.mark.parametrize("method", [m for m in stiefel.available() if m != "torch_orthogonal"])  # not ours: twice more
def test_the_peak_of_memory_is_within_the_budget(method: str) -> None:
    """What docs/budget.md counts on a CPU, with room for what kernels need besides."""
    p, n = budget.SHAPES[1]
    step = budget.training(method, 16 * p, 16 * n, "cuda")
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    taken = (torch.cuda.max_memory_allocated() - before) / (4 * budget.MEMBERS * 256 * p * n)
    assert taken <= 2 * budget.budget(method, p, n).peak + 4


@pytest.mark.parametrize("method", [m for m in stiefel.available() if m not in WAITING])
def test_the_kernels_of_a_step_are_within_the_budget(method: str) -> None:
    """An operation that docs/budget.md counts is a kernel, or a few where cuBLAS splits a sum."""
    for p, n in budget.SHAPES:
        assert 0 < budget.kernels(method, p, n) <= 1.5 * budget.budget(method, p, n).launches + 20


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # advice for other products
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # which the compiler of torch 2.11 reads
@pytest.mark.parametrize("method", ["own", "riemannian", "pogo", "soft"])
def test_a_compiled_model_trains_as_it_does_without(method: str) -> None:
    models = [stiefel.constrain(net("cuda"), method) for _ in range(2)]
    for model, forward in zip(models, (models[0], torch.compile(models[1])), strict=True):
        training = Training(model, "cuda")
        training.model = forward
        training.steps(3)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
