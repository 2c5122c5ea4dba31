"""``optimizer``: which class it is for every method, and that a training loop is an ordinary one."""

from __future__ import annotations

import pytest
import torch
from contract import (
    METHODS,
    NOT_STEPPED,
    OPTIMIZERS,
    assert_feasible,
    batch,
    gram_error,
    mlp,
    output,
    same_state,
    state_copy,
    train,
)
from torch import Tensor, nn

import stiefel
import stiefel.methods
from stiefel.attach.weights import constrained_weights


@pytest.mark.parametrize("method", NOT_STEPPED)
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.LBFGS])
def test_the_optimizer_is_cls_itself_where_the_method_acts_elsewhere(
    method: str, cls: type[torch.optim.Optimizer]
) -> None:
    assert type(stiefel.optimizer(stiefel.constrain(mlp(), method), cls, lr=0.1)) is cls


def test_the_optimizer_is_geoopts_for_riemannian_weights() -> None:
    model = stiefel.constrain(mlp(), "riemannian")
    import geoopt

    assert isinstance(stiefel.optimizer(model, torch.optim.SGD, lr=0.1), geoopt.optim.RiemannianSGD)
    assert isinstance(stiefel.optimizer(model, torch.optim.Adam, lr=0.1), geoopt.optim.RiemannianAdam)
    assert isinstance(model[0].weight, geoopt.ManifoldParameter)


def test_the_optimizer_of_a_plain_module_is_cls_itself() -> None:
    assert type(stiefel.optimizer(mlp(), torch.optim.SGD, lr=0.1)) is torch.optim.SGD


@pytest.mark.sampled(12)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("choice", OPTIMIZERS)
def test_training_lowers_the_loss_and_stays_on_the_set(method: str, choice: str) -> None:
    cls, hyper = OPTIMIZERS[choice]
    model, x = stiefel.constrain(mlp(), method), batch(16, 6)
    optimizer = stiefel.optimizer(model, cls, **hyper)
    before = (output(model, x) - 0.3).square().mean().item()
    start = [model[i].weight.detach().clone() for i in (0, 2, 4)]
    train(model, optimizer, x, steps=150)
    assert (output(model, x) - 0.3).square().mean().item() < before / 2
    for i, old in zip((0, 2, 4), start, strict=True):
        assert not torch.equal(model[i].weight, old)
    assert_feasible(model, method)


@pytest.mark.parametrize("method", METHODS)
def test_all_parameters_are_trained_unless_params_says_otherwise(method: str) -> None:
    model = stiefel.constrain(mlp(), method)
    (group,) = stiefel.optimizer(model, torch.optim.SGD, lr=0.1).param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]

    groups = [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters()}]
    optimizer = stiefel.optimizer(model, torch.optim.SGD, groups, lr=0.01)
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.01]
    first, last = model[0].weight.detach().clone(), model[4].weight.detach().clone()
    train(model, optimizer, batch(4, 6))
    assert not torch.equal(model[0].weight, first)
    assert torch.equal(model[4].weight, last)
    assert_feasible(model, method)


@pytest.mark.parametrize("method", METHODS)
def test_each_groups_rate_is_used(method: str) -> None:
    """A group with rate zero stands still beside one that moves."""
    torch.manual_seed(0)
    model = stiefel.constrain(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), method)
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[1].parameters(), "lr": 0.1}]
    still, moves = (model[i].weight.detach().clone() for i in (0, 1))
    train(model, stiefel.optimizer(model, torch.optim.SGD, groups), batch(4, 4), steps=1)
    torch.testing.assert_close(model[0].weight.detach(), still, rtol=0, atol=1e-6)
    assert (model[1].weight - moves).abs().max() > 1e-4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("choice", OPTIMIZERS)
def test_schedulers_set_the_rate(method: str, choice: str) -> None:
    cls, hyper = OPTIMIZERS[choice]
    model = stiefel.constrain(mlp(), method)
    optimizer = stiefel.optimizer(model, cls, **hyper)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for k in range(3):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(hyper["lr"] * 0.5**k)
        train(model, optimizer, batch(4, 6), steps=1)
        scheduler.step()
    assert_feasible(model, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam])
def test_a_gradient_scaler_changes_nothing_but_skips_infinite_steps(
    method: str, cls: type[torch.optim.Optimizer]
) -> None:
    x = batch(4, 6, dtype=torch.float64)
    plain, scaled = (stiefel.constrain(mlp().double(), method) for _ in range(2))
    train(plain, stiefel.optimizer(plain, cls, lr=0.05), x, steps=1)
    optimizer, scaler = stiefel.optimizer(scaled, cls, lr=0.05), torch.amp.GradScaler("cpu", init_scale=1024.0)
    torch.manual_seed(1)  # as train does
    scaler.scale((output(scaled, x) - 0.3).square().mean() + stiefel.penalty(scaled)).backward()
    scaler.step(optimizer)
    scaler.update()
    for one, two in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(one.detach().as_subclass(Tensor), two.detach().as_subclass(Tensor))
    before = state_copy(scaled)
    for p in scaled.parameters():
        p.grad = torch.full_like(p, float("inf")).as_subclass(Tensor)
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    scaler.update()
    assert same_state(scaled.state_dict(), before)


@pytest.mark.parametrize("method", METHODS)
def test_a_closure_is_evaluated_once_and_its_loss_returned(method: str) -> None:
    model, x, calls = stiefel.constrain(mlp(), method), batch(4, 6), []
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.05)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = output(model, x).square().mean() + stiefel.penalty(model)
        loss.backward()
        calls.append(loss.item())
        return loss

    returned = optimizer.step(closure)
    assert calls == [returned.item()]
    assert_feasible(model, method)


@pytest.mark.parametrize("method", METHODS)
def test_frozen_weights_start_on_the_set_and_stay(method: str) -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    stiefel.constrain(model, method)
    (found, *_) = constrained_weights(model)
    assert not found.parameter.requires_grad
    start = model[0].weight.detach().clone()
    train(model, stiefel.optimizer(model, torch.optim.SGD, lr=0.05, momentum=0.9), batch(4, 6))
    assert torch.equal(model[0].weight, start)
    assert gram_error(start.mT) < 1e-6
    stiefel.release(model)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True, True, True]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("choice", OPTIMIZERS)
def test_a_late_first_gradient(method: str, choice: str) -> None:
    cls, hyper = OPTIMIZERS[choice]
    torch.manual_seed(0)
    model = stiefel.constrain(nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)]), method)
    optimizer, x = stiefel.optimizer(model, cls, **hyper), batch(4, 5)
    late = model[1].weight.detach().clone()
    for step in range(4):
        optimizer.zero_grad()
        y = model[0](x)
        if step == 1:
            assert torch.equal(model[1].weight, late)
        (model[1](y) if step >= 2 else y).square().mean().backward()
        optimizer.step()
    assert not torch.equal(model[1].weight, late)
    assert_feasible(model, method)
