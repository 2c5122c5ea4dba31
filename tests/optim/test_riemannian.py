"""Riemannian SGD and Adam through the public face, against hand-written loops, raw geoopt, and torch's optimizers."""

import copy
import io
import math
import pickle

import pytest
import torch
from common import LAYERS, gaussian
from torch import nn

import stiefel
from stiefel.compat.geoopt import geoopt
from stiefel.linalg import gram_residual, qf, sym
from stiefel.manifold.geometry import canonical_gradient, canonical_inner, project_tangent, random_stiefel

METRICS = ["euclidean", "canonical"]
RETRACTIONS = ["qr", "polar", "cayley", "exp"]
SCALES = [0.5, 1.0, math.sqrt(2), 3.0]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)  # for the layers' own initialization, which takes no generator


class Bare(nn.Module):
    """Named parameters without a layer, so that gradients are whatever a test sets."""

    def __init__(self, **shapes):
        super().__init__()
        for i, (name, shape) in enumerate(shapes.items()):
            setattr(self, name, nn.Parameter(gaussian(*shape, seed=50 + i)))


def constrained(names=("w",), options=None, **shapes):
    return stiefel.constrain(Bare(**shapes), "riemannian", layers=list(names), **(options or {}))


def gradients(w, steps, seed=30):
    """The gradients of a stochastic quadratic at w, one function of the weight per step."""
    generator = torch.Generator().manual_seed(seed)
    p, n = w.shape
    for _ in range(steps):
        a = torch.randn(n, n, generator=generator, dtype=torch.float64) / n
        t = torch.randn(p, n, generator=generator, dtype=torch.float64)
        yield lambda y, a=a, t=t: (y @ a - t) @ a.mT


def run(parameter, optimizer, steps=50, seed=30, transpose=False):
    for gradient in gradients(parameter.detach().mT if transpose else parameter.detach(), steps, seed):
        y = parameter.detach()
        parameter.grad = (gradient(y.mT).mT if transpose else gradient(y)).contiguous()
        optimizer.step()


def raw_geoopt(start, **hyper):
    """geoopt's own optimizer on its own manifold, which is column-orthonormal."""
    w = geoopt.ManifoldParameter(start.mT.contiguous().clone(), manifold=geoopt.EuclideanStiefel())
    return w, geoopt.optim.RiemannianSGD([w], **hyper)


# --- SGD against references ---


@pytest.mark.parametrize("shape", [(4, 9), (5, 5), (1, 6)], ids=str)
def test_sgd_equals_a_loop_by_hand(shape):
    model = constrained(w=shape)
    x = model.w.detach().clone()
    run(model.w, stiefel.optimizer(model, torch.optim.SGD, lr=0.1))
    for gradient in gradients(x, 50):
        g = gradient(x)
        x = qf(x - 0.1 * (g - sym(g @ x.mT) @ x))
    assert torch.allclose(model.w, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 9), (5, 5), (1, 6)], ids=str)
@pytest.mark.parametrize("hyper", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=str)
def test_sgd_equals_raw_geoopt(shape, hyper):
    model = constrained(w=shape)
    w, optimizer = raw_geoopt(model.w.detach(), lr=0.05, **hyper)
    if hyper:  # geoopt seeds its buffer with the raw gradient and adds the first gradient to that
        optimizer.state[w]["momentum_buffer"] = torch.zeros_like(w)
    run(w, optimizer, transpose=True)
    run(model.w, stiefel.optimizer(model, torch.optim.SGD, lr=0.05, **hyper))
    assert torch.allclose(model.w, w.mT, rtol=0, atol=1e-12)


def test_tall_weights_equal_raw_geoopt_without_a_transpose():
    model = constrained(w=(9, 4))
    w, optimizer = raw_geoopt(model.w.detach().mT, lr=0.05)
    run(w, optimizer)
    run(model.w, stiefel.optimizer(model, torch.optim.SGD, lr=0.05))
    assert torch.allclose(model.w, w, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_first_step_has_the_length_of_the_gradient(momentum, nesterov):
    lr = 1e-6
    model = constrained(w=(4, 9))
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=lr, momentum=momentum, nesterov=nesterov)
    x, g = model.w.detach().clone(), gaussian(4, 9, seed=1)
    model.w.grad = g.clone()
    optimizer.step()
    expected = lr * torch.linalg.norm(project_tangent(x, g)).item() * (1 + momentum if nesterov else 1)
    assert torch.linalg.norm(model.w.detach() - x).item() == pytest.approx(expected, rel=1e-4)


