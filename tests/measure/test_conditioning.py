"""Spectra of layers' inputs and Fisher blocks: against numpy, closed forms, autograd, and exact blocks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import block_diag
from torch import Tensor, nn
from torch.nn import functional as F

import stiefel
from stiefel.errors import OptionError, SelectionError
from stiefel.measure import conditioning, gauss_newton_block
from stiefel.measure.model import moments
from stiefel.measure.model.moments import Moments, gradient_rows, input_rows
from stiefel.measure.model.spectrum import kronecker, spectrum, union
from stiefel.measure.model.taps import Taps

EPS = torch.finfo(torch.float64).eps


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed + sum(shape)))


def with_eigenvalues(values: Tensor) -> Tensor:
    q = torch.linalg.qr(random(len(values), len(values), dtype=values.dtype.to_complex())).Q
    m = (q * values) @ q.mH
    return (m + m.mH) / 2


def whitened(rows: Tensor) -> Tensor:
    """Rows whose second moment is exactly the identity."""
    return torch.linalg.qr(rows).Q * math.sqrt(len(rows))


# --- spectra ---


@pytest.mark.parametrize(("n", "rank"), [(1, 1), (7, 7), (40, 12), (40, 1)])
def test_a_spectrum_is_that_of_numpy(n: int, rank: int) -> None:
    rows = random(rank, n)
    m = rows.mT @ rows
    found, known = spectrum(m), np.linalg.eigvalsh(m.numpy())[::-1]
    assert (found.size, found.rank) == (n, rank)
    assert found.eigenvalues is not None
    assert found.eigenvalues.numpy() == pytest.approx(np.where(np.arange(n) < rank, known, 0), rel=1e-9)
    assert found.condition_nonzero == pytest.approx(known[0] / known[rank - 1], rel=1e-9)
    assert found.condition == (found.condition_nonzero if rank == n else math.inf)
    assert found.trace == pytest.approx(known.sum())
    assert found.effective_rank == pytest.approx(known.sum() ** 2 / (known**2).sum())


@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
@pytest.mark.parametrize(
    "values",
    [
        torch.logspace(0, -9, 300),
        torch.ones(300),
        torch.cat([torch.ones(150), torch.full((150,), 1e-3)]),
        torch.cat([torch.tensor([1e6]), torch.linspace(1, 2, 299)]),
        torch.cat([torch.logspace(0, -6, 250), torch.zeros(50)]),
    ],
    ids=["spread", "identity", "repeated", "outlier", "singular"],
)
def test_the_ends_of_a_large_matrix_are_found_without_the_rest(values: Tensor, scale: float) -> None:
    values = values.double()
    found = spectrum(scale * with_eigenvalues(values), exact_to=64)
    full = bool((values > 0).all())
    assert (found.eigenvalues is None) is full  # to count zeros takes as long as to decompose
    assert found.rank == int((values > 0).sum())
    assert found.largest / scale == pytest.approx(values.max().item(), rel=1e-12)
    # The matrix is rounded by ε of its largest eigenvalue, which is so much of the least one.
    least = values[values > 0].min().item()
    assert found.smallest / scale == pytest.approx(least, rel=1e-8 + 100 * EPS * values.max().item() / least)


def test_a_matrix_that_is_zero_or_not_finite_has_no_condition() -> None:
    zero, wrong = spectrum(torch.zeros(3, 3)), spectrum(torch.full((3, 3), math.nan))
    assert (zero.rank, zero.largest, zero.condition, zero.effective_rank) == (0, 0.0, math.inf, 0.0)
    assert math.isnan(zero.condition_nonzero)
    assert wrong.rank == 0
    assert math.isnan(wrong.condition)
    assert math.isnan(wrong.condition_nonzero)
    assert math.isnan(union([zero, wrong]).largest)


def test_unions_and_products_are_those_of_the_matrices() -> None:
    parts = [random(3, 5), 100 * random(6, 4), torch.zeros(1, 2, dtype=torch.float64)]
    grams = [(p.mT @ p).numpy() for p in parts]
    found = union(spectrum(torch.from_numpy(g)) for g in grams)
    whole = spectrum(torch.from_numpy(block_diag(*grams)))
    assert (found.size, found.rank) == (whole.size, 7)
    assert found.eigenvalues.numpy() == pytest.approx(whole.eigenvalues.numpy(), rel=1e-9, abs=1e-9)
    assert found.smallest == pytest.approx(np.linalg.eigvalsh(grams[0])[2])
    assert found.effective_rank == pytest.approx(whole.effective_rank)
    product, known = kronecker(*(spectrum(torch.from_numpy(g)) for g in grams[:2])), np.kron(grams[0], grams[1])
    exact = spectrum(torch.from_numpy(known))
    assert (product.size, product.rank) == (exact.size, exact.rank) == (20, 12)
    for of in ("largest", "smallest", "trace", "effective_rank", "condition_nonzero", "condition"):
        assert getattr(product, of) == pytest.approx(getattr(exact, of), rel=1e-9)


# --- moments of inputs ---


def inputs(x: Tensor, **options: object) -> object:
    layer = nn.Linear(x.shape[-1], 2).to(x.dtype)
    return conditioning(layer, lambda: layer(x).abs().sum(), unconstrained=True, **options)["weight"].inputs


def test_whitened_inputs_have_condition_one() -> None:
    found = inputs(whitened(random(50, 8)))
    assert found.condition == pytest.approx(1, abs=100 * EPS)
    assert found.effective_rank == pytest.approx(8)
    wide = inputs(whitened(random(400, 300)), exact_to=64)
    assert wide.eigenvalues is None
    assert wide.condition == pytest.approx(1, abs=1e4 * EPS)


@pytest.mark.parametrize("scale", [1.0, 1e-70, 1e70])
def test_a_diagonal_scaling_squares_into_the_condition(scale: float) -> None:
    found = inputs(scale * whitened(random(50, 4)) * torch.tensor([1.0, 2.0, 4.0, 1000.0]))
    assert found.condition == pytest.approx(1e6, rel=1e-9)
    assert found.eigenvalues.numpy() / scale**2 == pytest.approx(np.array([1e6, 16.0, 4.0, 1.0]), rel=1e-9)


def test_a_mean_is_what_centring_takes_away() -> None:
    rows = random(60, 5)
    rows = whitened(rows - rows.mean(0)) + torch.tensor([3.0, 0.0, 4.0, 0.0, 0.0], dtype=torch.float64)
    assert inputs(rows).condition == pytest.approx(26, rel=1e-9)  # I + m mᵀ
    assert inputs(rows, centred=True).condition == pytest.approx(1, rel=1e-9)
    far = rows + 1e7  # of which E hhᵀ − m mᵀ would have no digit left
    assert inputs(far, centred=True).condition == pytest.approx(1, rel=1e-5)


def test_centring_leaves_the_schur_complement_of_the_bias() -> None:
    rows, s = random(30, 3).numpy() + 1, np.diag([2.0, 5.0])
    whole = np.hstack([rows, np.ones((30, 1))])
    block = np.kron(whole.T @ whole / 30, s)
    w, b = block[:6, :6], block[6:, 6:]
    left = w - block[:6, 6:] @ np.linalg.solve(b, block[6:, :6])
    found = kronecker(inputs(torch.from_numpy(rows), centred=True), spectrum(torch.from_numpy(s)))
    assert found.condition == pytest.approx(np.linalg.cond(left), rel=1e-9)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("n", [3, 40, 41, 90])
def test_few_and_many_rows_have_the_same_spectrum(n: int, centred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "ENTRIES", 7 * 40)  # seven rows at a time
    x = random(n, 40) + 1
    found = inputs(x, centred=centred)
    h = x - x.mean(0) if centred else x
    known = np.linalg.eigvalsh((h.mT @ h / n).numpy())[::-1]
    assert found.rank == min(40, n - centred)
    assert found.eigenvalues.numpy() == pytest.approx(known, abs=1e-12 * known[0])


def test_dead_units_and_narrow_layers_are_seen_through_rounding() -> None:
    torch.manual_seed(0)
    narrow = nn.Sequential(nn.Linear(20, 3), nn.Linear(3, 30), nn.Linear(30, 30), nn.Linear(30, 1))
    x = torch.randn(500, 20)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = conditioning(narrow, lambda: narrow(x).sum(), unconstrained=True)
        assert found["2.weight"].inputs.rank == 4  # three, and the direction of the bias
        assert found["2.weight"].inputs.condition == math.inf
        assert found["2.weight"].inputs.condition_nonzero < 1e4
    dead = nn.Sequential(nn.Linear(20, 30), nn.ReLU(inplace=True), nn.Linear(30, 1))
    nn.init.constant_(dead[0].bias[:7], -1e3)
    assert conditioning(dead, lambda: dead(x).sum(), unconstrained=True)["2.weight"].inputs.rank == 23


def test_complex_inputs_have_a_real_spectrum() -> None:
    x = random(30, 6, dtype=torch.complex128)
    for n in (4, 30):
        known = np.linalg.eigvalsh((x[:n].mT @ x[:n].conj() / n).numpy())[::-1]
        assert inputs(x[:n]).eigenvalues.numpy() == pytest.approx(known, abs=1e-12)


def test_a_sample_is_spread_and_always_the_same() -> None:
    x = random(16, 3, 64, 64)
    layer = nn.Conv2d(3, 2, 3, padding=1).double()
    whole, sampled = (
        conditioning(layer, lambda: layer(x).square().sum(), unconstrained=True, per_entry=k)["weight"]
        for k in (None, 100)
    )
    assert (whole.rows, sampled.rows) == (16 * 64 * 64, 2700)
    assert sampled.inputs.condition == pytest.approx(whole.inputs.condition, rel=0.5)
    assert sampled.gradients.trace == pytest.approx(whole.gradients.trace, rel=0.2)  # of all that there were
    again = conditioning(layer, lambda: layer(x).square().sum(), unconstrained=True, per_entry=100)["weight"]
    assert again == sampled
    small = Moments(per_entry=1)
    small.add(input_rows(layer, x))
    assert small.seen == moments.LEAST
    # Of images of 64 columns every 32nd pixel would be one of two columns.
    places = moments._spread(64 * 64 * 16, 2048) % 64
    assert len(places.unique()) == 64


# --- rows of convolutions ---

LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (5, 4)),
    "linear, sequences": (lambda: nn.Linear(4, 3), (5, 6, 4)),
    "linear, one example": (lambda: nn.Linear(4, 3), (4,)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (5, 4, 9)),
    "conv1d, one example": (lambda: nn.Conv1d(4, 6, 3), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)), (5, 2, 6, 7)),
    "same": (lambda: nn.Conv2d(2, 3, (4, 3), padding="same", dilation=(1, 2)), (3, 2, 6, 7)),
    "valid": (lambda: nn.Conv2d(2, 3, 2, padding="valid"), (3, 2, 6, 7)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), (3, 4, 5, 5)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"), (3, 2, 5, 6)),
    "reflect": (lambda: nn.Conv1d(2, 3, 3, padding=2, padding_mode="reflect"), (3, 2, 5)),
    "replicate": (lambda: nn.Conv3d(2, 3, 2, padding=1, padding_mode="replicate"), (3, 2, 3, 4, 2)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (3, 4, 3, 4)),
    "transposed, dilated": (lambda: nn.ConvTranspose1d(2, 3, 3, dilation=4, output_padding=3), (3, 2, 5)),
    "transposed, 3d": (lambda: nn.ConvTranspose3d(2, 1, 2, stride=3), (2, 2, 2, 3, 2)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("case", LAYERS)
def test_a_weights_gradient_is_the_sum_over_the_rows(case: str) -> None:
    """∂L/∂W = Σ g hᵀ over examples and positions, by group: whatever the layer, these are its rows."""
    torch.manual_seed(0)
    make, shape = LAYERS[case]
    layer = make().double()
    seen = {}
    x = random(*shape)
    with Taps({"weight": layer}, lambda name, layer, place, tensor: seen.update({place: tensor})):
        layer(x).square().sum().backward()
    h, g = input_rows(layer, seen["x"]), gradient_rows(layer, seen["dy"])
    assert h.view.shape[: h.places] == g.view.shape[: g.places]
    a, s = (rows.view.flatten(0, rows.places - 1).flatten(2) for rows in (h, g))
    product = torch.einsum("rgo,rgi->goi", *((a, s) if isinstance(layer, nn.modules.conv._ConvTransposeNd) else (s, a)))
    assert product.flatten() == pytest.approx(layer.weight.grad.flatten().numpy(), rel=1e-12, abs=1e-12)


# --- Fisher and Gauss-Newton blocks ---


def test_the_gradients_moment_is_the_empirical_fisher_factor() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = random(20, 5), torch.arange(20) % 3
    found = conditioning(model, lambda: F.cross_entropy(model(x), y), unconstrained=True)
    with torch.no_grad():
        p = model(x).softmax(1)
    g = (p - F.one_hot(y, 3)) / 20
    known = np.linalg.eigvalsh((g.mT @ g).numpy())[::-1]
    assert found["2.weight"].gradients.eigenvalues.numpy() == pytest.approx(known, abs=1e-15)
    assert found["2.weight"].gradients.rank == 2  # they sum to zero
    curvature = conditioning(model, lambda: model(x), loss=lambda z: F.cross_entropy(z, y), unconstrained=True)
    hessian = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0)
    known = np.linalg.eigvalsh(hessian.numpy())[::-1]
    assert curvature["2.weight"].gradients.eigenvalues.numpy() == pytest.approx(known, abs=1e-14)
    assert curvature["2.weight"].gradients.rank == 2
    assert all(p.grad is None for p in model.parameters())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model)


ONE = {
    "linear": (lambda: nn.Linear(5, 4), (30, 5)),
    "one window": (lambda: nn.Conv2d(2, 3, 3, bias=False), (30, 2, 3, 3)),
    "groups": (lambda: nn.Conv1d(4, 6, 2, groups=2), (30, 4, 2)),
    "one pixel": (lambda: nn.ConvTranspose2d(3, 2, 3, stride=2), (30, 3, 1, 1)),
}


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("case", ONE)
def test_one_linear_layers_block_is_the_kronecker_product(case: str, reduction: str) -> None:
    """The factors are independent where the loss's Hessian is the same for all examples."""
    torch.manual_seed(0)
    layer = ONE[case][0]().double()
    x = random(*ONE[case][1]) + 0.3
    target = torch.zeros_like(layer(x))

    def loss(z: Tensor) -> Tensor:
        weights = torch.linspace(1, 3, target[0].numel(), dtype=z.dtype).reshape(target[0].shape)
        return F.mse_loss(weights * z, target, reduction=reduction)

    block = spectrum(gauss_newton_block(layer, "weight", lambda model: model(x), loss))
    found = conditioning(layer, lambda: layer(x), loss=loss, unconstrained=True)["weight"]
    assert (found.block.size, found.block.rank) == (block.size, block.rank) == (layer.weight.numel(),) * 2
    for of in ("largest", "smallest", "trace", "effective_rank", "condition"):
        assert getattr(found.block, of) == pytest.approx(getattr(block, of), rel=1e-9)
    if layer.weight.ndim == 2:
        assert found.block.condition == pytest.approx(found.inputs.condition * found.gradients.condition)


