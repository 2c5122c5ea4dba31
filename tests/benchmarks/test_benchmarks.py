"""The project's own problems: every method of the catalogue on each, and what they are made of."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from common import compare
from torch import nn

import stiefel
from stiefel.compare import load_problem
from stiefel.compare.record.records import read_all
from stiefel.errors import ProblemError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROBLEMS = ["omdsm", "mlp", "cnn"]
RAN = {"done", "target missed"}


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        pytest.param("omdsm", (), id="omdsm", marks=pytest.mark.slow),
        pytest.param("mlp", (), id="mlp", marks=pytest.mark.slow),
        pytest.param("cnn", ("--net", "vgg"), id="cnn"),
    ],
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
    """By one method; all meet the layers that they share in the test above."""
    arguments = ("--budget", "tiny", "--net", "inception", "wrn", "--lr", "0.05", "--seeds", "1", "--no-cost")
    methods = ("own",)
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


# --- what the networks are ---


def constrained(problem, method="own", **options):
    model = problem.make_model()
    problem.constrain(model, stiefel.get(method, **options))
    return {w.name: w.binding.layout.matrix_shape for w in stiefel.attach.constrained_weights(model)}


def rates_of_omdsm(epochs: int, decay: str) -> list[float]:
    """The learning rate of each epoch, relative to the first."""
    problem = load_problem(BENCHMARKS / "omdsm.py")(epochs=epochs, decay=decay)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, rates = problem.schedule(optimizer), []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("epochs", [1, 2, 35, 80])
def test_the_rate_of_omdsm_is_halved_once_or_follows_a_cosine(epochs):
    """Halved after half of the epochs, rounded up: of 35 the last one had a quarter of it."""
    half = epochs // 2
    assert rates_of_omdsm(epochs, "half") == [1.0] * (epochs - half) + [0.5] * half
    angles = torch.arange(epochs, dtype=torch.float64) / epochs * torch.pi
    assert rates_of_omdsm(epochs, "cosine") == pytest.approx(((1 + angles.cos()) / 2).tolist())


def test_a_decay_that_omdsm_does_not_know_is_refused():
    with pytest.raises(ProblemError, match="decay='step': expected half or cosine"):
        load_problem(BENCHMARKS / "omdsm.py")(decay="step")


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
