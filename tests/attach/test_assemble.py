"""Weights of several matrices: ``blocks`` of unequal sizes, and rows that are orthonormal in another inner product."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import stiefel
from stiefel.attach import constrained_weights

METHODS = [m for m in stiefel.available() if not m.startswith("test_")]
FEASIBLE = [m for m in METHODS if stiefel.get(m).feasible]
DOUBLE = torch.float64


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def product(n: int, seed: int = 3) -> Tensor:
    a = gaussian(n, n, seed=seed)
    return a @ a.mT / n + 0.1 * torch.eye(n, dtype=DOUBLE)


def kwargs(method: str, **more: object) -> dict[str, object]:
    return {**stiefel.get(method).comparison, **more}


def off(w: Tensor, b: Tensor | None = None, scale: float = 1.0) -> float:
    """How far a matrix is from W B Wᵀ = s² I, or WᵀBW."""
    x = w.detach() if w.shape[0] <= w.shape[1] else w.detach().mT
    gram = x @ (torch.eye(x.shape[1], dtype=x.dtype) if b is None else b) @ x.mT
    return torch.linalg.norm(gram / scale**2 - torch.eye(len(gram), dtype=x.dtype)).item()


def train(net: nn.Module, weight, cls=torch.optim.SGD, steps: int = 5, **hyper) -> None:  # type: ignore
    optimizer = stiefel.optimizer(net, cls, **{"lr": 0.05, **hyper})
    target = gaussian(*weight().shape, seed=7)
    for _ in range(steps):
        optimizer.zero_grad()
        ((weight() * target).sum() + stiefel.penalty(net)).backward()
        optimizer.step()


SIZES = (3, 5, 12)
OPTIMIZERS = {"momentum": (torch.optim.SGD, {"momentum": 0.9}), "Adam": (torch.optim.Adam, {})}


@pytest.mark.parametrize("choice", OPTIMIZERS)
@pytest.mark.parametrize("method", FEASIBLE)
def test_blocks_stay_orthonormal_rows_or_columns_each(method, choice):
    """20 outputs of 8 inputs: two blocks have orthonormal rows, the third, of 12, orthonormal columns."""
    cls, hyper = OPTIMIZERS[choice]
    layer = nn.Linear(8, 20, dtype=DOUBLE)
    stiefel.constrain(layer, method, blocks=SIZES, **kwargs(method, scale=2.0))
    before = layer.weight.detach().clone()
    train(layer, lambda: layer.weight, cls, **hyper)
    assert torch.linalg.norm(layer.weight - before) > 1e-2
    for part in layer.weight.split(SIZES):
        assert off(part, scale=2.0) < 1e-13


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
@pytest.mark.parametrize("choice", OPTIMIZERS)
@pytest.mark.parametrize("method", FEASIBLE)
def test_rows_or_columns_stay_orthonormal_in_the_inner_product(method, choice, shape):
    cls, hyper = OPTIMIZERS[choice]
    net = nn.ParameterDict({"W": gaussian(*shape)})
    b = product(9)
    stiefel.constrain(net, method, layers=["W"], inner=b, **kwargs(method, scale=3.0))
    before = net["W"].detach().clone()
    train(net, lambda: net["W"], cls, **hyper)
    assert torch.linalg.norm(net["W"] - before) > 1e-2
    assert off(net["W"], b, scale=3.0) < 1e-12


@pytest.mark.parametrize("method", ["own", "retraction"])
def test_training_starts_at_the_nearest_point_in_the_metric_of_the_product(method):
    """Against scipy: the polar factor of W B^½, in the coordinates of the symmetric root."""
    import scipy.linalg

    w, b = gaussian(4, 9), product(9)
    net = stiefel.constrain(nn.ParameterDict({"W": w.clone()}), method, layers=["W"], inner=b, **kwargs(method))
    root = scipy.linalg.sqrtm(b.numpy())
    expected = scipy.linalg.polar(w.numpy() @ root)[0] @ scipy.linalg.inv(root)
    torch.testing.assert_close(net["W"].detach(), torch.from_numpy(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["own", "retraction", "riemannian"])
def test_canonical_correlations_are_found(method):
    """max tr(U C Vᵀ), U A Uᵀ = I, V B Vᵀ = I: the largest singular values of A^−½ C B^−½ (scipy)."""
    import scipy.linalg

    x, y = gaussian(200, 7, seed=1), gaussian(200, 5, seed=2)
    y[:, :3] += x[:, :3]
    a, b, c = x.mT @ x, y.mT @ y, x.mT @ y
    net = nn.ParameterDict({"U": gaussian(2, 7), "V": gaussian(2, 5, seed=4)})
    for name, inner in (("U", a), ("V", b)):
        stiefel.constrain(net, method, layers=[name], inner=inner, **kwargs(method))
    found = stiefel.minimize(net, lambda: -(net["U"] @ c @ net["V"].mT).trace())
    white = (
        scipy.linalg.inv(scipy.linalg.sqrtm(a.numpy())) @ c.numpy() @ scipy.linalg.inv(scipy.linalg.sqrtm(b.numpy()))
    )
    assert found.converged
    assert found.loss == pytest.approx(-scipy.linalg.svdvals(white)[:2].sum(), rel=1e-12)
    assert off(net["U"], a) < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_released_to_the_layer_as_it_was(method):
    model = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 4))
    names = [name for name, _ in model.named_parameters()]
    stiefel.constrain(model, method, layers=["0"], blocks=SIZES, **kwargs(method))
    x = torch.randn(5, 8)
    before = model(x)
    assert stiefel.release(model) is model
    assert [name for name, _ in model.named_parameters()] == names
    assert type(model[0]) is nn.Linear
    assert isinstance(model[0].weight, nn.Parameter)
    assert model[0].weight.requires_grad
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
    stiefel.constrain(model, method, **kwargs(method))


LAYERS = {
    "convolution": (lambda: nn.Conv2d(4, 10, 3, groups=2, dtype=DOUBLE), (2, 3), (1, 4, 8, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 10, 3, groups=2, dtype=DOUBLE), (2, 3), (1, 4, 8, 8)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("method", ["own", "retraction"])
def test_blocks_are_of_each_groups_outputs(method, layer):
    make, sizes, shape = LAYERS[layer]
    conv, plain = make(), make()
    stiefel.constrain(conv, method, blocks=sizes, **kwargs(method))
    weight = conv.weight.detach()
    if layer == "transposed":  # (groups · in, out, k, k), as the kernel of an ordinary convolution
        weight = weight.unflatten(0, (2, 2)).transpose(1, 2).flatten(0, 1)
    for group in weight.flatten(1).split(5):
        for part in group.split(sizes):
            assert off(part) < 1e-13
    plain.load_state_dict({"weight": conv.weight.detach(), "bias": conv.bias.detach()})
    x = gaussian(*shape)
    torch.testing.assert_close(conv(x), plain(x), rtol=0, atol=1e-13)
    conv(x).sum().backward()


def test_the_report_names_the_parts():
    model = stiefel.constrain(nn.Sequential(nn.Linear(8, 20)), "own", blocks=SIZES)
    assert [w.name for w in constrained_weights(model)] == ["0.weight[0:3]", "0.weight[3:8]", "0.weight[8:20]"]
    text = str(stiefel.report(model))
    assert "0.weight[8:20]" in text
    assert "12×8 columns" in text
    net = stiefel.constrain(nn.ParameterDict({"W": gaussian(4, 9)}), "own", layers=["W"], inner=product(9))
    assert [r.name for r in stiefel.report(net).rows] == ["W (inner)"]


@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_of_the_same_model_are_exact(method):
    net, other = nn.Linear(8, 20, dtype=DOUBLE), nn.Linear(8, 20, dtype=DOUBLE)
    for each in (net, other):
        stiefel.constrain(each, method, blocks=SIZES, **kwargs(method))
    train(net, lambda: net.weight)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.weight, net.weight)


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("method", ["own", "cayley", "retraction", "riemannian"])
def test_whole_weights_are_split_where_they_are_loaded(method, inner):
    more = {"inner": product(8)} if inner else {"blocks": (3, 2)}
    net = stiefel.constrain(nn.Linear(8, 5, dtype=DOUBLE), method, **kwargs(method), **more)
    held = stiefel.release(copy.deepcopy(net))
    train(net, lambda: net.weight)
    net.load_state_dict(held.state_dict())  # a plain one that is on the set
    torch.testing.assert_close(net.weight.detach(), held.weight.detach(), rtol=0, atol=1e-13)
    one = stiefel.constrain(nn.Linear(8, 5, dtype=DOUBLE), "own", center=False)
    if inner:
        with pytest.warns(UserWarning, match="moved"):
            net.load_state_dict(one.state_dict())
    else:
        net.load_state_dict(one.state_dict())
        torch.testing.assert_close(net.weight.detach(), one.weight.detach(), rtol=0, atol=1e-13)
    for other in ("own", "retraction"):
        with pytest.raises(stiefel.WeightError, match="matrices that it consisted of"):
            stiefel.constrain(nn.Linear(8, 5, dtype=DOUBLE), other).load_state_dict(net.state_dict())


@pytest.mark.parametrize("method", ["own", "retraction", "riemannian"])
def test_an_assigned_weight_starts_from_the_nearest(method):
    net = stiefel.constrain(nn.Linear(8, 20, dtype=DOUBLE), method, blocks=SIZES, **kwargs(method))
    given = gaussian(20, 8)
    net.weight = given
    for part, v in zip(net.weight.split(SIZES), given.split(SIZES), strict=True):
        u, _, vt = torch.linalg.svd(v, full_matrices=False)
        torch.testing.assert_close(part.detach(), u @ vt, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["own", "cayley", "retraction", "riemannian"])
def test_tied_recurrent_copied_and_compiled_models(method):
    tied = nn.Sequential(nn.Linear(8, 8, dtype=DOUBLE), nn.Linear(8, 8, dtype=DOUBLE))
    tied[1].weight = tied[0].weight
    stiefel.constrain(tied, method, layers=["0"], blocks=(3, 5), **kwargs(method))
    train(tied, lambda: tied[1].weight)
    assert torch.equal(tied[0].weight, tied[1].weight)
    stiefel.release(tied)
    assert tied[0].weight is tied[1].weight

    rnn = stiefel.constrain(nn.LSTM(8, 8, dtype=DOUBLE), method, layers=["weight_hh_l0"], blocks=(3, 5))
    rnn(gaussian(4, 1, 8))[0].sum().backward()
    twin = copy.deepcopy(rnn)
    assert torch.equal(twin(gaussian(4, 1, 8))[0], rnn(gaussian(4, 1, 8))[0])
    for gate in rnn.weight_hh_l0.split(8):
        assert max(off(part) for part in gate.split((3, 5))) < 1e-13

    torch.compiler.reset()
    net = stiefel.constrain(nn.Linear(8, 20, dtype=DOUBLE), method, blocks=SIZES, inner=None, **kwargs(method))
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    x = gaussian(2, 8)
    torch.testing.assert_close(compiled(x), net(x), rtol=0, atol=1e-13)


def test_dependence_and_other_measures_take_the_parts_as_layers():
    model = nn.Sequential(nn.Linear(8, 20, dtype=DOUBLE), nn.Tanh(), nn.Linear(20, 4, dtype=DOUBLE))
    stiefel.constrain(model, "own", layers=["0"], blocks=SIZES)
    stiefel.constrain(model, "own", layers=["2"])
    x = gaussian(5, 8)
    found = stiefel.measure.dependence(model, lambda m: m(x).square().sum())
    assert list(found.layers) == ["0.weight[0:3]", "0.weight[3:8]", "0.weight[8:20]", "2.weight"]
    assert found.turn.isfinite().all()
    assert set(stiefel.measure.redundancy(model)) == set(found.layers)


def test_groups_of_outputs_are_rows_in_the_inner_product_also_of_tall_weights():
    net = nn.Linear(4, 8, dtype=DOUBLE)
    with pytest.raises(stiefel.LayoutError, match=r"rows need an inner product of shape \(4, 4\)"):
        stiefel.constrain(net, "own", group_size=2, inner=product(8), center=False)
    b = product(4)
    stiefel.constrain(net, "own", group_size=2, inner=b, center=False)
    for rows in net.weight.split(2):
        torch.testing.assert_close(rows @ b @ rows.T, torch.eye(2, dtype=DOUBLE))
    assert stiefel.release(net).weight.shape == (8, 4)


def test_what_is_symmetric_to_rounding_is_taken_as_its_symmetric_part():
    b, off = product(8), 1e-7 * gaussian(8, 8, seed=5)
    net = stiefel.constrain(nn.Linear(8, 4, dtype=DOUBLE), "own", inner=b + off, center=False)
    part = (b + off + (b + off).T) / 2
    torch.testing.assert_close(net.weight @ part @ net.weight.T, torch.eye(4, dtype=DOUBLE), rtol=0, atol=1e-12)


def test_what_does_not_fit_is_refused_by_name_and_changes_nothing():
    net = nn.Linear(8, 20, dtype=DOUBLE)
    before = copy.deepcopy(net.state_dict())
    cases = [
        (stiefel.LayoutError, "add up to 19, and it has 20 outputs", {"blocks": [3, 4, 12]}),
        (stiefel.OptionError, "expected the outputs of each block", {"blocks": [20, 0]}),
        (stiefel.OptionError, "expected the outputs of each block", {"blocks": 20}),
        (stiefel.OptionError, "expected the outputs of each block", {"blocks": []}),
        (
            stiefel.LayoutError,
            r"need an inner product of shape \(20, 20\); inner has shape \(8, 8\)",
            {"inner": product(8)},
        ),
        (stiefel.LayoutError, "inner has list", {"inner": [[1.0]]}),
        (stiefel.OptionError, "expected a real matrix", {"inner": product(20).to(torch.complex128)}),
        (stiefel.OptionError, "positive definite", {"inner": -product(20)}),
        (stiefel.OptionError, "positive definite", {"inner": gaussian(20, 20) + 20 * torch.eye(20, dtype=DOUBLE)}),
        (stiefel.LayoutError, "use smaller blocks", {"inner": product(8), "blocks": [4, 16]}),
        (stiefel.LayoutError, "group_size=5 does not divide", {"blocks": [8, 12], "group_size": 5}),
    ]
    for error, match, options in cases:
        with pytest.raises(error, match=match):
            stiefel.constrain(net, "own", **options)
        assert type(net) is nn.Linear
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    stiefel.constrain(net, "own", blocks=[8, 12])
    with pytest.raises(stiefel.SelectionError, match="is constrained already, by own"):
        stiefel.constrain(net, "own")
    table = nn.Embedding(20, 32, sparse=True)
    for method in ("own", "retraction"):
        with pytest.raises(stiefel.WeightError, match="sparse=True"):
            stiefel.constrain(table, method, layers=["weight"], blocks=[8, 12])


@pytest.mark.filterwarnings("error")
def test_a_part_that_is_released_by_itself_counts_as_free_on_purpose():
    model = stiefel.constrain(nn.Sequential(nn.Linear(8, 20), nn.Linear(20, 20)), "own", blocks=[8, 12])
    stiefel.release(model[0])
    stiefel.optimizer(model, torch.optim.SGD, lr=0.1)


def test_a_layer_put_in_place_of_an_assembled_one_is_told():
    model = stiefel.constrain(nn.Sequential(nn.Linear(8, 20), nn.Linear(20, 20)), "own", blocks=[8, 12])
    for new in (nn.Linear(8, 20), nn.utils.parametrizations.weight_norm(nn.Linear(8, 20))):
        model[0] = new
        with pytest.warns(UserWarning, match=r"'0\.weight' have been replaced"):
            stiefel.optimizer(model, torch.optim.SGD, lr=0.1)


def test_tied_weights_go_back_to_their_own_places():
    linear, rnn = nn.Linear(8, 8), nn.RNN(8, 8)
    rnn.weight_hh_l0 = linear.weight
    model = nn.ModuleList([rnn, linear])
    names = [[name for name, _ in each.named_parameters()] for each in model]
    stiefel.constrain(model, "own", layers=["1"], blocks=[3, 5])
    stiefel.release(model)
    assert [[name for name, _ in each.named_parameters()] for each in model] == names
    assert rnn.weight_hh_l0 is linear.weight