def test_dampening_with_momentum_by_hand():
    model = constrained(w=(4, 9))
    x, m = model.w.detach().clone(), None
    run(model.w, stiefel.optimizer(model, torch.optim.SGD, lr=0.1, momentum=0.8, dampening=0.3), steps=20)
    for gradient in gradients(x, 20):
        r = project_tangent(x, gradient(x))
        m = r if m is None else 0.8 * m + 0.7 * r
        x = qf(x - 0.1 * m)
        m = project_tangent(x, m)
    assert torch.allclose(model.w, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 12), (4, 8), (4, 6), (4, 4)], ids=str)
def test_canonical_cayley_equals_the_dense_formula(shape):
    model = constrained(options={"metric": "canonical", "retraction": "cayley"}, w=shape)
    x, eye = model.w.detach().clone(), torch.eye(shape[1], dtype=torch.float64)
    run(model.w, stiefel.optimizer(model, torch.optim.SGD, lr=0.1))
    for gradient in gradients(x, 50):
        g = gradient(x)
        a = g.mT @ x - x.mT @ g
        x = x @ (eye + 0.05 * a) @ torch.linalg.inv(eye - 0.05 * a)
    assert torch.allclose(model.w, x, rtol=0, atol=1e-12)


# --- the law of one step ---


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize("scale", SCALES)
def test_one_step_is_the_projected_gradient_at_every_scale(name, metric, retraction, scale):
    make, layout = LAYERS[name]
    constraint = stiefel.get("riemannian", metric=metric, retraction=retraction, scale=scale)
    a, b = constraint.coefficients
    errors = []
    for lr in (1e-2, 1e-3):
        layer = make().double()
        with torch.no_grad():
            layer.weight.copy_(gaussian(*layout.shape))
        stiefel.constrain(layer, constraint)
        before, c = layer.weight.detach().clone(), gaussian(*layout.shape, seed=9)
        optimizer = stiefel.optimizer(layer, torch.optim.SGD, lr=lr)
        (layer.weight * c).sum().backward()
        optimizer.step()
        x, g = layout.matrices(before) / scale, layout.matrices(c)
        gx = g @ x.mT
        expected = a * (gx - gx.mT) / 2 @ x + b * (g - gx @ x)
        moved = layout.matrices(layer.weight.detach() - before)
        errors.append(torch.linalg.norm(moved + lr * expected).item())
        assert errors[-1] < 0.5 * lr * torch.linalg.norm(expected)
        assert stiefel.report(layer).worst < 1e-12
    assert math.log10(errors[0] / errors[1]) >= 1.9


# --- weight decay ---


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam])
def test_weight_decay_does_not_move_the_weight_nor_touch_its_gradient(cls, metric):
    weights = []
    for weight_decay in (0.0, 0.3):
        model = constrained(options={"metric": metric, "scale": 2.0}, w=(4, 9), v=(3, 3))
        optimizer = stiefel.optimizer(model, cls, lr=0.05, weight_decay=weight_decay)
        for seed in range(10):
            model.w.grad, model.v.grad = gaussian(4, 9, seed=seed), gaussian(3, 3, seed=seed)
            before = model.w.grad.clone(), model.v.grad.clone()
            identity = model.w.grad
            optimizer.step()
            assert model.w.grad is identity
            assert torch.equal(model.w.grad, before[0])
            assert torch.equal(model.v.grad, before[1])
        weights.append((model.w.detach(), model.v.detach()))
    assert torch.allclose(weights[0][0], weights[1][0], rtol=0, atol=1e-12)
    assert not torch.allclose(weights[0][1], weights[1][1], rtol=0, atol=1e-3)  # ordinary parameters do decay


# --- ordinary parameters ---


