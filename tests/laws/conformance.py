"""What every method must do, as checks that take a constraint: the catalogue's, a user's own, or a broken one.

A check raises AssertionError (or lets the method's own error out) where the method fails it. It names no method: where
methods differ, they say so themselves (``claim``, ``coefficients``, ``real_only``, ``step_length``, ``thin``, ...).
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import pytest
import scipy.linalg
import torch
from common import Largest, forms
from common import on_common_set as common
from fixed_points import bases, departure
from torch import Tensor, nn

import stiefel
from stiefel.attach.weights import constrained_weights
from stiefel.constraint import ROUNDING, Constraint, ManifoldMethod, Penalty, Reparameterization
from stiefel.errors import LayoutError
from stiefel.layout import Layout

CPU = torch.device("cpu")


def alone(dtype: torch.dtype) -> float:
    """How far a weight may move otherwise in a batch than alone: by some roundings.

    In double by more than that, since torch.matrix_exp chooses its series by the batch's norms, and differs from
    scipy's by up to 1e-12.
    """
    return 1e-10 if dtype in (torch.float64, torch.complex128) else 1e-5


# --- what the checks train: weights of every layout, pulled towards targets ---


class Zoo(nn.Module):
    """A weight of every layout; complex models have those whose layers torch has in complex."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.wide, self.tall, self.square = nn.Linear(9, 4), nn.Linear(4, 9), nn.Linear(5, 5)
        self.row, self.column = nn.Linear(7, 1), nn.Linear(1, 7)
        self.conv1, self.conv2, self.conv3 = nn.Conv1d(3, 4, 3), nn.Conv2d(2, 6, 3), nn.Conv3d(2, 3, 2)
        self.grouped, self.depthwise = nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(4, 8, 3, groups=4)
        self.up1, self.up2 = nn.ConvTranspose1d(4, 3, 3), nn.ConvTranspose2d(4, 6, 2, groups=2)
        self.up3 = nn.ConvTranspose3d(3, 2, 2)
        self.split = nn.Linear(5, 6)
        self.batch = nn.Parameter(torch.randn(3, 2, 5))
        if not dtype.is_complex:
            self.rnn, self.lstm, self.gru = nn.RNN(3, 4), nn.LSTM(3, 4), nn.GRU(3, 4)
            self.attention = nn.MultiheadAttention(6, 2)
        self.to(device, dtype)
        with torch.no_grad():  # real initial values would stay in the real subspace of a complex weight
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, dtype=p.dtype, device=device) / max(p.shape[-1], 1) ** 0.5)

    def outputs(self) -> dict[str, Tensor]:
        """What each layer computes from a fixed input."""

        def values(*shape: int) -> Tensor:
            return gaussian(self.batch.detach().new_empty(shape), 11)

        found = {}
        for name, layer in self.named_children():
            if isinstance(layer, nn.Linear):
                found[name] = layer(values(2, layer.in_features))
            elif isinstance(layer, nn.RNNBase):
                found[name] = layer(values(3, 2, layer.input_size))[0]
            elif isinstance(layer, nn.MultiheadAttention):
                found[name] = layer(*[values(3, 2, layer.embed_dim)] * 3)[0]
            elif hasattr(layer, "in_channels"):
                found[name] = layer(values(2, layer.in_channels, *[5] * len(layer.kernel_size)))
        return found


PACKED = ["rnn.weight_hh_l0", "lstm.weight_hh_l0", "gru.weight_hh_l0", "attention.in_proj_weight"]


def zoo(method: Constraint, dtype: torch.dtype, device: torch.device = CPU, seed: int = 0) -> Zoo:
    """A constrained zoo, one layer in groups of rows: every weight that the method does not refuse by LayoutError."""
    model = Zoo(dtype, device, seed)
    names = [name for name, layer in model.named_children() if hasattr(layer, "weight")] + ["batch"]
    for name in names + (PACKED if hasattr(model, "lstm") else []):
        try:
            stiefel.constrain(model, replace(method, group_size=3) if name == "split" else method, layers=name)
        except LayoutError:
            assert type(method).check is not Constraint.check, f"{name}: refused without a declared reason"
    assert len(list(constrained_weights(model))) >= 8
    return model


def line(method: Constraint, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A module of bare parameters a, b, … of these shapes, constrained."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Module()
    for name, shape in zip("abcdef", shapes, strict=False):
        setattr(model, name, nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)))
    return stiefel.constrain(model, method, layers=list("abcdef"[: len(shapes)]))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {w.name: w.value for w in constrained_weights(model)}


