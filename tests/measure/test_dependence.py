"""Why methods differ: dependence against exact Hessian blocks, effective rates against Jacobians, variances by hand."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import stiefel
from stiefel.errors import OptionError
from stiefel.measure import Dependence, activation_variance, dependence, effective_rates, preservation

X = torch.randn(40, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randn(40, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def smooth(method: str = "unconstrained", wide: int = 12, **options) -> nn.Module:
    """7 → 12 (columns) → 6 (rows) → 6 (square) → 3, tanh between."""
    torch.manual_seed(0)
    sizes = (7, wide, 6, 6)
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())]
    net = nn.Sequential(*layers, nn.Linear(6, 3)).double()
    return stiefel.constrain(net, method, exclude="6", **options)


def loss(model: nn.Module) -> Tensor:
    return F.mse_loss(model(X), Y)


def tangent(w: Tensor, u: Tensor, s: float) -> Tensor:
    """Projection onto the tangent space of {W Wᵀ = s² I}, or of {Wᵀ W = s² I} where W is tall, written anew."""
    if w.shape[0] > w.shape[1]:
        return tangent(w.T, u.T, s).T
    b = u @ w.T / s**2
    return u - (b + b.T) / 2 @ w


def exact(model: nn.Module, s: float) -> Tensor:
    """The limit of ``turn`` from Hessian-vector products and the closed form of the Riemannian Hessian."""
    plain = stiefel.release(model)
    weights = [layer.weight for layer in plain[:6:2]]
    gradients = torch.autograd.grad(loss(plain), weights, create_graph=True)
    xi = [tangent(w, g, s).detach() for w, g in zip(weights, gradients, strict=True)]
    turn = torch.zeros(3, 3, dtype=torch.float64)
    for m in range(3):
        blocks = torch.autograd.grad((gradients[m] * xi[m]).sum(), weights, retain_graph=True)
        for n, (w, block) in enumerate(zip(weights, blocks, strict=True)):
            change = block
            if n == m:  # the curvature of the set: −sym(G Xᵀ) ξ, in rows form
                rows, g, v = (t.T if w.shape[0] > w.shape[1] else t for t in (w, gradients[n].detach(), xi[n]))
                b = g @ rows.T / s**2
                normal = (b + b.T) / 2 @ v
                change = block - (normal.T if w.shape[0] > w.shape[1] else normal)
            change = tangent(w.detach(), change, s)
            along = (change * xi[n]).sum() / xi[n].norm() ** 2 * xi[n]
            turn[n, m] = weights[m].norm() * (change - along).norm() / (xi[n].norm() * xi[m].norm())
    return turn.detach()


# --- dependence ---


@pytest.mark.parametrize("scale", [1.0, "relu"])
def test_dependence_is_the_hessians_blocks_in_the_limit(scale):
    model = smooth(scale=scale)
    far, near = (dependence(model, loss, length=length).turn for length in (1e-4, 1e-5))
    reference = exact(model, stiefel.get("unconstrained", scale=scale).fixed_scale)
    assert (reference > 0.05).all()  # all layers depend on all, and the comparison is of digits
    assert torch.allclose(near, reference, rtol=2e-4)
    errors = [(found - reference).abs().max().item() for found in (far, near)]
    assert errors[1] < 0.2 * errors[0] < 2e-3  # first order in the length


def test_layers_of_separate_heads_do_not_depend_on_each_other():
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.drop, self.other = nn.Linear(7, 3), nn.Dropout(0.5), nn.Linear(7, 3)

    def summed(model: nn.Module) -> Tensor:
        return F.mse_loss(model.one(X).tanh(), Y) + F.mse_loss(model.other(model.drop(X)).tanh(), Y)

    turn = dependence(stiefel.constrain(Heads().double()), summed).turn
    assert turn[0, 1] == turn[1, 0] == 0  # also with dropout, which draws alike each time
    assert (turn.diagonal() > 0.1).all()

    def product(model: nn.Module) -> Tensor:
        return F.mse_loss(model.one(X).tanh() * model.other(X).tanh(), Y)

    assert (dependence(stiefel.constrain(Heads().double()), product).turn > 0.1).all()


COMMON_START = stiefel.available()


@pytest.mark.parametrize("method", COMMON_START)
def test_at_the_common_start_all_methods_have_the_same_dependence(method):
    options = dict(stiefel.get(method).comparison)
    found = dependence(smooth(method, **options), loss)
    reference = dependence(smooth(), loss)
    assert found.layers == ("0.weight", "2.weight", "4.weight")
    assert torch.allclose(found.turn, reference.turn, rtol=1e-6)
    assert torch.allclose(found.gradient, reference.gradient, rtol=1e-6)


def test_a_learned_scale_counts_as_a_given_one():
    learned, fixed = (smooth("own", 7, scale=scale, center=False) for scale in ("learnable", 2.0))
    for weight in stiefel.attach.constrained_weights(learned):
        torch.nn.init.constant_(weight.owner.parametrizations.weight[0].gain, 2.0)
    assert torch.allclose(dependence(learned, loss).turn, dependence(fixed, loss).turn, rtol=1e-9)
    assert torch.allclose(dependence(learned, loss).gradient, 4 * dependence(fixed, loss).gradient, rtol=1e-9)
    assert list(effective_rates(learned, loss).values()) == pytest.approx([1.0] * 3, rel=1e-6)


def test_a_step_at_a_rate_has_the_length_that_its_gradient_says():
    model = smooth("riemannian", scale="relu")
    found = dependence(model, loss)
    before = [w.value.detach().clone() for w in stiefel.attach.constrained_weights(model)]
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=1e-5)
    loss(model).backward()
    optimizer.step()
    after = [w.value.detach() for w in stiefel.attach.constrained_weights(model)]
    lengths = [((b - a).norm() / a.norm()).item() for a, b in zip(before, after, strict=True)]
    assert lengths == pytest.approx((1e-5 * found.gradient).tolist(), rel=1e-4)
    assert torch.allclose(found.per_step(0.1)[:, 1], found.turn[:, 1] * 0.1 * found.gradient[1])


def test_turns_are_of_gradients_as_they_are_after_a_step_of_one_layer():
    model = smooth("riemannian")
    found = dependence(model, loss, length=1e-3)
    layers = [model[i] for i in (0, 2, 4)]
    tangents = []
    for lr in (0.0, 1e-3 / found.gradient[1].item()):
        weight = layers[1].weight
        (gradient,) = torch.autograd.grad(loss(model), weight)
        start = weight.detach().clone()
        with torch.no_grad():  # the middle layer alone, along its manifold: by its own retraction
            weight.copy_(weight.manifold.retr(weight, -lr * tangent(weight, gradient, 1.0)))
        tangents.append(tangent(layers[2].weight, torch.autograd.grad(loss(model), layers[2].weight)[0], 1.0).flatten())
        with torch.no_grad():
            weight.copy_(start)
    angle = torch.acos(F.cosine_similarity(*(t.detach() for t in tangents), dim=0)).item()
    assert found.turn[2, 1].item() == pytest.approx(angle / 1e-3, rel=1e-3)


@pytest.mark.parametrize("method", ["own", "riemannian", "soft", "pogo"])
def test_measuring_leaves_the_model_and_the_random_state_alone(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.ReLU(), nn.Linear(6, 3)).double()
    stiefel.constrain(model, method)
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.1)
    loss(model).backward()
    optimizer.step()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    dependence(model, loss)
    effective_rates(model, loss)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert model.training
    assert [w.binding.tally.steps for w in stiefel.attach.constrained_weights(model)] == [1, 1]
    optimizer.step()  # the optimizer still owns its weights
    assert stiefel.report(model).worst < 0.5


def test_layers_are_spread_over_the_model():
    layers = [nn.Linear(4, 4) for _ in range(9)]
    model = stiefel.constrain(nn.Sequential(*layers))

    def squared(model: nn.Module) -> Tensor:
        return model(X[:, :4].float()).square().mean()

    assert dependence(model, squared, most=3).layers == ("0.weight", "4.weight", "8.weight")
    assert dependence(model, squared, most=1).layers == ("0.weight",)
    assert len(dependence(model, squared, most=99).layers) == 9


def test_a_layer_without_a_gradient_has_no_turn():
    model = smooth()

    def first(model: nn.Module) -> Tensor:
        return F.mse_loss(model[:3](X), torch.ones(40, 6, dtype=torch.float64))

    found = dependence(model, first)
    assert found.turn[:2, :2].isfinite().all()
    assert found.turn[2].isnan().all()
    assert found.turn[:, 2].isnan().all()
    assert found.gradient[2] == 0
    assert effective_rates(model, first) == {
        "0.weight": pytest.approx(1), "2.weight": pytest.approx(1), "4.weight": None
    }  # fmt: skip
    assert set(found.to_dict()) == {"layers", "turn", "gradient", "length"}


def test_a_model_without_constraints_has_none():
    found = dependence(nn.Linear(2, 2), lambda model: model(torch.ones(1, 2)).sum())
    assert (found.layers, found.turn.shape) == ((), (0, 0))
    assert effective_rates(nn.Linear(2, 2), lambda model: model(torch.ones(1, 2)).sum()) == {}
    assert isinstance(found, Dependence)


def test_what_cannot_be_measured_is_told():
    model = smooth()
    for bad in ({"length": 0.0}, {"length": math.inf}, {"most": 0}):
        with pytest.raises(OptionError, match=next(iter(bad))):
            dependence(model, loss, **bad)
    with pytest.raises(OptionError, match=r"returned a tensor of shape \(40, 3\)"):
        dependence(model, lambda model: model(X))
    outside = loss(model)
    with torch.no_grad():
        detached = outside.clone()
    with pytest.raises(OptionError, match="depends on the weights"):
        effective_rates(model, lambda copy: detached)


@pytest.mark.parametrize(
    ("owner", "tensor", "run"),
    [
        (lambda: nn.Conv2d(2, 4, 3), None, lambda m: m(X[:32].reshape(2, 2, 7, 8).float()).square().mean()),
        (lambda: nn.RNN(7, 5), "weight_hh_l0", lambda m: m(X.float()[:, None])[0].square().mean()),
        (lambda: nn.LSTM(7, 5), "weight_hh_l0", lambda m: m(X.float()[:, None])[0].square().mean()),
        (
            lambda: nn.Linear(7, 5, dtype=torch.complex64),
            None,
            lambda m: (m(X.to(torch.complex64)) - 1).abs().square().mean(),
        ),
    ],
    ids=["convolution", "rnn", "lstm", "complex"],
)
@pytest.mark.parametrize("method", ["own", "projection"])
def test_every_kind_of_layer_is_measured(owner, tensor, run, method):
    torch.manual_seed(0)
    layers, options = [f"0.{tensor}"] if tensor else None, stiefel.get(method).comparison
    model = stiefel.constrain(nn.ModuleList([owner()]), method, layers=layers, **options)
    found = dependence(model, lambda m: run(m[0]))
    assert found.turn.shape == (1, 1)
    assert 0 < found.turn.item() < 1e3
    # complex weights stay in single precision
    assert list(effective_rates(model, lambda m: run(m[0])).values()) == pytest.approx([1.0], rel=1e-3)


# --- effective rates ---


@pytest.mark.sampled(3)
@pytest.mark.parametrize("scale", [1.0, "relu", 0.5])
@pytest.mark.parametrize("method", [m for m in COMMON_START if stiefel.get(m).coefficients is not None])
def test_at_the_start_the_rate_is_that_of_the_coefficients(method, scale):
    method_object = stiefel.get(method, **stiefel.get(method).comparison, scale=scale)
    a, b = method_object.coefficients
    model = smooth(method, **stiefel.get(method).comparison, scale=scale)
    s = method_object.fixed_scale
    expected = []
    for weight in stiefel.attach.constrained_weights(model):
        w = weight.value.detach().clone().requires_grad_()
        plain = stiefel.release(smooth(method, **stiefel.get(method).comparison, scale=scale))
        layer = plain.get_submodule(weight.name.removesuffix(".weight"))
        (g,) = torch.autograd.grad(loss(plain), layer.weight)
        x, g = (w.detach(), g) if w.shape[0] <= w.shape[1] else (w.detach().T, g.T)
        x = x / s
        along, across = (g @ x.T - x @ g.T) / 2 @ x, g - g @ x.T @ x
        expected.append(((a * along + b * across).norm() / (along + across).norm()).item())
    assert list(effective_rates(model, loss).values()) == pytest.approx(expected, rel=1e-5)


def test_the_rate_is_that_of_the_jacobian_anywhere():
    model = smooth("own", center=False, scale="relu")
    torch.manual_seed(3)
    for weight in stiefel.attach.constrained_weights(model):
        weight.parameter.data += 0.3 * torch.randn_like(weight.parameter)
    stiefel.refresh(model)
    rates = effective_rates(model, loss)
    for name, rate in rates.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        weight = layer.weight.detach()
        plain = stiefel.release(copy.deepcopy(model))
        target = plain.get_submodule(name.removesuffix(".weight")).weight
        (g,) = torch.autograd.grad(loss(plain), target)
        proxy, phi = layer.parametrizations.weight.original.detach(), layer.parametrizations.weight[0]
        jacobian = torch.autograd.functional.jacobian(phi, proxy).reshape(weight.numel(), -1)
        moved = (jacobian @ jacobian.T @ g.flatten()).reshape(weight.shape)
        projected = tangent(weight, g, math.sqrt(2))
        assert rate == pytest.approx((tangent(weight, moved, math.sqrt(2)).norm() / projected.norm()).item(), rel=1e-6)
        assert abs(rate - 1) > 0.02


@pytest.mark.parametrize("method", ["own", "weight_norm", "oni"])
def test_a_longer_proxy_has_a_rate_smaller_by_its_square(method):
    model = smooth(method, 7, **stiefel.get(method).comparison)  # rows alone: filters
    before = effective_rates(model, loss)
    for weight in stiefel.attach.constrained_weights(model):
        weight.parameter.data *= 3
    stiefel.refresh(model)
    assert list(effective_rates(model, loss).values()) == pytest.approx([r / 9 for r in before.values()], rel=1e-6)


def test_the_rate_decays_in_training_where_a_proxy_grows():
    def trained(method: str, **options) -> list[tuple[float, float]]:
        model = smooth(method, **options)
        optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=1.0)
        found = []
        for _ in range(4):
            (weight, *_) = stiefel.attach.constrained_weights(model)
            found.append((effective_rates(model, loss)[weight.name], weight.parameter.norm().item()))
            for _ in range(20):
                optimizer.zero_grad()
                loss(model).backward()
                optimizer.step()
        return found

    rates, norms = zip(*trained("own", center=False), strict=True)
    assert list(rates) == sorted(rates, reverse=True)
    assert list(norms) == sorted(norms)
    assert rates[0] == pytest.approx(1)
    assert rates[-1] == pytest.approx(norms[0] ** 2 / norms[-1] ** 2, rel=0.05)
    assert rates[-1] < 0.96
    assert [rate for rate, _ in trained("riemannian")] == pytest.approx([1.0] * 4, rel=1e-6)


def test_methods_without_a_rate_and_frozen_weights_have_none():
    model = smooth("spel")
    assert stiefel.get("spel").step_length
    assert set(effective_rates(model, loss).values()) == {None}
    model = smooth("own")
    model[2].parametrizations.weight.original.requires_grad_(False)
    rates = effective_rates(model, loss)
    assert rates["2.weight"] is None
    assert rates["0.weight"] > 0
    assert set(effective_rates(model.requires_grad_(False), loss).values()) == {None}


def test_a_penalty_and_what_pulls_back_to_the_set_do_not_count():
    model = smooth("soft", strength=5.0)
    for weight in stiefel.attach.constrained_weights(model):
        weight.parameter.data *= 1.2
    rates = effective_rates(model, loss)
    assert list(rates.values()) == pytest.approx([1.0] * 3, rel=1e-6)


def test_torchs_cache_of_weights_does_not_mislead():
    model = smooth("own", center=False)
    for weight in stiefel.attach.constrained_weights(model):
        weight.parameter.data *= 2
    outside, turn = effective_rates(model, loss), dependence(model, loss).turn
    with parametrize.cached():
        model(X)
        for _ in range(3):
            assert effective_rates(model, loss) == outside
            assert torch.equal(dependence(model, loss).turn, turn)


# --- variance ---


def test_variance_is_that_of_each_unit_over_examples_and_calls():
    model = smooth()
    outputs = [model[: i + 1](X).detach() for i in (0, 2, 4)]
    expected = [y.var(0, correction=0).mean().item() for y in outputs]
    assert activation_variance(model, lambda: model(X)) == pytest.approx(
        dict(zip(("0.weight", "2.weight", "4.weight"), expected, strict=True))
    )
    halves = activation_variance(model, lambda: (model(X[:10]), model(X[10:])))
    assert list(halves.values()) == pytest.approx(expected)


def test_variance_of_a_channel_is_over_its_positions():
    torch.manual_seed(0)
    model = stiefel.constrain(nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(48, 5)))
    x = torch.randn(8, 1, 6, 6)
    y = model[0](x)
    found = activation_variance(model, lambda: model(x))
    assert found["0.weight"] == pytest.approx(y.var((0, 2, 3), correction=0).mean().item(), rel=1e-5)
    assert list(found) == ["0.weight", "2.weight"]


def test_variance_sees_a_collapse_that_energy_does_not():
    model = smooth()
    model[0].bias.data.fill_(2.0)
    same = X[:1].expand(40, 7)
    assert activation_variance(model, lambda: model(same))["2.weight"] == pytest.approx(0, abs=1e-15)
    signals = preservation(model, lambda: F.mse_loss(model(same), Y))
    assert signals["2.weight"].forward_total > 0.1


def test_variance_of_other_outputs():
    model = nn.ModuleDict({"rnn": nn.RNN(7, 5), "unused": nn.Linear(4, 4)}).double()
    stiefel.constrain(model, layers=["rnn.weight_hh_l0", "unused"])
    hooks = dict(model["rnn"]._forward_hooks)
    found = activation_variance(model, lambda: model["rnn"](X[:, None]))
    expected = model["rnn"](X[:, None])[0].reshape(40, 5).var(0, correction=0).mean().item()
    assert found == {"rnn.weight_hh_l0": pytest.approx(expected), "unused.weight": None}
    assert dict(model["rnn"]._forward_hooks) == hooks
