"""Dynamic trivializations: after every K steps the start of the map moves to the weight, and the weight stays."""

from __future__ import annotations

import copy
import io
import multiprocessing
from collections.abc import Callable
from typing import Any

import pytest
import scipy.linalg
import torch
from common import gaussian
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import stiefel
from stiefel.attach.weights import bindings_of, constrained_weights
from stiefel.constraint import Trivialization
from stiefel.layout import Layout
from stiefel.methods import method_class

DYNAMIC = [m for m in stiefel.available() if issubclass(method_class(m), Trivialization)]
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.2}),
    "nesterov": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "Adam": (torch.optim.Adam, {"lr": 0.02}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1}),
}


class Net(nn.Module):
    """A weight of each layout; the two equal layers are computed as one batch."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.a, self.b, self.tall = nn.Linear(8, 5), nn.Linear(8, 5), nn.Linear(3, 7)
        self.conv, self.split = nn.Conv2d(2, 4, 3, groups=2), nn.Linear(6, 6)
        self.free = nn.Linear(4, 4)
        self.to(dtype)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(gaussian(*p.shape, seed=i, dtype=dtype))

    def forward(self, name: str) -> Tensor:
        return getattr(self, name).weight


HELD = ("a", "b", "tall", "conv", "split")


def net(method: str, dtype: torch.dtype = torch.float64, **options: Any) -> Net:
    model = Net(dtype)
    stiefel.constrain(model, method, layers="split", group_size=3, **options)
    return stiefel.constrain(model, method, layers=[n for n in HELD if n != "split"], **options)


def loss(model: Net, names: tuple[str, ...] = HELD, targets: dict[str, Tensor] | None = None) -> Tensor:
    """Linear and quadratic in each weight; as a function of W, the same for every method."""
    found = []
    for name in names:
        w, t = getattr(model, name).weight, (targets or targets_of(model))[name]
        found.append((w * t.conj()).real.mean() + (w * t).abs().square().mean())
    return torch.stack(found).sum()


def targets_of(model: Net) -> dict[str, Tensor]:
    weights = [(name, getattr(model, name).weight) for name in HELD]
    return {name: gaussian(*w.shape, seed=50 + i, dtype=w.dtype) for i, (name, w) in enumerate(weights)}


def train(model: Net, optimizer: torch.optim.Optimizer, steps: int, names: tuple[str, ...] = HELD) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, names).backward()
        optimizer.step()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {w.name: w.value.detach().clone() for w in constrained_weights(model)}


def starts(model: nn.Module) -> list[Tensor]:
    return [b.clone() for name, b in model.named_buffers() if name.endswith(".base")]


def close(one: nn.Module, other: nn.Module, tolerance: float = 1e-12) -> None:
    for (name, a), b in zip(values(one).items(), values(other).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


# --- what it is ---


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("base", BASES)
def test_at_every_step_it_is_the_retraction_of_the_tangent_step(base, scale, dtype):
    """K = 1: moments of any optimizer are then those of a method that retracts, to rounding."""
    one, other = net("cayley", dtype, rebase=1, scale=scale), net("retraction", dtype, map="cayley", scale=scale)
    cls, hyper = BASES[base]
    first, second = stiefel.optimizer(one, cls, **hyper), stiefel.optimizer(other, cls, **hyper)
    for _ in range(20):
        train(one, first, 1), train(other, second, 1)
        close(one, other, 1e-11)


def test_plain_descent_at_every_step_is_by_hand_that_of_the_manifold():
    """W ← s X expm(A), A = XᵀB − BᵀX of B = U(I − ½XᵀX), U = −lr/s P_X(G), by scipy."""
    lr, scale = 0.3, 2.0
    model = nn.Module()
    model.w = nn.Parameter(gaussian(3, 7))
    stiefel.constrain(model, "matrix_exp", layers="w", rebase=1, scale=scale)
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=lr)
    w = model.w.detach().clone()
    for step in range(10):
        g = gaussian(3, 7, seed=step + 1)
        optimizer.zero_grad()
        (model.w * g).sum().backward()
        optimizer.step()
        x = w / scale
        u = -lr / scale * (g - (g @ x.mT + x @ g.mT) / 2 @ x)
        b = u - u @ x.mT @ x / 2
        w = scale * x @ torch.from_numpy(scipy.linalg.expm((x.mT @ b - b.mT @ x).numpy()))
        torch.testing.assert_close(model.w.detach(), w, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("method", DYNAMIC)
def test_the_start_moves_to_the_weight_and_the_weight_stays(method, dtype):
    model, fixed = net(method, dtype, rebase=4, scale=2.0), net(method, dtype, scale=2.0)
    first, second = (stiefel.optimizer(m, torch.optim.SGD, lr=0.1) for m in (model, fixed))
    before = starts(model)
    train(model, first, 3), train(fixed, second, 3)
    assert all(map(torch.equal, starts(model), before))
    assert all(torch.equal(a, b) for a, b in zip(values(model).values(), values(fixed).values(), strict=True))
    train(model, first, 1), train(fixed, second, 1)
    rounding = 30 * torch.finfo(dtype).eps
    close(model, fixed, rounding)
    for found in constrained_weights(model):
        layout, base = found.binding.layout, found.parametrization.parts.base
        torch.testing.assert_close(layout.points(found.value), base, rtol=0, atol=rounding)
        assert torch.equal(layout.points(found.parameter), base)  # so that its tangent part is rounding
    assert not any(map(torch.equal, starts(model), before))
    assert stiefel.report(model).worst < 1e-6


@pytest.mark.parametrize("method", DYNAMIC)
def test_nothing_moves_without_the_option(method):
    model = net(method)
    before, optimizer = starts(model), stiefel.optimizer(model, torch.optim.Adam, lr=0.1)
    train(model, optimizer, 5)
    assert all(map(torch.equal, starts(model), before))
    assert all("steps_taken" not in s for s in optimizer.state_dict()["state"].values())


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "10"])
def test_a_value_that_is_no_count_is_refused(value):
    with pytest.raises(stiefel.OptionError, match=r"rebase=.*positive whole number of steps, or None"):
        stiefel.get("cayley", rebase=value)


@pytest.mark.parametrize("options", [{"scale": "learnable"}, {"determinant": -1}, {"subspace": True}], ids=str)
@pytest.mark.parametrize("method", DYNAMIC)
def test_with_the_options_of_every_method(method, options):
    shape = (5, 5) if "determinant" in options else (3, 7)
    models = []
    for rebase in (None, 2):
        model = nn.Module()
        model.w = nn.Parameter(gaussian(*shape))
        stiefel.constrain(model, method, layers="w", rebase=rebase, **options)
        optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.02)
        for _ in range(2):
            optimizer.zero_grad()
            (model.w @ gaussian(shape[1], shape[1], seed=2)).square().sum().backward()
            optimizer.step()
        models.append(model)
    close(*models)
    (found,) = constrained_weights(models[1])
    assert found.has_determinant()
    torch.testing.assert_close(found.parametrization.parts.base, found.points(), rtol=0, atol=1e-14)
    if found.gains is not None:
        assert (found.gains - 1).abs().max() > 1e-3


# --- which steps count ---


def test_a_step_without_a_gradient_does_not_count():
    """Every second gradient is of another layer alone: those of ``a`` are counted, and none of its moves is missed."""
    model = net("cayley", rebase=2)
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.1)
    before = model.a.parametrizations.weight[0].parts.base.clone()
    moved = []
    for step in range(8):
        optimizer.zero_grad(set_to_none=True)
        loss(model, ("a", "b") if step % 2 == 0 else ("b",)).backward()
        optimizer.step()
        base = model.a.parametrizations.weight[0].parts.base
        moved.append(not torch.equal(base, before))
        before = base.clone()
    assert moved == [False, False, True, False, False, False, True, False]


def test_a_step_that_a_scaler_skips_does_not_count():
    model = net("cayley", torch.float32, rebase=2)
    for fused in (False, True):
        optimizer = stiefel.optimizer(model, torch.optim.Adam, lr=0.1, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        counted = bindings_of(model.a)["weight"].tally.stepped
        for factor in (1.0, float("inf"), 1.0):
            before = starts(model)
            optimizer.zero_grad()
            scaler.scale(factor * loss(model)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert bindings_of(model.a)["weight"].tally.stepped == counted + 2
        assert not any(map(torch.equal, starts(model), before))


def test_optimizers_of_parts_of_a_model_move_their_own():
    model = net("cayley", rebase=2)
    one = stiefel.optimizer(model, torch.optim.SGD, [*model.a.parameters()], lr=0.1)
    other = stiefel.optimizer(model, torch.optim.Adam, [*model.b.parameters(), *model.conv.parameters()], lr=0.1)
    before = dict(zip(HELD, starts(model), strict=True))
    loss(model).backward()
    one.step(), one.step(), other.step()
    after = dict(zip(HELD, starts(model), strict=True))
    assert [name for name in HELD if not torch.equal(before[name], after[name])] == ["a"]


class Around(torch.optim.Optimizer):
    """An optimizer around another one, as ZeroRedundancyOptimizer is, that changes parameters after the inner step."""

    def __init__(self, params: Any, optimizer_class: type[torch.optim.Optimizer], **hyper: Any) -> None:
        super().__init__(params, {})
        self.optim = optimizer_class(self.param_groups, **hyper)
        self.seen: list[bool] = []

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        before = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        self.optim.step()
        with torch.no_grad():
            for p, q in zip((p for group in self.param_groups for p in group["params"]), before, strict=True):
                p.add_(q, alpha=-1).mul_(0.5).add_(q)  # half of the step


def test_within_another_optimizers_step_no_start_moves():
    model, alone = net("cayley", rebase=2), net("cayley", rebase=2)
    optimizer = stiefel.optimizer(model, Around, optimizer_class=torch.optim.SGD, lr=0.1)
    half = stiefel.optimizer(alone, torch.optim.SGD, lr=0.05)
    train(model, optimizer, 5), train(alone, half, 5)
    close(model, alone)
    for a, b in zip(starts(model), starts(alone), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert bindings_of(model.a)["weight"].tally.stepped == 5


def procrustes(p: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    u, _, vh = torch.linalg.svd(gaussian(p, n, seed=seed), full_matrices=False)
    s = torch.logspace(0, -1, p, dtype=torch.float64)
    return (u * s) @ vh, s.sum()


@pytest.mark.parametrize("method", DYNAMIC)
def test_lbfgs_sees_one_start_in_a_step_and_forgets_the_old_ones(method):
    t, best = procrustes(4, 9, seed=3)
    model = nn.Module()
    model.w = nn.Parameter(gaussian(4, 9, seed=4))
    stiefel.constrain(model, method, layers="w", rebase=1)
    options = {"max_iter": 10, "line_search_fn": "strong_wolfe", "tolerance_grad": 1e-10, "tolerance_change": 0}
    optimizer = stiefel.optimizer(model, torch.optim.LBFGS, **options)
    seen: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = -(model.w * t).sum()
        value.backward()
        seen.extend(starts(model))
        return value

    for _ in range(30):
        seen.clear()
        before = model.w.detach().clone()
        optimizer.step(closure)
        assert all(torch.equal(base, seen[0]) for base in seen)
        moved = not torch.equal(model.w.detach(), before)
        assert not moved or not torch.equal(starts(model)[0], seen[0])
        assert optimizer.state_dict()["state"][0]["n_iter"] == 0  # the next step begins with the gradient
    assert (best - (model.w * t).sum()) / best < 1e-12


def test_a_closure_is_evaluated_with_one_start():
    model, plain = net("cayley", rebase=2), net("cayley", rebase=2)
    one, other = (stiefel.optimizer(m, torch.optim.SGD, lr=0.1) for m in (model, plain))

    def closure() -> Tensor:
        one.zero_grad()
        value = loss(model)
        value.backward()
        return value

    for _ in range(5):
        one.step(closure)
        train(plain, other, 1)
    assert all(torch.equal(a, b) for a, b in zip(values(model).values(), values(plain).values(), strict=True))


# --- copies, checkpoints, caches, compilers ---


@pytest.mark.sampled(3, values=False)
@pytest.mark.parametrize("how", ["state dicts", "weights_only", "objects", "optimizer first"])
@pytest.mark.parametrize("base", ["nesterov", "Adam"])
@pytest.mark.parametrize("method", DYNAMIC)
def test_training_resumes_bit_for_bit_between_two_moves(method, base, how):
    cls, hyper = BASES[base]
    model = net(method, rebase=3)
    optimizer = stiefel.optimizer(model, cls, **hyper)
    train(model, optimizer, 4)
    if how == "objects":
        again, resumed = copy.deepcopy((model, optimizer))
    else:
        again = net(method, rebase=3)
        resumed = stiefel.optimizer(again, cls, **hyper)
        train(again, resumed, 2)
        state = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        if how == "weights_only":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        order = [lambda: again.load_state_dict(state["model"]), lambda: resumed.load_state_dict(state["optimizer"])]
        for load in order if how != "optimizer first" else reversed(order):
            load()
    for each, its in ((model, optimizer), (again, resumed)):
        train(each, its, 4)
    for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_copy_moves_its_own_start():
    model = net("cayley", rebase=1)
    twin = copy.deepcopy(model)
    kept = model.state_dict().values(), [v.clone() for v in model.state_dict().values()]
    train(twin, stiefel.optimizer(twin, torch.optim.SGD, lr=0.1), 2)
    assert all(map(torch.equal, *kept))
    assert not any(map(torch.equal, starts(model), starts(twin)))
    alone = copy.deepcopy(stiefel.optimizer(model, torch.optim.SGD, lr=0.1))  # of parameters without a model
    for p in alone.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    alone.step()
    assert all(map(torch.equal, *kept))


def test_states_load_where_the_start_stays_and_where_it_moves():
    """They are of one map, so that the weight is the same; the start that was saved is not kept."""
    for one, other in ((None, 3), (3, None), (3, 5)):
        source, target = net("cayley", rebase=one), net("cayley", rebase=other)
        train(source, stiefel.optimizer(source, torch.optim.SGD, lr=0.1), 4)
        target.load_state_dict(source.state_dict())
        close(source, target)


def test_a_checkpoint_from_before_the_option_loads_as_it_is():
    source, target = net("cayley"), net("cayley")
    train(source, stiefel.optimizer(source, torch.optim.SGD, lr=0.1), 4)
    state = source.state_dict()
    for facts in (entry["stiefel"] for entry in state._metadata.values() if "stiefel" in entry):
        for of_tensor in facts.values():
            del of_tensor["stepped"]
    target.load_state_dict(state)
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )
    assert bindings_of(target.a)["weight"].tally.stepped == 4


@pytest.mark.parametrize("method", DYNAMIC)
def test_cached_and_prefetched_weights_are_those_of_the_new_start(method):
    model = net(method, rebase=2)
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.1)
    for _ in range(6):
        with torch.no_grad():
            cached = model("a").clone()
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
        with torch.no_grad():
            now = model("a")
            assert not torch.equal(now, cached)
            assert torch.equal(now, dict(values(model))["a.weight"])
        recorded = model("a")  # prefetched with b's, in one batch, by which torch.matrix_exp chooses its series
        torch.testing.assert_close(recorded.detach(), now, rtol=0, atol=1e-11)


def test_weights_of_a_list_and_of_tied_layers():
    model = nn.ModuleDict({"one": nn.Linear(5, 5, bias=False), "two": nn.Linear(5, 5, bias=False)}).double()
    model["two"].weight = model["one"].weight
    stiefel.constrain(model, "cayley", rebase=2)
    rows = nn.ParameterList([gaussian(3, 6, seed=i) for i in range(4)])
    stiefel.constrain(rows, "cayley", rebase=2)
    optimizer = torch.optim.SGD([*model.parameters(), *rows.parameters()], lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        total = sum((w * gaussian(3, 6, seed=9)).sum() for w in rows)
        (total + (model["one"].weight @ model["two"].weight * gaussian(5, 5, seed=8)).sum()).backward()
        optimizer.step()
    assert torch.equal(model["one"].weight, model["two"].weight)
    for found in [*constrained_weights(model), *constrained_weights(rows)]:
        assert found.binding.tally.stepped == 4
        torch.testing.assert_close(found.parametrization.parts.base, found.points(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("method", DYNAMIC)
def test_compiled_models_and_compiled_steps_see_the_new_start(method):
    one, other = net(method, torch.float32, rebase=2), net(method, torch.float32, rebase=2)
    first, second = (stiefel.optimizer(m, torch.optim.SGD, lr=0.1, momentum=0.9) for m in (one, other))
    targets, compiled = targets_of(one), torch.compile(loss, backend="aot_eager", fullgraph=True)

    def step(model: Net, optimizer: torch.optim.Optimizer, f: Callable[..., Tensor]) -> None:
        optimizer.zero_grad()
        f(model, HELD, targets).backward()
        optimizer.step()

    for _ in range(5):
        step(one, first, loss)
        step(other, second, compiled)
    close(one, other, 1e-6)
    whole = torch.compile(step, backend="eager")
    for _ in range(5):
        step(one, first, loss)
        whole(other, second, loss)
    close(one, other, 1e-5)
    assert bindings_of(other.a)["weight"].tally.stepped == 10


def test_a_conversion_keeps_what_moves():
    model = net("cayley", rebase=1)
    before = starts(model)
    model.float()
    train(model, stiefel.optimizer(model, torch.optim.SGD, lr=0.1), 1)
    assert all(
        s.dtype is torch.float32 and not torch.equal(s.double(), b) for s, b in zip(starts(model), before, strict=True)
    )


def test_a_mean_of_proxies_of_moving_starts_is_on_the_set_and_near_the_mean():
    model = net("cayley", rebase=2)
    averaged = AveragedModel(model)
    optimizer, seen = stiefel.optimizer(model, torch.optim.SGD, lr=0.05), []
    for _ in range(6):
        train(model, optimizer, 1)
        averaged.update_parameters(model)
        seen.append(values(model))
    assert stiefel.report(averaged.module).worst < 1e-14
    for name, value in values(averaged.module).items():
        mean = torch.stack([v[name] for v in seen]).mean(0)
        nearest = next(w for w in constrained_weights(model) if w.name == name).binding.nearest(mean)
        way = (seen[-1][name] - seen[0][name]).norm()
        assert (value - nearest).norm() < 0.1 * way


def _stepped_elsewhere(model: Net, told: Any) -> None:
    try:
        train(model, stiefel.optimizer(model, torch.optim.SGD, lr=0.1), 1)
    except stiefel.OptimizerError as error:
        told.put(str(error))
    else:
        told.put("")


def test_memory_that_processes_share_is_refused():
    model = net("cayley", rebase=2)
    model.share_memory()
    with pytest.raises(stiefel.OptimizerError, match=r"'a\.weight' is in memory that processes share"):
        train(model, stiefel.optimizer(model, torch.optim.SGD, lr=0.1), 1)
    fixed = net("cayley")
    fixed.share_memory()
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    process = context.Process(target=_stepped_elsewhere, args=(fixed, told))
    process.start()
    assert told.get(timeout=60) == ""
    process.join()


def test_a_divergence_is_told_by_name():
    model = net("cayley", rebase=1)
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.1)
    kept = values(model)
    (loss(model) * float("nan")).backward()
    with pytest.raises(stiefel.DivergenceError, match=r"'a.weight'.*NaN"):
        optimizer.step()
    assert all(torch.equal(v, kept[name]) for name, v in values(model).items())
    optimizer.zero_grad()
    for found in constrained_weights(model):  # finite gradients, and a proxy that overflows in the step
        found.parameter.grad = torch.full_like(found.parameter, 1e308)
    optimizer.param_groups[0]["lr"] = 100.0
    with pytest.raises(stiefel.DivergenceError, match=r"'a.weight'.*NaN or infinite"):
        optimizer.step(), optimizer.step()


@pytest.mark.parametrize("method", DYNAMIC)
def test_a_method_of_ones_own_that_rotates_gets_it(method):
    """Whatever φ is: the class has the option, and the library asks for no name."""
    cls = method_class(method)
    own = type("Own", (cls,), {"name": f"test_{method}", "__doc__": cls.__doc__})(rebase=1)
    layout = Layout((3, 6))
    assert own.start(gaussian(1, 3, 6), layout)[1].keys() == {"base"}
    model = nn.Linear(6, 3, bias=False).double()
    stiefel.constrain(model, own)
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.1)
    before = starts(model)
    model(gaussian(2, 6)).square().sum().backward()
    optimizer.step()
    assert not any(map(torch.equal, starts(model), before))