def gaussian(like: Tensor, seed: int) -> Tensor:
    return _gaussian(tuple(like.shape), like.dtype, seed).to(like.device).clone()


@cache
def _gaussian(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pull(model: nn.Module, names: list[str] | None = None, seed: int = 7) -> Tensor:
    """``Σ ½ |W − T|² / entries`` with fixed targets T, over the constrained weights: a loss that needs no forward."""
    terms = []
    for k, (name, w) in enumerate(weights(model).items()):
        if names is None or name in names:
            target = gaussian(w, seed + k)
            terms.append((w - target).abs().square().mean() / 2)
    return torch.stack(terms).sum()


def optimizer(model: nn.Module, name: str, lr: float, **hyper: float) -> torch.optim.Optimizer:
    """SGD with momentum, Adam, or AdamW with decay; where the method cannot have one (geoopt's), SGD."""
    usual = {"SGD": {"momentum": 0.9}, "Adam": {}, "AdamW": {"weight_decay": 0.1}}[name]
    try:
        return stiefel.optimizer(model, getattr(torch.optim, name), lr=lr, **(usual | hyper))
    except stiefel.OptimizerError:
        assert any(isinstance(w.binding.constraint, ManifoldMethod) for w in constrained_weights(model))
        return stiefel.optimizer(model, torch.optim.SGD, lr=lr, momentum=0.9)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, *, unit: bool = False) -> Iterator[int]:
    """Train on :func:`pull`; ``unit`` normalizes each gradient."""
    for step in range(count):
        torch.default_generator.manual_seed(step)  # for methods that draw, as for dropout
        optimizer.zero_grad()
        (pull(model) + stiefel.penalty(model)).backward()
        if unit:
            for p in model.parameters():
                if p.grad is not None:
                    p.grad /= p.grad.norm().clamp_min(1e-30)
        optimizer.step()
        yield step


