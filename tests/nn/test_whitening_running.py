"""Running statistics of whitening layers: what they average, the affine map of eval(), copies, exporters, compilers."""

import copy
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from common import PeakMemory, gaussian
from costs.elsewhere import elsewhere
from formulas import close
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

import stiefel
from stiefel.linalg import whitening_of
from stiefel.nn import Whitening1d, Whitening2d
from stiefel.nn.running import RunningCovariance

KINDS = ["zca", "pca", "newton"]


def trained(cls=Whitening1d, batches=3, **options):
    """A layer that has seen some batches, and its parameters no longer 1 and 0."""
    layer = cls(6, **{"groups": 2, "dtype": torch.float64, **options})
    with torch.no_grad():
        layer.weight.copy_(gaussian(6, seed=8))
        layer.bias.copy_(gaussian(6, seed=9))
    for seed in range(batches):
        layer(batch(cls, seed).to(layer.running_cov.dtype))
    return layer


def batch(cls=Whitening1d, seed=0):
    shape = (20, 6) if cls is Whitening1d else (4, 6, 3, 5)
    return (gaussian(*shape, seed=seed).movedim(1, -1) @ gaussian(6, 6, seed=99) + 2).movedim(-1, 1).contiguous()


@pytest.mark.parametrize("cls", [Whitening1d, Whitening2d])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_means_and_covariances_are_averaged(cls, momentum):
    layer = trained(cls, momentum=momentum)
    mean, cov = np.zeros(6), np.stack([np.eye(3)] * 2)
    for step in range(3):
        rows = batch(cls, step).movedim(1, -1).reshape(-1, 6).numpy()
        share = 1 / (step + 1) if momentum is None else momentum
        mean += share * (rows.mean(0) - mean)
        cov += share * (np.stack([np.cov(part.T) for part in np.split(rows, 2, axis=1)]) - cov)
    assert close(layer.running_mean, mean, 1e-13)
    assert close(layer.running_cov, cov, 1e-13)
    assert layer.num_batches_tracked == 3


@pytest.mark.parametrize("cls", [Whitening1d, Whitening2d])
@pytest.mark.parametrize("kind", KINDS)
def test_eval_is_the_affine_map_of_the_averages(cls, kind):
    layer, x = trained(cls, kind=kind, eps=1e-3).eval(), batch(cls, 7)
    before = copy.deepcopy(layer.state_dict())
    y = layer(x).movedim(1, -1).reshape(-1, 2, 3)
    w = whitening_of(layer.running_cov, kind, 1e-3)
    eye = torch.eye(3, dtype=torch.float64)
    if kind != "newton":
        assert close(w @ (layer.running_cov + 1e-3 * eye) @ w.mT, eye.expand(2, 3, 3), 1e-12)
    rows = (x.movedim(1, -1).reshape(-1, 6) - layer.running_mean).reshape(-1, 2, 3)
    expected = torch.einsum("gij,ngj->ngi", w, rows) * layer.weight.view(2, 3) + layer.bias.view(2, 3)
    assert close(y, expected, 1e-12)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), layer.state_dict().values(), strict=True))
    assert layer(x[:1]).shape == x[:1].shape  # one sample is enough
    assert layer(x[:0]).shape == x[:0].shape


def test_the_averages_of_many_batches_whiten_a_new_one():
    torch.manual_seed(0)
    mix = torch.randn(8, 8)
    layer = Whitening1d(8, momentum=None, affine=False)
    for _ in range(200):
        layer(torch.randn(100, 8) @ mix + 1)
    y = layer.eval()(torch.randn(100_000, 8) @ mix + 1)
    assert (torch.cov(y.T) - torch.eye(8)).abs().max() < 0.06


def test_the_covariance_is_averaged_since_the_average_of_matrices_is_biased():
    torch.manual_seed(0)
    x = torch.randn(500, 24, 12, dtype=torch.float64)  # batches of 24 samples, true covariance I
    covariances = torch.stack([torch.cov(b.T) for b in x])
    of_average = whitening_of(covariances.mean(0)[None])[0]
    average = whitening_of(covariances).mean(0)
    eye = torch.eye(12, dtype=torch.float64)
    assert torch.linalg.matrix_norm(of_average - eye) < 0.15
    assert torch.linalg.matrix_norm(average - eye) > 1.0