@pytest.mark.parametrize("name", ["own", "soft", "unconstrained"])
def test_the_exact_block_is_the_jacobians_and_the_hessians(name: str) -> None:
    torch.manual_seed(0)
    model = stiefel.constrain(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double(), name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x, y = random(10, 6), torch.arange(10) % 3

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z, y)

    found = gauss_newton_block(model, "0.weight", lambda model: model(x), loss)
    w, bias, last = model[0].weight.detach(), model[0].bias.detach(), model[2]

    def outputs(w: Tensor) -> Tensor:
        return last(F.linear(x, w, bias).tanh())

    j = torch.autograd.functional.jacobian(outputs, w).reshape(30, 24)
    h = torch.autograd.functional.hessian(loss, outputs(w).detach()).reshape(30, 30)
    assert found.numpy() == pytest.approx((j.mT @ h @ j).detach().numpy(), abs=1e-14)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_approximation_of_a_deep_network_is_near() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = random(500, 5), torch.arange(500) % 3
    block = spectrum(gauss_newton_block(model, "0.weight", lambda m: m(x), lambda z: F.cross_entropy(z, y)))
    found = conditioning(model, lambda: model(x), loss=lambda z: F.cross_entropy(z, y), unconstrained=True)
    assert found["0.weight"].block.trace == pytest.approx(block.trace, rel=0.2)
    assert found["0.weight"].block.largest == pytest.approx(block.largest, rel=0.3)