def train(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in steps(model, optimizer, count):
        pass


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def polar_factor(x: Tensor) -> Tensor:
    """By scipy, matrix by matrix."""
    return torch.stack([torch.from_numpy(scipy.linalg.polar(m.numpy())[0]) for m in x.cpu()]).to(x)


# --- the checks ---


def check_start(method: Constraint, dtype: torch.dtype, device: torch.device) -> None:
    """Training starts at the declared nearest point, which is of the set, and the polar factor on the common one."""
    for scale in (1.0, 3.0):
        plain = Zoo(dtype, device)
        for chosen in (method, common(method)):
            model = zoo(replace(chosen, scale=scale), dtype, device)
            for found in constrained_weights(model):
                owner, _, tensor = found.name.rpartition(".")
                given = getattr(plain.get_submodule(owner), tensor).detach()
                layout = found.binding.layout
                x = layout.points(found.value.detach())
                nearest = chosen.nearest(layout.points(given), layout)
                tolerance = 30 * eps(dtype) * max(x.shape)
                assert (x - nearest).abs().max() < tolerance, f"{found.name} does not start at its nearest point"
                if chosen is not method:
                    assert (x - polar_factor(layout.points(given))).abs().max() < tolerance, found.name
            assert stiefel.report(model).worst < ROUNDING * eps(dtype), "starts off the set"
    for value in (0.0, 1.0):  # the nearest point is then one of many
        plain = nn.Sequential(nn.Linear(7, 4), nn.Linear(5, 5), nn.Linear(4, 7)).to(device, dtype)
        for layer in plain:
            nn.init.constant_(layer.weight, value)
        worst = stiefel.report(stiefel.constrain(plain, method)).worst
        assert worst < ROUNDING * eps(dtype), f"starts off the set from weights of {value}"


def check_claim(method: Constraint, dtype: torch.dtype, device: torch.device) -> None:
    """As orthogonal as claimed during 60 steps of SGD with momentum, Adam and AdamW with decay, at the rates named.

    test_endurance.py takes 500 of them, and 100,000.
    """
    claim = method.claim
    for name in ("SGD", "Adam", "AdamW"):
        edges = {lr for lr in claim.rates if 0 < lr < math.inf} if claim is not None else set()
        for lr in sorted({1e-6, 0.05, 1e3, 1e6} | edges):
            outside = claim is not None and not claim.rates[0] <= lr <= claim.rates[1]
            if (claim is None and lr > 0.05) or outside:
                continue
            if claim is not None and claim.optimizers and name not in claim.optimizers:
                continue
            model = line(method, (2, 3, 7), (5, 5), (1, 4), dtype=dtype).to(device)
            count = 60 if lr == 0.05 else 20
            for step in steps(model, optimizer(model, name, lr), count, unit=True):
                if step % 10 == 9 or step < 3:
                    for found in constrained_weights(model):
                        error, where = found.residual(), f"at step {step} of {name}, rate {lr:g}"
                        assert error == error, f"NaN {where}"
                        assert found.allows(error), f"error {error:.1e} {where}"


def check_descent(method: Constraint, dtype: torch.dtype, device: torch.device) -> None:
    """Small steps lower the loss, in every layout and with every optimizer, and every weight moves."""
    for name, lr in (("SGD", 0.02), ("Adam", 0.01), ("AdamW", 0.01)):
        model = zoo(method, dtype, device)
        before, start = pull(model).item(), {k: w.detach().clone() for k, w in weights(model).items()}
        train(model, optimizer(model, name, lr), 15)
        assert pull(model).item() < before - 1e-3 * abs(before), f"{name} does not lower the loss"
        for key, w in weights(model).items():
            layout = next(f.binding.layout for f in constrained_weights(model) if f.name == key)
            if layout.matrix_shape[1:] != (1, 1):
                assert not torch.equal(w, start[key]), f"{key} has not moved under {name}"
        for found in constrained_weights(model):
            assert found.allows(error := found.residual()), f"{found.name} is off its claim by {error:.1e} under {name}"


def check_law(method: Constraint, dtype: torch.dtype, device: torch.device) -> None:
    """One small SGD step moves the weight by the declared (a, b), the same at every scale.

    Methods without such a law (penalties, controls, normalized steps) move it as far at every scale.
    """
    chosen, lr = common(method), 1e-6
    excused = method.claim is None or method.step_length or method.caveat or _counts(method)
    assert method.coefficients is not None or excused, "declares no (a, b), and no reason to have none"
    double = torch.complex128 if dtype.is_complex else torch.float64
    for shape in ((3, 8), (4, 4), (1, 5), (2, 2, 6), (7, 3)):
        moves = []
        for scale in (0.5, 1.0, math.sqrt(2), 3.0):
            model = nn.Linear(*reversed(shape), dtype=double) if len(shape) == 2 else None
            if model is None:
                model = line(replace(chosen, scale=scale), shape, dtype=double)
            else:
                with torch.no_grad():
                    model.weight.copy_(gaussian(model.weight, 3))
                stiefel.constrain(model, replace(chosen, scale=scale))
            (found,) = constrained_weights(model)
            before, g, layout = found.value.detach().clone(), gaussian(found.value, 5), found.binding.layout
            torch.manual_seed(0)
            # The gradient of Re⟨G, W⟩ is G in torch's convention for complex numbers too.
            loss = (found.value * g.conj()).real.sum() + stiefel.penalty(model)
            loss.backward()
            stiefel.optimizer(model, torch.optim.SGD, lr=lr).step()
            moves.append((found.value.detach() - before) / lr)
            if method.coefficients is None:
                continue
            a, b = chosen.coefficients
            x, g = layout.points(before), layout.matrices(g)
            gx = g @ x.mH
            expected = -(a * (gx - gx.mH) / 2 @ x + b * (g - gx @ x))
            error = torch.linalg.norm(layout.matrices(moves[-1]) - expected)
            size = torch.linalg.norm(g)
            assert error < 1e-4 * size, f"{shape} at scale {scale:g}: off the (a, b) law by {error / size:.1e}"
        for move in moves[1:]:
            difference = torch.linalg.norm(move - moves[0]) / torch.linalg.norm(moves[0])
            assert difference < 1e-3 or torch.linalg.norm(moves[0]) < 1e-6, f"{shape}: depends on the scale"


def check_gradient(method: Constraint, dtype: torch.dtype, device: torch.device) -> None:
    """Gradients are finite and exact: through reparameterizations at the start and away from it, and of penalties."""
    double = torch.complex128 if dtype.is_complex else torch.float64
    for shape in ((2, 5), (3, 3), (1, 4)):
        for seed in (0, 1):
            layout = Layout(shape)
            v = gaussian(torch.empty(1, *shape, dtype=double), seed)
            start = method.nearest(v, layout)
            if isinstance(method, Penalty):
                points = {"start": start, "generic": v}
                for where, x in points.items():
                    x = x.clone().requires_grad_()
                    (g,) = torch.autograd.grad(method.penalty(x, layout).sum(), x)
                    assert torch.isfinite(g).all(), f"penalty's gradient at the {where} point of {shape}"
                    if where == "start":
                        assert g.abs().max() < 1e-6, f"the penalty pulls at a point of its set, {shape}"
                    else:
                        slope = directional(lambda x, layout=layout: method.penalty(x, layout).sum(), x)
                        d = gaussian(x, 9)
                        assert abs(slope - (g.conj() * d).real.sum()) < 1e-3 * abs(slope) + 1e-6, "penalty's gradient"
                        smaller = method.penalty(x - 1e-3 * g / g.abs().max(), layout).sum()
                        assert smaller < method.penalty(x, layout).sum(), "the penalty's gradient does not descend"
            if isinstance(method, Reparameterization):
                proxy, parts = method.start(start, layout)
                x = proxy.clone().requires_grad_()
                (g,) = torch.autograd.grad(method.forward(x, layout, **parts).abs().square().sum(), x)
                assert torch.isfinite(g).all(), f"gradient at the start, {shape}"
                away = (proxy + 0.3 * gaussian(proxy, seed + 20)).requires_grad_()
                forward = lambda v: method.forward(v, layout, **parts)  # noqa: E731, B023
                assert torch.autograd.gradcheck(forward, (away,), atol=1e-6, rtol=1e-4), f"gradcheck, {shape}"
    if isinstance(method, Penalty):
        penalty_pulls(method, double)
    if isinstance(method, Reparameterization):
        model = zoo(method, dtype, device)
        pull(model).backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters()), "gradient at the start"