@pytest.mark.parametrize(
    ("cls", "hyper"),
    [
        (torch.optim.SGD, {}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1}),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        (torch.optim.Adam, {}),
        (torch.optim.Adam, {"betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.1}),
        (torch.optim.Adam, {"amsgrad": True}),
    ],
    ids=lambda v: v.__name__ if isinstance(v, type) else str(v),
)
def test_ordinary_parameters_follow_torch(cls, hyper):
    model = constrained(w=(3, 5), v=(4, 2), u=(6,))
    plain = Bare(w=(3, 5), v=(4, 2), u=(6,))
    ours, torchs = stiefel.optimizer(model, cls, lr=0.1, **hyper), cls(plain.parameters(), lr=0.1, **hyper)
    for step in range(40):
        for name, parameter in plain.named_parameters():
            parameter.grad = gaussian(*parameter.shape, seed=1000 + step) * (1 + math.sin(step))
            getattr(model, name).grad = parameter.grad.clone()
        ours.step()
        torchs.step()
    assert torch.allclose(model.v, plain.v, rtol=0, atol=1e-12)
    assert torch.allclose(model.u, plain.u, rtol=0, atol=1e-12)
    assert not torch.allclose(model.w, plain.w, rtol=0, atol=1e-2)


# --- Adam ---


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_first_adam_step_is_as_long_as_that_of_torch(name, scale):
    make, layout = LAYERS[name]
    layer = stiefel.constrain(make().double(), "riemannian", scale=scale)
    before = layer.weight.detach().clone()
    lr = 1e-6
    optimizer = stiefel.optimizer(layer, torch.optim.Adam, lr=lr)
    layer.weight.grad = gaussian(*layout.shape, seed=1)
    optimizer.step()
    _, p, n = layout.matrix_shape
    lengths = torch.linalg.matrix_norm(layout.matrices(layer.weight.detach() - before))
    assert torch.allclose(lengths, torch.full_like(lengths, lr * math.sqrt(p * n)), rtol=1e-3, atol=0)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("metric", METRICS)
def test_adam_equals_a_loop_by_hand(metric, amsgrad):
    p, n = 4, 9
    model = constrained(options={"metric": metric}, w=(p, n))
    x = model.w.detach().clone()
    run(model.w, stiefel.optimizer(model, torch.optim.Adam, lr=0.05, betas=(0.8, 0.95), amsgrad=amsgrad), steps=30)
    m, v, largest = torch.zeros_like(x), 0.0, 0.0
    for t, gradient in enumerate(gradients(x, 30), start=1):
        g = gradient(x)
        r = project_tangent(x, g) if metric == "euclidean" else canonical_gradient(x, g)
        square = (r * r).sum() if metric == "euclidean" else canonical_inner(x, r, r)
        m = 0.8 * m + 0.2 * r
        v = 0.95 * v + 0.05 * square.item() / (p * n)
        largest = max(largest, v) if amsgrad else v
        step = 0.05 * m / (1 - 0.8**t) / (math.sqrt(largest / (1 - 0.95**t)) + 1e-8)
        x = qf(x - step)
        m = project_tangent(x, m)
    assert torch.allclose(model.w, x, rtol=0, atol=1e-12)


# --- long runs ---


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam])
def test_stabilize_with_momentum_does_not_blow_up(metric, cls):
    model = constrained(options={"metric": metric}, w=(4, 6))
    hyper = {"momentum": 0.9} if cls is torch.optim.SGD else {}
    optimizer = stiefel.optimizer(model, cls, lr=0.05, stabilize=10, **hyper)
    t = gaussian(4, 6, seed=2)
    best = torch.linalg.svdvals(t).sum()  # the maximum of <W, T> over the set
    for _ in range(600):
        model.w.grad = -t
        optimizer.step()
    assert stiefel.report(model).worst < 1e-12
    assert (model.w * t).sum() > 0.99 * best
    state = optimizer.state[model.w]
    buffer = state["momentum_buffer" if cls is torch.optim.SGD else "exp_avg"]
    assert torch.linalg.norm(buffer) < 10 * torch.linalg.norm(t)


@pytest.mark.sampled(2, values=False)
@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize(
    ("shape", "steps"),
    [((2, 4, 12), 2_000), *(pytest.param(s, 10_000, marks=pytest.mark.slow) for s in ((2, 4, 12), (2, 6, 6)))],
    ids=str,
)
def test_thousands_of_steps_stay_orthogonal_in_float32(shape, steps, retraction):
    model = Bare(w=shape).float()
    metric = "canonical" if retraction == "cayley" else "euclidean"
    stiefel.constrain(model, "riemannian", layers=["w"], metric=metric, retraction=retraction)
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.01, momentum=0.9)
    noise = torch.randn(503, *shape, generator=torch.Generator().manual_seed(8))
    start = model.w.detach().clone()
    for step in range(steps):
        model.w.grad = noise[step % 503]
        optimizer.step()
    residual = torch.linalg.matrix_norm(gram_residual(model.w.detach().double())) / shape[1] ** 0.5
    # Rounding of one step, with nothing added up: drift without correction is above 1e-6 by then.
    assert residual.max() <= 1e-6
    assert torch.linalg.norm(model.w.detach() - start) > 0.5  # it did move