def test_without_running_statistics_eval_whitens_over_the_batch():
    layer = Whitening1d(6, track_running_stats=False)
    assert list(layer.state_dict()) == ["weight", "bias"]
    x = batch().float()
    assert torch.equal(layer(x), layer.eval()(x))
    layer.reset_running_stats()


def test_a_reset_layer_is_a_new_one():
    layer = trained().eval()
    layer.reset_parameters()
    assert close(layer(batch()), batch() / (1 + 1e-5) ** 0.5, 1e-12)
    assert layer.num_batches_tracked == 0


# --- the matrix is made once, and made anew whenever it has to be ---


@pytest.fixture
def counted(monkeypatch):
    """The number of times that a matrix was computed."""
    made = []
    computed = RunningCovariance._computed
    monkeypatch.setattr(RunningCovariance, "_computed", lambda self: made.append(1) or computed(self))
    return made


def test_the_matrix_is_computed_once_for_an_evaluation(counted):
    layer = trained()
    assert not counted  # training needs none
    layer.eval()
    for seed in range(5):
        layer(batch(seed=seed))
    assert len(counted) == 1


CHANGES = {
    "in place": lambda layer: layer.running_cov.mul_(3),
    "eps": lambda layer: setattr(layer, "eps", 0.5),
    "kind": lambda layer: setattr(layer, "kind", "pca"),
    "another tensor": lambda layer: setattr(layer, "running_cov", 4 * layer.running_cov),
    "data and eval": lambda layer: (layer.running_cov.data.mul_(3), layer.eval()),
    "load": lambda layer: layer.load_state_dict(trained(batches=5).state_dict()),
    "assign": lambda layer: layer.load_state_dict(trained(batches=5).state_dict(), assign=True),
    "training": lambda layer: (layer.train()(batch(seed=11)), layer.eval()),
    "reset": lambda layer: layer.reset_running_stats(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_no_matrix_outlives_its_covariance(change):
    layer, x = trained().eval(), batch(seed=7)
    before = layer(x).clone()
    CHANGES[change](layer)
    after = layer(x)
    fresh = Whitening1d(6, layer.eps, groups=2, kind=layer.kind, dtype=torch.float64)
    fresh.load_state_dict(layer.state_dict())
    assert close(after, fresh.eval()(x), 1e-12)
    assert not close(after, before, 1e-2)


def test_a_layer_goes_through_copies_pickles_checkpoints_and_conversions():
    layer, x = trained(dtype=torch.float32).eval(), batch(seed=7).float()
    y = layer(x)
    assert list(layer.state_dict()) == ["weight", "bias", "running_mean", "running_cov", "num_batches_tracked"]
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    others = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)]
    for other in others:
        assert torch.equal(other(x), y)
        other.train()(x)
        assert not torch.equal(other.eval()(x), y)
    assert torch.equal(layer(x), y)
    wide = copy.deepcopy(layer).double()
    assert wide(x.double()).dtype == torch.float64
    exact = whitening_of(wide.running_cov, "zca", 1e-5)
    assert close(wide.current_matrix(), exact, 1e-13)
    meta = copy.deepcopy(layer).to("meta")
    assert meta.eval()(x.to("meta")).shape == x.shape
    empty = Whitening1d(6, groups=2, device="meta").eval().to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), y)


def test_evaluation_in_inference_mode_leaves_a_layer_that_trains():
    layer, x = trained(), batch(seed=7)
    with torch.inference_mode():
        layer.eval()
        y = layer(x)
    again = layer(x.requires_grad_())
    assert torch.equal(again, y)
    again.sum().backward()
    assert layer.weight.grad is not None
    with torch.inference_mode():
        layer.train()(x)
    layer(x).sum().backward()


def test_gradients_of_an_evaluation_outlast_the_next_one():
    layer, x = trained().eval(), batch(seed=7).requires_grad_()
    y = layer(x)
    layer.train().eval()
    y.sum().backward()
    w = whitening_of(layer.running_cov, "zca", 1e-5) * layer.weight.detach().view(2, 3, 1)
    assert close(x.grad[0], w.sum(1).flatten(), 1e-12)


