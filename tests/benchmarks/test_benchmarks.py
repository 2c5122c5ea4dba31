"""The project's own problems: every method of the catalogue on each, and what they are made of."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from common import compare
from torch import nn

import stiefel
from stiefel.compare import load_problem
from stiefel.compare.record.records import read_all
from stiefel.linalg import gram_residual, nearest_orthonormal, qf

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROBLEMS = ["omdsm", "mlp", "cnn"]
RAN = {"done", "target missed"}


@pytest.mark.parametrize(
    ("name", "setting"), [("omdsm", ()), ("mlp", ()), ("cnn", ("--net", "vgg"))], ids=["omdsm", "mlp", "cnn"]
)
def test_every_method_runs_every_problem_or_is_skipped_for_a_reason(name, setting, tmp_path):
    arguments = ("--budget", "tiny", "--scale", "relu", "--lr", "0.05", "--seeds", "1", "--no-cost")
    assert compare(BENCHMARKS / f"{name}.py", *arguments, *setting, "--out", str(tmp_path)) == 0
    records, faults = read_all([tmp_path])
    assert not faults
    told = {(r.spec.method, str(r.spec.fields)): (r.status, r.reason) for r in records if r.spec.phase == "tuning"}
    settings = {fields for _, fields in told}
    assert set(told) == {(method, fields) for method in stiefel.available() for fields in settings}
    for key, (status, reason) in told.items():
        assert status in RAN or (status == "skipped" and reason), (key, status, reason)
    finals = {(r.spec.method, str(r.spec.fields)) for r in records if r.spec.phase == "final" and r.status in RAN}
    assert finals == {key for key, (status, _) in told.items() if status != "skipped"}
    assert {m for m, _ in finals} >= {"unconstrained", "own", "riemannian", "soft", "pogo", "weight_norm"}


def test_the_other_convolutional_networks_are_trained(tmp_path):
    """By a method of each kind; all methods meet the layers that they share in the test above."""
    arguments = ("--budget", "tiny", "--net", "inception", "wrn", "--lr", "0.05", "--seeds", "1", "--no-cost")
    methods = ("own", "pogo", "soft")
    assert compare(BENCHMARKS / "cnn.py", *arguments, "--methods", *methods, "--out", str(tmp_path)) == 0
    records, faults = read_all([tmp_path])
    assert not faults
    assert {r.status for r in records} <= RAN
    assert {(r.spec.method, r.spec.fields["net"]) for r in records if r.spec.phase == "final"} == {
        (method, net) for method in methods for net in ("inception", "wrn")
    }


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("budget", ["small", "paper"])
def test_budgets_name_fields_and_values_that_the_problem_takes(name, budget):
    problem = load_problem(BENCHMARKS / f"{name}.py")
    chosen = {key: value for key, (value, *_) in problem.budgets[budget].items()}
    made = problem(**chosen)
    assert made.data == "fashion-mnist"
    model = made.make_model()
    images = torch.zeros(2, 1, 32, 32) if name == "cnn" else torch.zeros(2, 1024)
    assert model(images).shape == (2, 10)


def test_momentum_is_all_that_its_problem_adds(tmp_path):
    plain, other = (load_problem(BENCHMARKS / f"{name}.py")() for name in ("omdsm", "momentum"))
    assert plain.hyper == {}
    assert other.hyper == {"momentum": 0.9}
    assert plain.identity() == other.identity()
    arguments = ("--budget", "tiny", "--methods", "own", "riemannian", "--lr", "0.05", "--seeds", "1", "--no-cost")
    assert compare(BENCHMARKS / "momentum.py", *arguments, "--out", str(tmp_path)) == 0


# --- the baselines as released ---


def released(name, weights, biases, batches, lr, halve_after):
    """The released training, layer by layer: weights (out, in) with sums of gradients, ReLU between, a free head."""
    weights, biases = [w.clone() for w in weights], [b.clone() for b in biases]
    sums = [torch.zeros_like(w) for w in weights[:-1]]
    scheduled = lr
    for step, (x, y) in enumerate(batches):
        if step == halve_after:
            scheduled = lr / 2
        leaves = [t.clone().requires_grad_() for t in (*weights, *biases)]
        w, b = leaves[: len(weights)], leaves[len(weights) :]
        h = x
        for i in range(len(w)):
            h = (h if i == 0 else h.relu()) @ w[i].T + b[i]
        grads = torch.autograd.grad(nn.functional.cross_entropy(h, y), leaves)
        for i, total in enumerate(sums):
            total += grads[i]
            tall = weights[i].shape[0] >= weights[i].shape[1]
            m, g = (weights[i], total) if tall else (weights[i].T, total.T)
            new = update(name if name != "cayt" or i == 0 else "ei_qr", m, g, lr)
            weights[i] = new if tall else new.T
        weights[-1] = weights[-1] - scheduled * grads[len(weights) - 1]
        biases = [bias - scheduled * grad for bias, grad in zip(biases, grads[len(weights) :], strict=True)]
    return weights


def update(name, w, g, lr):
    n, p = w.shape
    if name == "cayt":
        a, eye = g @ w.T - w @ g.T, torch.eye(n, dtype=w.dtype)
        return torch.linalg.inv(eye + lr / 2 * a) @ ((eye - lr / 2 * a) @ w)
    direction = {
        "ei_qr": lambda: g - w @ (w.T @ g + (w.T @ g).T) / 2,
        "ci_qr": lambda: g - w @ (g.T @ w),
        "qr": lambda: g,
    }[name]()
    q, r = torch.linalg.qr(w - lr * direction)
    for i in range(p):
        if r[i, i] < 0:
            q[:, i] *= -1
    return q


@pytest.mark.parametrize("first", [(7, 12), (7, 4)], ids=["wide", "tall"])
@pytest.mark.parametrize("name", ["ei_qr", "ci_qr", "qr", "cayt"])
def test_as_released_is_the_released_loop(name, first):
    load_problem(BENCHMARKS / "omdsm.py")
    torch.manual_seed(0)
    width, inputs = first
    sizes = [inputs, width, width, width, 3]
    model = nn.Sequential()
    for i, (a, b) in enumerate(pairwise(sizes)):
        model.append(nn.Linear(a, b))
        if i < 3:
            model.append(nn.ReLU())
    stiefel.constrain(model.double(), f"{name}_as_released", exclude=["6"])
    layers = [model[i] for i in (0, 2, 4, 6)]
    weights, biases = [m.weight.detach().clone() for m in layers], [m.bias.detach().clone() for m in layers]
    start = [w @ w.T if len(w) <= w.shape[1] else w.T @ w for w in weights[:3]]
    on_the_set = [torch.allclose(s, torch.eye(len(s), dtype=s.dtype), atol=1e-8) for s in start]
    assert on_the_set == [name == "cayt", False, False]
    batches = [(torch.randn(8, inputs, dtype=torch.float64), torch.randint(3, (8,))) for _ in range(6)]
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.3)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
    for layer, expected in zip(layers, released(name, weights, biases, batches, 0.3, 3), strict=True):
        assert torch.allclose(layer.weight, expected, atol=1e-10)


def test_as_released_scales_with_the_set():
    """At scale s: s times the start, and after a step on s times the set."""
    load_problem(BENCHMARKS / "omdsm.py")
    starts = []
    for scale in (1.0, 2.0):
        torch.manual_seed(0)
        layer = stiefel.constrain(nn.Linear(9, 5).double(), "ei_qr_as_released", scale=scale)
        starts.append(layer.weight.detach().clone())
    assert torch.allclose(2 * starts[0], starts[1])
    assert starts[0].abs().max() <= 1 / 3
    optimizer = stiefel.optimizer(layer, torch.optim.SGD, lr=0.1)
    layer(torch.randn(4, 9, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    assert stiefel.report(layer).worst < 1e-12


def test_the_published_qr_baseline_can_ascend():
    """On the loss Re⟨G, W⟩, where GXᵀ has twice below the diagonal what it has above; a retraction descends."""
    load_problem(BENCHMARKS / "omdsm.py")
    x = nearest_orthonormal(torch.randn(1, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    above = torch.ones(5, 5, dtype=torch.float64).triu(1)
    g = (above + 2 * above.mT) @ x
    loss = {}
    for name, options in (("qr_projection", {}), ("projection", {"map": "qr"})):
        method = stiefel.get(name, **options)
        moved = method.step(x, -1e-3 * g, 1e-3)
        assert torch.linalg.matrix_norm(gram_residual(moved)) < 1e-14
        assert bool(method.faults) == (name == "qr_projection")
        loss[name] = float((g * (moved - x)).sum())
    torch.testing.assert_close(stiefel.get("qr_projection").step(x, -g, 1.0), qf(x - g))
    assert loss["qr_projection"] > 1e-3 > 0 > loss["projection"]


# --- what the networks are ---


def constrained(problem, method="own", **options):
    model = problem.make_model()
    problem.constrain(model, stiefel.get(method, **options))
    return {w.name: w.binding.layout.matrix_shape for w in stiefel.attach.constrained_weights(model)}


def test_every_layer_of_the_mlp_is_in_groups_and_the_head_is_one():
    mlp = load_problem(BENCHMARKS / "mlp.py")(data="fashion-mnist")
    found = constrained(mlp)
    assert list(found.values()) == [(2, 64, 1024), *[(2, 64, 128)] * 4, (1, 10, 128)]
    assert constrained(mlp, group_size=2)["head.weight"] == (5, 2, 128)


def test_layers_of_the_convolutional_networks():
    cnn = load_problem(BENCHMARKS / "cnn.py")
    full = {"data": "cifar-10", "width": 1.0, "depth": 28}
    vgg = constrained(cnn(net="vgg", **full))
    assert list(vgg.values()) == [(4, 16, 27), (2, 64, 576), (4, 64, 1152), (4, 64, 2304), (8, 64, 2304), (8, 64, 4608)]
    for which, count in (("first", 1), ("first2", 2), ("first4", 4)):
        assert list(constrained(cnn(net="vgg", layers=which, **full))) == list(vgg)[:count]
    wide = cnn(net="wrn", **full)
    assert len(constrained(wide)) == 25  # 28 layers less three shortcuts; the head is the 28th
    assert not any("shortcut" in name for name in constrained(wide))
    parameters = sum(p.numel() for p in wide.make_model().parameters())
    assert parameters == pytest.approx(36.5e6, rel=0.01)  # as its authors count


def test_augmented_batches_are_the_images_flipped_and_shifted():
    cnn = load_problem(BENCHMARKS / "cnn.py")
    images, labels = torch.randn(10, 2, 8, 8), torch.arange(10)
    batches = list(sys.modules[cnn.__module__].Augmented(images, labels, 4))
    assert [len(y) for _, y in batches] == [4, 4]
    for x, y in batches:
        for image, label in zip(x, y, strict=True):
            original = images[label]
            padded = [nn.functional.pad(o[None], (4,) * 4, mode="reflect")[0] for o in (original, original.flip(-1))]
            windows = [p[:, i : i + 8, j : j + 8] for p in padded for i in range(9) for j in range(9)]
            assert any(torch.equal(image, window) for window in windows)
