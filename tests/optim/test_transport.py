"""A momentum that moves with the weight: tangent at the new point, in the base optimizer's own tensor.

sym(M W_newᵀ) = 0 after each step, for each M that is the direction of the next one, of every method that transports
"""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import conformance
import pytest
import torch
from common import forms
from fixed_points import bases
from torch import Tensor, nn

import stiefel
from stiefel.attach.weights import constrained_weights
from stiefel.constraint import Claim, TransportMethod
from stiefel.linalg import nearest_in_step, sym
from stiefel.manifold.geometry import project_tangent
from stiefel.optim.bases import MOMENTUM, momentum_of

METHODS = [f for name in stiefel.available() for f in forms(name) if isinstance(f, TransportMethod)]
BASES = [(cls, hyper) for cls, hyper in bases() if cls.__name__ not in ("Rprop", "Muon")]


def normal_parts(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The part of each weight's momentum that is normal to its set, relatively."""
    found = {}
    for w in constrained_weights(model):
        kept = momentum_of(optimizer.state.get(w.parameter, {}), w.parameter)
        if kept is not None:
            layout = w.binding.layout
            x = layout.points(w.value.detach())
            m = layout.matrices(kept.to(x))
            found[w.name] = float(sym(m @ x.mH).norm() / m.norm())
    return found


@pytest.mark.sampled(3, values=False)
@pytest.mark.parametrize(("cls", "hyper"), BASES, ids=lambda v: v.__name__ if isinstance(v, type) else "-".join(v))
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_momenta_are_tangent_where_the_weight_is(
    method: stiefel.Constraint, cls: type[torch.optim.Optimizer], hyper: dict[str, Any]
) -> None:
    """In every layout, under every base that has one."""
    for scale in (1.0, 3.0):
        model = conformance.zoo(conformance.replace(method, scale=scale), torch.float64)
        optimizer = stiefel.optimizer(model, cls, lr=0.05, **hyper)
        for step in range(4):
            conformance.train(model, optimizer, 1)
            parts = normal_parts(model, optimizer)
            assert bool(parts) == ("momentum" in hyper)
            assert all(part < 1e-12 for part in parts.values()), (step, parts)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_complex_momenta_and_those_of_muon(method: stiefel.Constraint) -> None:
    model = conformance.line(method, (3, 7), (4, 4), (2, 3, 5), dtype=torch.complex128)
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.05, momentum=0.9)
    conformance.train(model, optimizer, 3)
    assert len(parts := normal_parts(model, optimizer)) == 3
    assert all(part < 1e-12 for part in parts.values())
    if hasattr(torch.optim, "Muon"):
        model = conformance.line(method, (3, 7), (4, 4))
        optimizer = stiefel.optimizer(model, torch.optim.Muon, lr=0.05)
        conformance.train(model, optimizer, 3)
        assert len(parts := normal_parts(model, optimizer)) == 2
        assert all(part < 1e-12 for part in parts.values())


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.NAdam, torch.optim.Adamax])
def test_a_step_of_adams_kind_is_no_longer_than_lr(
    cls: type[torch.optim.Optimizer], method: stiefel.Constraint
) -> None:
    """|m̂| ≤ c √v̂ in every entry, from the first steps on: transported means were up to 60 times that."""
    model = conformance.zoo(method, torch.float64)
    optimizer = stiefel.optimizer(model, cls, lr=0.01)
    seen: list[float] = []
    step = optimizer._base_step  # type: ignore[attr-defined]

    def measured() -> None:
        step()  # from 0: what is left there is the displacement
        seen.extend(float(w.parameter.detach().abs().max()) for w in constrained_weights(model))

    optimizer._base_step = measured  # type: ignore[attr-defined]
    conformance.train(model, optimizer, 8)
    assert len(seen) > 80
    assert 0.005 < max(seen) < 0.02


@dataclass(frozen=True, kw_only=True)
class Reversed(TransportMethod):
    """Transports by a change of sign, so that one transport more or less shows."""

    name, summary, reference = "test_reversed", "changes the momentum's sign", "none"
    claim = Claim()

    def step(self, x: Tensor, displacement: Tensor, lr: float) -> Tensor:
        return nearest_in_step(x + displacement)

    def transport(self, x: Tensor, moved: Tensor, momentum: Tensor) -> Tensor:
        return -momentum