def test_averaged_models_average_the_covariances():
    layer = trained()
    averaged = torch.optim.swa_utils.AveragedModel(layer, use_buffers=True)
    averaged.update_parameters(layer)
    first = layer.running_cov.clone()
    layer(batch(seed=20))
    averaged.update_parameters(layer)
    assert close(averaged.module.running_cov, (first + layer.running_cov) / 2, 1e-12)
    x = batch(seed=7)
    fresh = Whitening1d(6, groups=2, dtype=torch.float64)
    fresh.load_state_dict(averaged.module.state_dict())
    assert close(averaged.eval()(x), fresh.eval()(x), 1e-12)


# --- states that a layer is called with ---


def called_with(state, x):
    """What a layer of this state computes."""
    fresh = Whitening1d(6, groups=2, dtype=torch.float64)
    fresh.load_state_dict(state)
    return fresh.eval()(x)


@pytest.mark.parametrize("kind", KINDS)
def test_a_transform_takes_the_state_that_it_is_given(kind):
    layer, x = trained(kind=kind).eval(), batch(seed=7)
    states = [trained(batches=n, kind=kind).state_dict() for n in (1, 2, 5)]
    layers = [Whitening1d(6, groups=2, kind=kind, dtype=torch.float64) for _ in states]
    for each, state in zip(layers, states, strict=True):
        each.load_state_dict(state)
    expected = torch.stack([each.eval()(x) for each in layers])
    stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    assert close(vmap(lambda state: functional_call(layer, state, (x,)))(stacked), expected, 1e-12)
    assert close(vmap(lambda *state: functional_call(layer, state, (x,)))(*stack_module_state(layers)), expected, 1e-12)
    own = grad(lambda x: layers[1](x).pow(2).sum())(x)
    assert close(grad(lambda x: functional_call(layer, states[1], (x,)).pow(2).sum())(x), own, 1e-12)


@pytest.mark.usefixtures("_compiler")
def test_a_state_that_a_layer_was_called_with_leaves_no_matrix(counted):
    layer, x = trained().eval(), batch(seed=7)
    other, before = trained(batches=6).state_dict(), layer(x)
    assert close(functional_call(layer, other, (x,)), called_with(other, x), 1e-12)
    counted.clear()
    assert close(layer(x), before, 1e-14)
    assert close(vmap(lambda t: layer(t[None])[0])(x), before, 1e-12)
    assert close(torch.compile(layer, backend="eager")(x), before, 1e-12)
    assert close(torch.export.export(layer, (x,)).module()(x), before, 1e-12)
    assert not counted


def test_a_transform_follows_what_was_written_to_the_covariance():
    layer, x = trained().eval(), batch(seed=7)
    layer.running_cov.mul_(9)
    leaf = x.clone().requires_grad_()
    found = grad(lambda x: layer(x).pow(2).sum())(x)  # before a plain call has made the matrix anew
    (expected,) = torch.autograd.grad(called_with(layer.state_dict(), leaf).pow(2).sum(), leaf)
    assert close(found, expected, 1e-12)


@pytest.mark.parametrize("move", [lambda layer: layer.float().double(), copy.deepcopy], ids=["conversion", "copy"])
def test_a_converted_or_copied_layer_computes_its_matrix_once(counted, move):
    layer, x = move(trained().eval()), batch(seed=7)
    counted.clear()
    for _ in range(3):
        assert close(layer(x), called_with(layer.state_dict(), x), 1e-12)
    assert len(counted) == 1 + 3  # and those of the layers that it is compared with


# --- exporters and compilers ---


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [True, False])
def test_a_layer_without_running_statistics_is_compiled(kind, mode):
    layer = Whitening1d(6, kind=kind, track_running_stats=False, dtype=torch.float64).train(mode)
    assert close(torch.compile(layer, backend="eager")(batch()), layer(batch()), 1e-12)