def penalty_pulls(method: Penalty, dtype: torch.dtype) -> None:
    """A batch's penalties are those of its matrices alone, and pull a weight back with a strength to notice."""
    layout, x = Layout((2, 5)), gaussian(torch.empty(3, 2, 5, dtype=dtype), 4)
    alone = torch.cat([method.penalty(m[None], layout) for m in x])
    assert torch.allclose(method.penalty(x, layout), alone), "a batch is not the sum of its matrices"
    model = line(method, (2, 5), dtype=dtype)
    (found,) = constrained_weights(model)
    with torch.no_grad():
        found.parameter.mul_(1.2)
    before, optimizer = found.residual(), stiefel.optimizer(model, torch.optim.SGD, lr=0.3)
    for _ in range(100):
        optimizer.zero_grad()
        (stiefel.penalty(model) + 0 * pull(model)).backward()
        optimizer.step()
    assert found.residual() < before / 2, "the penalty does not pull the weight back"


def directional(f: Callable[[Tensor], Tensor], x: Tensor, h: float = 1e-6) -> Tensor:
    d = gaussian(x, 9)
    with torch.no_grad():
        return (f(x + h * d) - f(x - h * d)) / (2 * h)


def check_fixed_points(method: Constraint, dtype: torch.dtype, device: torch.device) -> None:
    """A weight at a solution stays there under optimizers with momentum, second moments and decay of either kind.

    ``tests/laws/test_fixed_points.py`` has the whole law. Here the rest that own leaves, of Adam's kind, is a constant.
    """
    if method.claim is None and method.coefficients is None:
        return
    for cls, hyper in bases():
        forms = [{"momentum": 0.9}, {}] if cls in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW) else []
        if hyper not in forms:
            continue
        try:
            decay = 0.1 if cls is not torch.optim.SGD else 5e-3
            gap = departure(method, cls, {**hyper, "weight_decay": decay}, 15, device=device.type)
        except stiefel.OptimizerError:  # geoopt's has two classes only
            assert isinstance(method, ManifoldMethod)
            continue
        limit = 1e-10 if method.lifts or cls is torch.optim.SGD else 1e-2 if method.caveat else 1e-3
        assert gap < limit, f"{cls.__name__} {hyper} takes it {gap:.1e} away from a solution"


