"""``minimize`` and ``gradient_norm``: known optima to many digits, every exact method, and objectives that are wrong.

‖P_X(∂L/∂W)‖_F ≤ tol at the end, and L is the optimum's
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import stiefel

METHODS = [m for m in stiefel.available() if not m.startswith("test_")]
EXACT = [m for m in METHODS if stiefel.get(m).claim is not None]
DOUBLE = torch.float64
Loss = Callable[[], Tensor]


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def orthonormal(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.linalg.qr(gaussian(*shape[:-2], shape[-1], shape[-2], seed=seed, dtype=dtype))[0].mT.contiguous()


def weights(method: str, **tensors: Tensor) -> nn.ParameterDict:
    """Parameters on the whole set: some methods centre rows by default."""
    return stiefel.constrain(nn.ParameterDict(tensors), method, layers=list(tensors), **same_set(method))


def same_set(method: str) -> dict[str, object]:
    return dict(type(stiefel.get(method)).comparison)


def pca(method: str, dtype: torch.dtype = DOUBLE) -> tuple[nn.Module, Loss, float]:
    """−tr(W A Wᵀ): minus the sum of the largest eigenvalues."""
    values = torch.logspace(0, -2, 30, dtype=dtype)
    q = orthonormal(30, 30, seed=3).to(dtype)
    a, net = (q * values) @ q.mT, weights(method, W=gaussian(5, 30, seed=1).to(dtype))
    return net, lambda: -((net["W"] @ a) * net["W"]).sum(), -float(values[:5].sum())


def trace_ratio(method: str) -> tuple[nn.Module, Loss, float]:
    """−tr(W A Wᵀ)/tr(W B Wᵀ), whose optimum ρ is where the p largest eigenvalues of A − ρB sum to 0."""
    a, b = gaussian(20, 20, seed=1), gaussian(20, 20, seed=2)
    a, b, net = a @ a.mT, b @ b.mT + torch.eye(20, dtype=DOUBLE), weights(method, W=gaussian(3, 20, seed=3))
    rho = 0.0
    for _ in range(100):  # Newton's method, which converges from below (Ngo, Bellalij and Saad 2012)
        vectors = torch.linalg.eigh(a - rho * b)[1][:, -3:]
        rho = float(torch.trace(vectors.mT @ a @ vectors) / torch.trace(vectors.mT @ b @ vectors))
    return net, lambda: -((net["W"] @ a) * net["W"]).sum() / ((net["W"] @ b) * net["W"]).sum(), -rho


def gates(method: str) -> tuple[nn.Module, Loss, float]:
    """Unitary matrices up to a phase: Σ (n² − |tr(U Tᴴ)|²), whose optimum is 0."""
    dtype = torch.complex128
    target = orthonormal(50, 4, 4, seed=3, dtype=dtype)
    net = weights(method, U=orthonormal(50, 4, 4, seed=1, dtype=dtype))
    return net, lambda: (16 - (net["U"] * target.conj()).sum((-2, -1)).abs().square()).sum(), 0.0


def low_rank(method: str) -> tuple[nn.Module, Loss, float]:
    """‖B A − T‖² with orthonormal columns in B and A free: what is left of T beyond rank 4."""
    target = gaussian(20, 15, seed=4)
    net = nn.ParameterDict({"B": gaussian(20, 4, seed=1), "A": torch.zeros(4, 15, dtype=DOUBLE)})
    stiefel.constrain(net, method, layers=["B"], **same_set(method))
    left = float(torch.linalg.svdvals(target)[4:].square().sum())
    return net, lambda: (net["B"] @ net["A"] - target).square().sum(), left


def tucker(method: str) -> tuple[nn.Module, Loss, None]:
    """A product of three sets of several shapes and scales."""
    t = gaussian(8, 7, 6, seed=5)
    net = weights(method, U=gaussian(3, 8, seed=1), V=gaussian(7, 2, seed=2), W=gaussian(6, 2, seed=3))
    return net, lambda: -torch.einsum("abc,ia,bj,ck->ijk", t, net["U"], net["V"], net["W"]).square().sum(), None


@pytest.mark.sampled(6)
@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("job", [pca, trace_ratio, gates, low_rank, tucker])
def test_it_ends_at_the_optimum_whatever_method_holds_the_weight(job, method, second_order):
    if job is gates and stiefel.get(method).real_only:
        pytest.skip("real weights only")
    net, loss, optimum = job(method)
    found = stiefel.minimize(net, loss, second_order=second_order)
    assert found.converged, found
    assert found.gradient_norm <= 1e-8
    assert stiefel.gradient_norm(net, loss) <= 2e-8  # a proxy has the weight to rounding
    assert abs(float(loss().detach()) - found.loss) < 1e-12 * max(1, abs(found.loss))
    if optimum is not None:
        assert abs(found.loss - optimum) < 1e-11 * max(1, abs(optimum))
    assert stiefel.report(net).worst < 1e-13 or not stiefel.get(method).feasible
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    "options", [{"scale": "relu"}, {"scale": 3.0}, {"group_size": 2}, {"scale": "learnable"}], ids=str
)
@pytest.mark.parametrize("method", ["own", "cayley", "retraction"])
def test_scales_groups_and_gains(method, options):
    """The optimum in units of the weight: s² times that at scale 1."""
    if options.get("scale") == "learnable" and method == "retraction":
        pytest.skip("the scale of a method on the step is fixed")
    torch.manual_seed(0)
    linear = nn.Linear(6, 4, bias=False, dtype=DOUBLE)
    net = stiefel.constrain(linear, method, **{**same_set(method), **options})
    target = gaussian(4, 6, seed=1)
    found = stiefel.minimize(net, lambda: (net.weight - target).square().sum())
    assert found.converged, found
    assert stiefel.report(net).worst < 1e-13
    if isinstance(options.get("scale"), float):
        s = torch.linalg.svdvals(target)
        assert abs(found.loss - float((s - 3).square().sum())) < 1e-11  # Procrustes: s times the polar factor


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("method", [m for m in EXACT if same_set(m)])
def test_a_method_that_centres_rows_has_the_optimum_of_its_own_set(method, second_order):
    """Of −tr(W A Wᵀ) over centred rows: the eigenvalues of A between two projections along the vector of ones."""
    a = gaussian(12, 12, seed=2)
    a, p = a + a.mT, torch.eye(12, dtype=DOUBLE) - torch.full((12, 12), 1 / 12, dtype=DOUBLE)
    net = stiefel.constrain(nn.ParameterDict({"W": gaussian(4, 12, seed=1)}), method, layers=["W"])
    found = stiefel.minimize(net, lambda: -((net["W"] @ a) * net["W"]).sum(), second_order=second_order)
    assert found.converged, found
    assert found.loss == pytest.approx(-float(torch.linalg.eigvalsh(p @ a @ p)[-4:].sum()), abs=1e-11)
    assert net["W"].sum(-1).abs().max() < 1e-13


def test_a_whole_network_with_a_free_head_and_biases():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    stiefel.constrain(net, "own", exclude=["4"])
    x, y = gaussian(64, 10), torch.randint(3, (64,), generator=torch.Generator().manual_seed(1))
    before = float(cross_entropy(net(x), y).detach())
    found = stiefel.minimize(net, lambda: cross_entropy(net(x), y) + 1e-3 * net[4].weight.square().sum(), tol=1e-7)
    assert found.converged, found
    assert found.loss < before - 0.5
    assert stiefel.report(net).worst < 1e-13


def test_single_precision_says_that_rounding_has_ended_it():
    net, loss, optimum = pca("own", torch.float32)
    found = stiefel.minimize(net, loss)
    assert not found.converged
    assert "rounding" in found.message
    assert abs(found.loss - optimum) < 1e-5
    assert found.gradient_norm < 1e-4
    assert found.evaluations < 500


@pytest.mark.parametrize("call", ["norm", "refused"])
def test_proxies_of_any_length_stay_where_no_step_is_taken(call):
    net, loss, _ = pca("own")
    proxy = net.parametrizations.W.original
    with torch.no_grad():
        proxy.mul_(3)
    before = proxy.detach().clone()
    if call == "norm":
        stiefel.gradient_norm(net, loss)
    else:
        with pytest.raises(stiefel.ObjectiveError):
            stiefel.minimize(net, lambda: (net["W"] * torch.randn(5, 30)).sum())
    assert torch.equal(proxy, before)


def test_a_gain_that_is_frozen_stays():
    linear = nn.Linear(6, 4, bias=False, dtype=DOUBLE)
    net = stiefel.constrain(linear, "own", scale="learnable", center=False)
    gain = net.parametrizations.weight[0].gain.requires_grad_(False)
    found = stiefel.minimize(net, lambda: (net.weight - gaussian(4, 6, seed=1)).square().sum())
    assert found.converged, found
    assert torch.equal(gain, torch.ones(4, dtype=DOUBLE))


def test_a_start_at_the_optimum_ends_at_once_and_moves_nothing():
    net, loss, _ = pca("retraction")
    stiefel.minimize(net, loss, tol=1e-9)
    before = net["W"].detach().clone()
    found = stiefel.minimize(net, loss)
    assert (found.steps, found.evaluations, found.converged) == (0, 2, True)
    assert torch.equal(net["W"], before)


def test_the_callback_sees_each_step_and_may_end_it():
    net, loss, _ = pca("own")
    seen: list[stiefel.Minimum] = []
    found = stiefel.minimize(net, loss, callback=lambda m: seen.append(m) or len(seen) == 4)
    assert [m.steps for m in seen] == [1, 2, 3, 4]
    assert all(a.loss > b.loss for a, b in pairwise(seen))
    assert not found.converged
    assert found.message == "the callback returned True"
    assert found.loss == seen[-1].loss == pytest.approx(float(loss().detach()), abs=1e-13)


@pytest.mark.parametrize("second_order", [False, True])
def test_evaluations_are_counted_and_limited(second_order):
    net, loss, _ = pca("retraction")
    calls = []
    found = stiefel.minimize(net, lambda: calls.append(1) or loss(), max_evaluations=12, second_order=second_order)
    assert found.evaluations <= 14
    assert second_order or found.evaluations == len(calls)
    assert not found.converged
    assert "12" in found.message or "evaluations" in found.message


@pytest.mark.parametrize("method", ["own", "retraction"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupt_or_an_error_keeps_the_best_point(method, error):
    net, loss, _ = pca(method)
    count, losses = 0, []

    def interrupted() -> Tensor:
        nonlocal count
        count += 1
        if count == 20:
            raise error
        value = loss()
        losses.append(float(value.detach()))
        return value

    with pytest.raises(error):
        stiefel.minimize(net, interrupted)
    assert float(loss().detach()) == pytest.approx(min(losses), abs=1e-12)
    assert stiefel.report(net).worst < 1e-13
    optimizer = stiefel.optimizer(net, torch.optim.SGD, lr=0.1)  # an ordinary constrained model again
    loss().backward()
    optimizer.step()
    assert stiefel.report(net).worst < 1e-13


def test_a_trial_that_is_not_a_number_shortens_the_step():
    net = nn.ParameterDict({"a": torch.tensor([3.0], dtype=DOUBLE)})
    a = net["a"]
    # log of a negative number is NaN: full steps from 3 go there.
    found = stiefel.minimize(net, lambda: (a - 2 * a.log()).sum())
    assert found.converged, found
    assert float(a.detach()) == pytest.approx(2, abs=1e-7)


WRONG: dict[str, tuple[Callable[[nn.Module], object], type[Exception], str]] = {
    "not a tensor": (lambda net: 1.0, stiefel.ObjectiveError, "returned float"),
    "not scalar": (lambda net: net["W"].sum(0), stiefel.ObjectiveError, r"shape \(30,\)"),
    "complex": (lambda net: net["W"].sum() * 1j, stiefel.ObjectiveError, "complex"),
    "detached": (lambda net: net["W"].detach().sum(), stiefel.ObjectiveError, "requires a gradient"),
    "of something else": (
        lambda net: nn.Parameter(torch.ones(2, dtype=DOUBLE)).sum(),
        stiefel.ObjectiveError,
        "none of the module's parameters",
    ),
    "NaN": (lambda net: net["W"].sum() * float("nan"), stiefel.DivergenceError, "the loss is nan"),
    "random": (lambda net: (net["W"] * torch.randn(5, 30)).sum(), stiefel.ObjectiveError, "at the same point"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("method", ["own", "retraction"])
def test_a_bad_objective_is_refused_by_name_and_changes_nothing(name, method):
    net, _, _ = pca(method)
    loss, error, message = WRONG[name]
    before = net["W"].detach().clone()
    with pytest.raises(error, match=message):
        stiefel.minimize(net, lambda: loss(net))  # type: ignore[arg-type, return-value]
    torch.testing.assert_close(net["W"].detach(), before, rtol=0, atol=1e-14)


def test_a_loss_without_a_lower_bound_is_told():
    net = nn.ParameterDict({"a": torch.zeros(3, dtype=DOUBLE)})
    found = stiefel.minimize(net, lambda: -net["a"].exp().sum(), max_evaluations=2000)
    assert not found.converged
    assert "bounded" in found.message


@pytest.mark.parametrize("method", [m for m in METHODS if stiefel.get(m).claim is None])
def test_penalties_and_controls_are_refused_with_the_exact_methods(method):
    net, loss, _ = pca(method)
    with pytest.raises(stiefel.OptionError, match=r"'W' is held by .* own"):
        stiefel.minimize(net, loss)


@pytest.mark.parametrize(
    "options", [{"tol": -1.0}, {"tol": float("nan")}, {"max_evaluations": 0}, {"history": 2.5}], ids=str
)
def test_options_out_of_range(options):
    net, loss, _ = pca("own")
    with pytest.raises(stiefel.OptionError, match=next(iter(options))):
        stiefel.minimize(net, loss, **options)


@pytest.mark.parametrize("method", EXACT)
def test_the_gradients_norm_is_that_of_the_weight_on_its_set(method):
    """Against P_X(G) = G − sym(G Xᵀ) X with G of a plain tensor, at a scale."""
    torch.manual_seed(0)
    net = stiefel.constrain(nn.Linear(7, 4, bias=False, dtype=DOUBLE), method, scale=1.5, **same_set(method))
    a = gaussian(4, 7, seed=2)
    w = net.weight.detach().clone().requires_grad_()
    ((w * a).sum().sin() + (w**4).sum()).backward()
    x, g = w.detach() / 1.5, w.grad
    expected = torch.linalg.norm(g - (g @ x.mT + x @ g.mT) / 2 @ x)
    before = [p.detach().clone() for p in net.parameters()]
    found = stiefel.gradient_norm(net, lambda: (net.weight * a).sum().sin() + (net.weight**4).sum())
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))  # proxies too
    tolerance = 1e-12 if stiefel.get(method).feasible else 1e-5
    assert found == pytest.approx(float(expected), rel=tolerance)
    assert all(p.grad is None for p in net.parameters())


def test_long_work_tells_of_its_progress(monkeypatch, capsys):
    solving = sys.modules["stiefel.attach.minimize"]  # the package has the function of that name
    monkeypatch.setattr(solving, "QUIET", 0.0)
    monkeypatch.setattr(solving, "EVERY", 0.0)
    net, loss, _ = pca("own")
    stiefel.minimize(net, loss)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 10
    assert lines[-1].split("minimize: ")[1].startswith("step ")
    assert "gradient" in lines[-1]


def test_nothing_is_left_behind_on_the_module():
    net, loss, _ = pca("own")
    before = {name: set(vars(m)) for name, m in net.named_modules()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stiefel.minimize(net, loss)
    parametrization = net.parametrizations.W[0]
    assert parametrization.held is None
    assert {name: set(vars(m)) - {"held", "cached"} for name, m in net.named_modules()} == {
        name: names - {"held", "cached"} for name, names in before.items()
    }