# --- state ---


def train(model, optimizer, steps, seed=0):
    for step in range(steps):
        for i, p in enumerate(model.parameters()):
            p.grad = gaussian(*p.shape, seed=10_000 * seed + 100 * step + i)
        optimizer.step()


OPTIMIZERS = [
    (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "stabilize": 4}),
    (torch.optim.Adam, {"lr": 0.05, "amsgrad": True}),
]
every_optimizer = pytest.mark.parametrize(
    ("cls", "hyper"), OPTIMIZERS, ids=["sgd", "nesterov-stabilize", "adam-amsgrad"]
)


def three():
    return constrained(("a", "b"), {"scale": 2.0}, a=(3, 7), b=(7, 3), c=(2, 2))


def assert_same(first, second):
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


@every_optimizer
def test_a_run_resumes_bit_for_bit_from_state_dicts(cls, hyper):
    model = three()
    optimizer = stiefel.optimizer(model, cls, **hyper)
    train(model, optimizer, 7)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    train(model, optimizer, 7, seed=1)

    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed = three()
    other = stiefel.optimizer(resumed, cls, **hyper)
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    train(resumed, other, 7, seed=1)
    assert_same(model, resumed)


@every_optimizer
def test_a_copied_model_trains_with_a_new_optimizer(cls, hyper):
    model = three()
    train(model, stiefel.optimizer(model, cls, **hyper), 3)
    copied = copy.deepcopy(model)
    train(copied, stiefel.optimizer(copied, cls, **hyper), 5, seed=1)
    assert not torch.equal(copied.a, model.a)
    train(model, stiefel.optimizer(model, cls, **hyper), 5, seed=1)
    assert_same(model, copied)
    assert stiefel.report(copied).worst < 1e-12


@every_optimizer
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_model_and_optimizer_duplicate_together(cls, hyper, duplicate):
    model = three()
    optimizer = stiefel.optimizer(model, cls, **hyper)
    train(model, optimizer, 3)
    twin, other = duplicate((model, optimizer))
    train(model, optimizer, 9, seed=1)
    train(twin, other, 9, seed=1)
    assert_same(model, twin)
    assert stiefel.report(twin).worst < 1e-12


@every_optimizer
def test_a_late_first_gradient_starts_its_own_state(cls, hyper):
    """Two weights of one shape move together, but the one that starts late moves as if it had started alone."""
    hyper = {k: v for k, v in hyper.items() if k != "stabilize"}
    model = constrained(("a", "b"), a=(3, 7), b=(3, 7))
    alone = constrained(("a", "b"), a=(3, 7), b=(3, 7))
    optimizer, other = stiefel.optimizer(model, cls, **hyper), stiefel.optimizer(alone, cls, **hyper)
    start = model.b.detach().clone()
    for step in range(10):
        model.a.grad = gaussian(3, 7, seed=step)
        model.b.grad = gaussian(3, 7, seed=100 + step) if step >= 4 else None
        alone.b.grad = model.b.grad
        optimizer.step()
        if step < 4:
            assert torch.equal(model.b, start)
        other.step()
    assert torch.allclose(model.b, alone.b, rtol=0, atol=1e-13)
    first = constrained(("a",), a=(3, 7))
    single = stiefel.optimizer(first, cls, **hyper)
    for step in range(10):
        first.a.grad = gaussian(3, 7, seed=step)
        single.step()
    assert torch.allclose(model.a, first.a, rtol=0, atol=1e-13)


def test_parameter_groups_keep_their_own_rates():
    model = constrained(("a", "b"), a=(3, 7), b=(3, 7))
    groups = [{"params": [model.a], "lr": 0.2}, {"params": [model.b]}]
    optimizer = stiefel.optimizer(model, torch.optim.SGD, groups, lr=0.01, momentum=0.5)
    train(model, optimizer, 5)
    for name, lr in (("a", 0.2), ("b", 0.01)):
        alone = constrained(("a", "b"), a=(3, 7), b=(3, 7))
        train(alone, stiefel.optimizer(alone, torch.optim.SGD, lr=lr, momentum=0.5), 5)
        assert torch.allclose(getattr(model, name), getattr(alone, name), rtol=0, atol=1e-13)


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam])
def test_a_closure_is_evaluated_once_with_gradients(cls):
    model, reference = constrained(w=(3, 7)), constrained(w=(3, 7))
    t = gaussian(3, 7, seed=1)
    optimizer, plain = stiefel.optimizer(model, cls, lr=0.1), stiefel.optimizer(reference, cls, lr=0.1)
    calls = []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = ((model.w - t) ** 2).sum()
        loss.backward()
        return loss

    expected = ((model.w - t) ** 2).sum().item()
    assert optimizer.step(closure).item() == pytest.approx(expected)
    assert len(calls) == 1
    ((reference.w - t) ** 2).sum().backward()
    plain.step()
    assert torch.allclose(model.w, reference.w, rtol=0, atol=1e-14)