@pytest.fixture
def _compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Net(nn.Module):
    def __init__(self, cls):
        super().__init__()
        self.layer = cls

    def forward(self, x):
        return torch.relu(self.layer(x))


def operations(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cls", [Whitening1d, Whitening2d])
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_evaluation_is_an_affine_map(cls, kind, strict):
    net = Net(trained(cls, kind=kind, dtype=torch.float32)).eval()
    net.load_state_dict(Net(trained(cls, kind=kind, batches=4, dtype=torch.float32)).state_dict())
    x = batch(cls, 7).float()
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2, max=64)},), strict=strict)
    found = operations(program)
    assert not [name for name in found if "linalg" in name or "eigh" in name]
    assert any("bmm" in name for name in found)
    for other in (x, batch(cls, 8).float()[:3]):
        assert close(program.module()(other).double(), net(other).double(), 1e-5)


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("cls", [Whitening1d, Whitening2d])
def test_a_compiled_evaluation_is_the_same_and_follows_what_is_loaded(cls):
    net, x = Net(trained(cls, dtype=torch.float32)).eval(), batch(cls, 7).float()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert close(compiled(x).double(), net(x).double(), 1e-6)
    net.load_state_dict(Net(trained(cls, batches=6, dtype=torch.float32)).state_dict())
    assert close(compiled(x).double(), net(x).double(), 1e-6)
    net.train()(x)
    net.eval()
    assert close(compiled(x).double(), net(x).double(), 1e-6)


def test_a_traced_evaluation_is_the_same():
    net, x = Net(trained(Whitening2d, dtype=torch.float32)).eval(), batch(Whitening2d, 7).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(net, (x,))
    assert close(traced(x).double(), net(x).double(), 1e-6)


@pytest.mark.sampled(3)
@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cls", [Whitening1d, Whitening2d])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_a_compiled_training_step_is_the_same(cls, kind, groups):
    x = batch(cls, seed=3)
    results = []
    for compiles in (False, True):
        layer = trained(cls, kind=kind, groups=groups)
        net = Net(layer)
        function = torch.compile(net, backend="aot_eager", fullgraph=True) if compiles else net
        y = function(x)
        y.pow(2).sum().backward()
        results.append([y, layer.weight.grad, layer.bias.grad, layer.running_cov])
    assert all(close(a, b, 1e-10) for a, b in zip(*results, strict=True))


# --- devices and memory ---


@pytest.mark.parametrize("kind", ["zca", "newton"])
def test_a_step_in_float32_waits_for_no_device(kind):
    layer, x = Whitening1d(16, kind=kind, momentum=None), gaussian(100, 16, dtype=torch.float32).requires_grad_()
    g = gaussian(100, 16, seed=1, dtype=torch.float32)
    found = []
    for there in (True, False):
        made = copy.deepcopy(layer)
        if there:
            with elsewhere("cuda"):
                y = made(x)
                (gradient,) = torch.autograd.grad(y, x, g)
        else:
            y = made(x)
            (gradient,) = torch.autograd.grad(y, x, g)
        found.append([t.detach() for t in (y, gradient, made.running_cov, made.running_mean)])
    for ours, here in zip(*found, strict=True):
        assert close(ours.as_subclass(torch.Tensor).double(), here.double(), 1e-5)


def test_a_step_makes_few_tensors_of_the_batchs_size():
    """Pixels are many: a batch in float64 at once would double the memory."""
    layer, x = Whitening2d(16), gaussian(8, 16, 64, 64, dtype=torch.float32)
    layer(x[:1])
    with PeakMemory() as peak, torch.no_grad():
        layer(x)
    assert peak.bytes < 4.5 * x.numel() * x.element_size()


def test_the_backward_pass_holds_one_tensor_of_the_batchs_size():
    layer, x, kept = Whitening1d(32), gaussian(2000, 32, dtype=torch.float32).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    large = [t for t in kept if t.numel() >= x.numel()]
    assert {t.untyped_storage().data_ptr() for t in large} == {x.untyped_storage().data_ptr()}


def test_the_library_has_the_layers():
    assert stiefel.nn.Whitening1d is Whitening1d
    assert "stiefel.nn.whitening" in Whitening1d.__module__