def check_late_gradient(method: Constraint, dtype: torch.dtype, device: torch.device) -> None:
    """A weight without a gradient stays, bit for bit; when its first gradient comes it moves as if it were alone."""
    shapes = ((3, 7), (3, 7))
    for name in ("SGD", "Adam", "AdamW"):
        both, single = line(method, *shapes, dtype=dtype).to(device), line(method, *shapes, dtype=dtype).to(device)
        one, two = optimizer(both, name, 0.05), optimizer(single, name, 0.05)
        start = weights(both)["b"].detach().clone()
        late, alone_late = (next(f for f in constrained_weights(m) if f.name == "b").binding for m in (both, single))
        for step in range(8):
            if step == 4:  # steps that a method counts are the optimizer's, also those without a gradient
                alone_late.tally.steps = late.tally.steps
            for model, opt, names in ((both, one, ["a"]), (single, two, [])):
                opt.zero_grad(set_to_none=True)
                used = [*names, "b"] if step >= 4 else names
                if used:
                    torch.manual_seed(step)
                    pull(model, used).backward()
                    opt.step()
            if step < 4:
                assert torch.equal(weights(both)["b"], start), f"moved without a gradient under {name}"
        assert not torch.equal(weights(both)["b"], start)
        difference = (weights(both)["b"] - weights(single)["b"]).abs().max()
        assert difference < alone(dtype), f"depends on the other ({name})"


def _counts(method: Constraint) -> bool:
    """Whether a step depends on how many were taken, as that of a method that draws does."""
    return getattr(method, "counts", False)


def check_groups(method: Constraint, dtype: torch.dtype, device: torch.device) -> None:
    """Parameter groups with different rates: each weight moves as it does alone at its rate, not as the other."""
    for name in ("SGD", "Adam"):
        model = line(method, (3, 7), (3, 7), dtype=dtype).to(device)
        params = {f.name: f.parameter for f in constrained_weights(model)}
        own = [[p for n, p in model.named_parameters() if (f".{k}." in f".{n}.")] for k in params]
        hyper = {"momentum": 0.9} if name == "SGD" else {}
        groups = [{"params": own[0], "lr": 0.1}, {"params": own[1], "lr": 0.001}]
        together = stiefel.optimizer(model, getattr(torch.optim, name), groups, lr=0.5, **hyper)
        train(model, together, 4)
        start = weights(line(method, (3, 7), (3, 7), dtype=dtype))
        moved = {k: (w - start[k]).abs().max().item() for k, w in weights(model).items()}
        assert min(moved.values()) > 1e-6, f"a group does not move: {moved}"
        for key, lr in (("a", 0.1), ("b", 0.001)):
            single = line(method, (3, 7), (3, 7), dtype=dtype).to(device)
            train(single, stiefel.optimizer(single, getattr(torch.optim, name), lr=lr, **hyper), 4)
            difference = (weights(single)[key] - weights(model)[key]).abs().max()
            assert difference < alone(dtype), f"{key} at rate {lr:g} moves otherwise in a group"


def check_momentum(method: Constraint, dtype: torch.dtype, device: torch.device) -> None:
    """The base optimizer's momentum arrives: after its gradient has vanished, the weight goes on moving."""
    model = line(method, (3, 7), dtype=dtype).to(device)
    opt = stiefel.optimizer(model, torch.optim.SGD, lr=0.01, momentum=0.9)
    train(model, opt, 3)
    (found,) = constrained_weights(model)
    before = found.value.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    torch.manual_seed(0)
    opt.step()
    first = (found.value - before).norm()
    assert first > 1e-3, "momentum is lost"


def check_copy(method: Constraint, dtype: torch.dtype, device: torch.device) -> None:
    """A deep copy is another model, which trains as the original does."""
    model = zoo(method, dtype, device)
    train(model, optimizer(model, "SGD", 0.02), 3)
    twin = copy.deepcopy(model)
    kept = {k: w.detach().clone() for k, w in weights(model).items()}
    train(twin, optimizer(twin, "SGD", 0.02), 3)
    assert all(torch.equal(w, kept[k]) for k, w in weights(model).items()), "training a copy moved the original"
    train(model, optimizer(model, "SGD", 0.02), 3)
    assert all(torch.equal(w, weights(twin)[k]) for k, w in weights(model).items()), "a copy trains otherwise"


def check_resume(method: Constraint, dtype: torch.dtype, device: torch.device) -> None:
    """State dicts of module and optimizer continue a run bit for bit."""
    for name in ("SGD", "Adam"):
        model = zoo(method, dtype, device)
        opt = optimizer(model, name, 0.02)
        train(model, opt, 3)
        saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
        train(model, opt, 3)
        other = zoo(method, dtype, device, seed=5)
        resumed = optimizer(other, name, 0.02)
        other.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        train(other, resumed, 3)
        assert list(other.state_dict()) == list(model.state_dict())
        for key, value in model.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), f"{key} differs after resuming {name}"


