"""torch's L-BFGS under methods that move the weight: the optimum, on the set at every evaluation, and copies."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

import stiefel

METHODS = [m for m in stiefel.available() if not m.startswith("test_")]
MOVED = [m for m in METHODS if stiefel.get(m).moves]
DOUBLE = torch.float64


def problem(method: str, dtype: torch.dtype = DOUBLE) -> tuple[nn.ParameterDict, Tensor, float]:
    """−tr(W A Wᵀ) + ‖b‖², and its optimum."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(12, 12, generator=generator, dtype=dtype)
    a = a + a.mH
    net = nn.ParameterDict(
        {"W": torch.randn(4, 12, generator=generator, dtype=dtype), "b": torch.ones(3, dtype=DOUBLE)}
    )
    stiefel.constrain(net, method, layers=["W"], **type(stiefel.get(method)).comparison)
    return net, a, -float(torch.linalg.eigvalsh(a)[-4:].sum())


def made(net: nn.Module, **hyper: object) -> torch.optim.Optimizer:
    options = {
        "line_search_fn": "strong_wolfe",
        "max_iter": 150,
        "tolerance_grad": 1e-9,
        "tolerance_change": 0,
        **hyper,
    }
    return stiefel.optimizer(net, torch.optim.LBFGS, **options)


def loss(net: nn.ParameterDict, a: Tensor) -> Tensor:
    return -((net["W"] @ a) * net["W"].conj()).sum().real + net["b"].square().sum()


@pytest.mark.sampled(4, values=False)
@pytest.mark.parametrize("dtype", [DOUBLE, torch.complex128], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_it_ends_at_the_optimum_and_each_evaluation_is_on_the_set(method, dtype):
    if dtype.is_complex and stiefel.get(method).real_only:
        pytest.skip("real weights only")
    net, a, optimum = problem(method, dtype)
    optimizer = made(net)
    residuals = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(net, a) + stiefel.penalty(net)
        value.backward()
        residuals.append(stiefel.report(net).worst)
        return value

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(closure)
    if stiefel.get(method).claim is not None:
        assert max(residuals) < 1e-12
        assert float(loss(net, a).detach()) == pytest.approx(optimum, abs=1e-6)
    if method in MOVED:
        assert stiefel.gradient_norm(net, lambda: loss(net, a)) < 1e-4


@pytest.mark.parametrize("method", MOVED)
def test_gradients_stay_the_users_and_copies_go_on(method):
    net, a, optimum = problem(method)
    optimizer = made(net, max_iter=5)

    def step(net: nn.ParameterDict, optimizer: torch.optim.Optimizer) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss(net, a)
            value.backward()
            return value

        optimizer.step(closure)

    step(net, optimizer)
    raw = torch.autograd.grad(loss(net, a), net["W"])[0]
    assert net["W"].grad is not None
    net_2, optimizer_2 = copy.deepcopy((net, optimizer))
    net_3, optimizer_3 = pickle.loads(pickle.dumps((net, optimizer)))
    for each, by in ((net, optimizer), (net_2, optimizer_2), (net_3, optimizer_3)):
        for _ in range(20):
            step(each, by)
        assert float(loss(each, a).detach()) == pytest.approx(optimum, abs=1e-6)
        assert stiefel.report(each).worst < 1e-12
    assert raw.shape == net["W"].grad.shape


def test_a_subclass_and_a_penalty_on_the_step_are_refused_by_name():
    class Own(torch.optim.LBFGS):
        pass

    net, _, _ = problem("retraction")
    with pytest.raises(stiefel.OptimizerError, match="Own cannot serve a method that acts on the step"):
        stiefel.optimizer(net, Own)
    soft = stiefel.constrain(nn.Linear(4, 3), "soft", decoupled=True)
    with pytest.raises(stiefel.OptimizerError, match="LBFGS cannot serve"):
        stiefel.optimizer(soft, torch.optim.LBFGS)