def test_schedulers_change_the_rate():
    model = constrained(w=(3, 7))
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.0)
    train(model, optimizer, 1)
    scheduler.step()
    before = model.w.detach().clone()
    train(model, optimizer, 1, seed=1)
    assert torch.allclose(model.w, before, rtol=0, atol=1e-13)


# --- what is refused ---


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("flag", ["maximize", "fused", "capturable", "differentiable"])
def test_flags_that_would_be_ignored_are_refused(cls, flag):
    with pytest.raises(stiefel.OptimizerError, match=flag):
        stiefel.optimizer(constrained(w=(3, 7)), cls, lr=0.1, **{flag: True})


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("flag", ["maximize", "fused"])
def test_flags_of_a_parameter_group_are_refused(cls, flag):
    model = constrained(w=(3, 7))
    with pytest.raises(stiefel.OptimizerError, match=flag):
        stiefel.optimizer(model, cls, [{"params": [model.w], flag: True}], lr=0.1)


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_other_optimizers_are_refused(cls):
    with pytest.raises(stiefel.OptimizerError, match=cls.__name__):
        stiefel.optimizer(constrained(w=(3, 7)), cls, lr=0.1)


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam])
def test_unknown_options_are_refused(cls):
    with pytest.raises(stiefel.OptimizerError, match="warp"):
        stiefel.optimizer(constrained(w=(3, 7)), cls, lr=0.1, warp=9)


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam])
def test_a_plain_optimizer_is_refused_at_its_first_step(cls):
    model = constrained(w=(3, 7))
    model.w.grad = gaussian(3, 7)
    before = model.w.detach().clone()
    with pytest.raises(stiefel.OptimizerError, match="'w'"):
        cls(model.parameters(), lr=0.1).step()
    assert torch.equal(model.w, before)


# --- the manifold behind it ---


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", LAYERS)
def test_manifold_passes_geoopts_own_checks(name, metric):
    make, layout = LAYERS[name]
    layer = stiefel.constrain(make().double(), "riemannian", metric=metric, scale=2.0)
    manifold, w = layer.weight.manifold, layer.weight.detach()
    assert manifold.check_point_on_manifold(w)
    assert not manifold.check_point_on_manifold(1.1 * w)
    u, v = gaussian(*layout.shape, seed=1), gaussian(*layout.shape, seed=2)
    r = manifold.proju(w, v)
    assert manifold.check_vector_on_tangent(w, r)
    assert not manifold.check_vector_on_tangent(w, w)
    assert torch.allclose(manifold.proju(w, r), r, rtol=0, atol=1e-12)
    # <grad, r> in the metric is <G, r> in the entries.
    assert torch.allclose(manifold.inner(w, manifold.egrad2rgrad(w, u), r), (u * r).sum(), rtol=0, atol=1e-12)
    share = manifold.component_inner(w, r)
    assert share.shape == w.shape
    assert torch.allclose(share.sum(), manifold.inner(w, r), rtol=0, atol=1e-12)
    assert torch.allclose(manifold.projx(1.7 * w), w, rtol=0, atol=1e-12)
    assert manifold.check_point_on_manifold(manifold.expmap(w, r))
    drawn = manifold.random(generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    again = random_stiefel(*layout.matrix_shape, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(layout.matrices(drawn), 2 * again, rtol=0, atol=1e-12)
    assert manifold.check_point_on_manifold(manifold.origin(dtype=torch.float64))


def test_a_dampening_that_is_no_number_is_refused_at_once():
    """geoopt would see it in the second step."""
    model = stiefel.constrain(Bare(w=(1, 3, 7)), "riemannian", layers=["w"])
    with pytest.raises(stiefel.OptimizerError, match="dampening"):
        stiefel.optimizer(model, torch.optim.SGD, lr=0.1, momentum=0.9, dampening=(2.0, -1.0))