def check_release(method: Constraint, dtype: torch.dtype, device: torch.device) -> None:
    """Release leaves the same function in ordinary modules, of ordinary parameters under their old names."""
    plain, model = Zoo(dtype, device), zoo(method, dtype, device)
    train(model, optimizer(model, "SGD", 0.02), 3)
    kept = {k: w.detach().clone() for k, w in weights(model).items()}
    computed = model.outputs()
    stiefel.release(model)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert {n for n, _ in model.named_buffers()} == {n for n, _ in plain.named_buffers()}
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert all(type(a) is type(b) for a, b in zip(model.children(), plain.children(), strict=True))
    for key, value in kept.items():
        assert torch.equal(model.get_parameter(key), value), f"{key} changed by release"
    for key, value in model.outputs().items():
        assert torch.equal(value, computed[key]), f"{key} computes something else after release"
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def check_seed(method: Constraint, dtype: torch.dtype, device: torch.device) -> None:
    """Same seed, same result, bit for bit."""
    results = []
    for _ in range(2):
        model = zoo(method, dtype, device)
        train(model, optimizer(model, "Adam", 0.02), 5)
        results.append(weights(model))
    assert all(torch.equal(w, results[1][k]) for k, w in results[0].items())


def _repeat(opt: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        opt.step()


def check_divergence(method: Constraint, dtype: torch.dtype, device: torch.device) -> None:
    """A NaN in the loss is told, by name, and no weight is ruined; by copies and pickles of model and optimizer too.

    On an accelerator, where the host does not wait for numbers, it is told in one of the steps that follow.
    """
    model = line(method, (3, 7), (5, 5), dtype=dtype).to(device)
    opt = stiefel.optimizer(model, torch.optim.SGD, lr=0.01, momentum=0.9)
    train(model, opt, 2)
    pairs = [(model, opt), copy.deepcopy((model, opt)), copy.deepcopy(copy.deepcopy((model, opt)))]
    if not isinstance(method, Reparameterization):  # torch pickles no parametrized module
        pairs.append(pickle.loads(pickle.dumps((model, opt))))
    for model, opt in pairs:
        kept = {k: w.detach().clone() for k, w in weights(model).items()}
        opt.zero_grad()
        (pull(model) * float("nan")).backward()
        with pytest.raises(stiefel.DivergenceError, match=r"'a'.*NaN"):
            _repeat(opt, 1 if device.type == "cpu" else 1000)
        if device.type != "cpu":
            continue
        assert all(torch.equal(w, kept[k]) for k, w in weights(model).items())
        opt.zero_grad()
        steps = next(constrained_weights(model)).binding.tally.steps
        pull(model).backward()
        opt.step()
        assert next(constrained_weights(model)).binding.tally.steps == steps + 1, "a copy counts no steps"


def check_memory(method: Constraint, dtype: torch.dtype, device: torch.device) -> None:
    """Nothing n×n is built for a thin matrix, in forward, backward or step; methods that do say so."""
    p, n = 3, 400
    model = line(method, (p, n), dtype=dtype).to(device)
    opt = stiefel.optimizer(model, torch.optim.SGD, lr=0.01)
    with Largest() as seen:
        loss = pull(model) + stiefel.penalty(model)
        loss.backward()
        opt.step()
    built = seen.entries >= n * n / 4
    assert built != method.thin, (
        f"the largest tensor has {seen.entries} entries, a weight {p * n}, and thin={method.thin}"
    )


CHECKS: dict[str, Callable[[Constraint, torch.dtype, torch.device], None]] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}


def variants(name: str) -> list[Constraint]:
    """The forms of a method, a penalty's decoupled one among them."""
    found = forms(name)
    return [*found, replace(found[0], decoupled=True)] if isinstance(found[0], Penalty) else found


def claimed() -> list[Constraint]:
    """The forms of all methods that claim to hold a weight on its set."""
    return [m for name in stiefel.available() for m in variants(name) if m.claim is not None]


def solving() -> list[Constraint]:
    """Those, and the forms that hold no weight on its set but have the solutions of the set: they say how they move."""
    found = [m for name in stiefel.available() for m in variants(name)]
    return [m for m in found if m.claim is not None or m.coefficients is not None]


def run(method: Constraint, check: str, dtype: torch.dtype, device: torch.device = CPU) -> None:
    """One check."""
    CHECKS[check](method, dtype, device)