def test_a_momentum_is_transported_once_and_nothing_else() -> None:
    """SGD: m ← −(μ m + P(G)), in one tensor; the state has torch's names. Of Adam: nothing."""
    model = conformance.line(Reversed(), (3, 7))
    (w,) = constrained_weights(model)
    for cls, hyper in ((torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adam, {})):
        optimizer = stiefel.optimizer(model, cls, lr=0.01, **hyper)
        m = mean = torch.zeros(3, 7, dtype=torch.float64)
        places = set()
        for step in range(5):
            g = conformance.gaussian(w.parameter, step)
            t = project_tangent(w.value.detach()[None], g[None])[0]
            m, mean = -(0.9 * m + t) if step else -t, 0.9 * mean + 0.1 * t
            w.parameter.grad = g
            optimizer.step()
            state = optimizer.state[w.parameter]
            kept = state[MOMENTUM] if hyper else state["exp_avg"]
            torch.testing.assert_close(kept, m if hyper else mean, rtol=1e-12, atol=1e-14)
            places.add(kept.data_ptr())
        assert len(places) == 1
        assert set(state) == ({MOMENTUM} if hyper else {"step", "exp_avg", "exp_avg_sq"})


def test_weights_of_one_batch_may_have_a_momentum_or_none() -> None:
    """Two groups of one rate are stepped as one batch, whatever their other settings."""
    shapes = ((3, 7), (3, 7), (3, 7))
    together, found = conformance.line(Reversed(), *shapes), []
    params = list(together.parameters())
    groups = [{"params": [p], "momentum": mu} for p, mu in zip(params, (0.9, 0.0, 0.5), strict=True)]
    optimizer = stiefel.optimizer(together, torch.optim.SGD, groups, lr=0.1)
    conformance.train(together, optimizer, 4)
    for i, mu in enumerate((0.9, 0.0, 0.5)):
        alone = conformance.line(Reversed(), *shapes)
        conformance.train(alone, stiefel.optimizer(alone, torch.optim.SGD, lr=0.1, momentum=mu), 4)
        found.append((list(alone.parameters())[i] - params[i]).abs().max())
    assert max(found) < 1e-14


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_of_subspaces_momenta_are_horizontal(method: stiefel.Constraint) -> None:
    model = conformance.line(conformance.replace(method, subspace=True), (3, 7), (2, 3, 5))
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.1, momentum=0.9)
    for step in range(4):
        optimizer.zero_grad()
        loss = sum(
            (conformance.gaussian(w.mT @ w, step) * (w.mT @ w)).sum() for w in conformance.weights(model).values()
        )
        loss.backward()
        optimizer.step()
        for w in constrained_weights(model):
            m = optimizer.state[w.parameter][MOMENTUM]
            assert m.norm() > 1e-3
            assert (m @ w.value.detach().mT).norm() < 1e-12 * m.norm()


class Narrow(torch.optim.SGD):
    """Keeps its momentum in another precision, under torch's name."""

    seen: ClassVar[list[torch.dtype]] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            kept = state.get(MOMENTUM, torch.zeros_like(p, dtype=torch.bfloat16))
            state[MOMENTUM] = (0.9 * kept.to(p) + p.grad).bfloat16()
            p.add_(state[MOMENTUM].to(p), alpha=-0.1)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_momentum_in_another_precision_stays_in_it(method: stiefel.Constraint) -> None:
    model = conformance.line(method, (3, 7), (3, 7), dtype=torch.float32)
    optimizer = stiefel.optimizer(model, Narrow, lr=0.1)
    conformance.train(model, optimizer, 3)
    assert {s[MOMENTUM].dtype for s in optimizer.state.values()} == {torch.bfloat16}
    assert all(0 < part < 0.02 for part in normal_parts(model, optimizer).values())
    assert stiefel.report(model).worst < 1e-5


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_step_that_is_skipped_transports_nothing(method: stiefel.Constraint) -> None:
    model = conformance.line(method, (3, 7), dtype=torch.float32)
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.01, momentum=0.9, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor in (1.0, float("inf"), 1.0):
        before = copy.deepcopy(optimizer.state_dict()["state"])
        optimizer.zero_grad()
        scaler.scale(factor * conformance.pull(model)).backward()
        scaler.step(optimizer)
        scaler.update()
        now = optimizer.state_dict()["state"]
        assert all(torch.equal(now[i][MOMENTUM], before[i][MOMENTUM]) is (factor == float("inf")) for i in before)


@pytest.mark.parametrize("name", [n for n in stiefel.available() if stiefel.get(n).lifts])
def test_other_methods_leave_the_momentum_to_the_base(name: str) -> None:
    method = stiefel.get(name)
    model = conformance.line(method, (3, 7))
    (w,) = constrained_weights(model)
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.1, momentum=0.9)
    g = conformance.gaussian(w.parameter, 1)
    t = project_tangent(w.value.detach()[None], g[None])[0]
    w.parameter.grad = g
    optimizer.step()
    kept = optimizer.state[w.parameter][MOMENTUM]
    assert torch.allclose(kept, t, rtol=0, atol=1e-12) is not isinstance(method, TransportMethod)