def test_what_cannot_be_measured_has_a_reason() -> None:
    model = nn.ModuleDict({"rnn": nn.RNN(3, 3), "a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 3)})
    stiefel.constrain(model, "soft", layers=["a", "b"])
    stiefel.constrain(model, "soft", layers=["rnn.weight_hh_l0"])
    x = torch.randn(4, 3)

    def run() -> Tensor:
        model["rnn"](x)
        return model["a"](x).sum()

    found = conditioning(model, run)
    assert [name for name, layer in found.items() if layer.reason] == ["b.weight", "rnn.weight_hh_l0"]
    assert "was not called" in found["b.weight"].reason
    assert "RNN does not return the product" in found["rnn.weight_hh_l0"].reason
    assert "c.weight" in conditioning(model, run, unconstrained=True)
    with torch.no_grad():
        blind = conditioning(model, lambda: model["a"](x))["a.weight"]
    assert (blind.inputs.rank, blind.gradients, blind.reason) == (3, None, "no gradient has reached it")
    with torch.inference_mode():
        assert conditioning(model, lambda: model["a"](x))["a.weight"].inputs == blind.inputs
    with torch.no_grad():
        model["a"].weight[0, 0] = math.nan
    wrong = conditioning(model, lambda: model["b"](model["a"](x)).sum())
    assert math.isnan(wrong["b.weight"].inputs.condition)
    assert math.isnan(wrong["a.weight"].block.condition) or wrong["a.weight"].block.rank <= 9


@pytest.mark.parametrize(
    ("run", "loss", "words"),
    [
        (lambda layer, x: layer(x), None, r"shape \(4, 3\).*loss=\) has to be the loss of them"),
        (lambda layer, x: (layer(x),), None, "returned a tuple; it has to return the loss"),
        (lambda layer, x: None, torch.sum, "has to return the outputs"),
        (lambda layer, x: layer(x), lambda z: z, "a tensor of one element that depends on the outputs"),
        (lambda layer, x: layer(x), lambda z: -(z**2).sum(), "not convex.*eigenvalue -2"),
    ],
)
def test_what_run_and_loss_return_is_checked(run, loss, words: str) -> None:
    layer, x = nn.Linear(3, 3), torch.randn(4, 3)
    with pytest.raises(OptionError, match=words):
        conditioning(layer, lambda: run(layer, x), loss=loss, unconstrained=True)
    assert not layer._forward_hooks


def test_a_loss_that_is_linear_has_no_curvature() -> None:
    layer, x = nn.Linear(3, 3), torch.randn(4, 3)
    found = conditioning(layer, lambda: layer(x), loss=torch.sum, unconstrained=True)["weight"]
    assert (found.gradients.rank, found.block.rank) == (0, 0)


def test_blocks_that_are_too_large_or_not_there_are_refused() -> None:
    layer, x = nn.Linear(20, 20), torch.randn(4, 20)
    with pytest.raises(OptionError, match="400 entries, more than most=256"):
        gauss_newton_block(layer, "weight", lambda m: m(x), torch.sum)
    with pytest.raises(SelectionError, match="did you mean 'weight'"):
        gauss_newton_block(layer, "weigth", lambda m: m(x), torch.sum)
