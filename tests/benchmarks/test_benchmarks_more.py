"""The benchmarks of recurrent networks, adversarial networks and known optima: facts, and every method end to end."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from common import gaussian
from parts.modrelu import ModReLU
from stability import Stability, stability
from torch import nn

import stiefel
from stiefel.compare import cli, load_problem
from stiefel.compare.record.measurements import lines_of, parsed
from stiefel.compare.record.records import Record, read_all
from stiefel.compare.record.spec import RunSpec
from stiefel.compare.worker.training import Training
from stiefel.errors import ProblemError

FOLDER = Path(__file__).parents[2] / "benchmarks"
RNN, GAN, CLOSED_FORM = (load_problem(FOLDER / f"{name}.py") for name in ("rnn", "gan", "closed_form"))
rnn, gan, closed_form = (sys.modules[cls.__module__] for cls in (RNN, GAN, CLOSED_FORM))
frechet = gan.frechet


# --- end to end ---

SOME, ALL = ("own", "riemannian", "soft", "unconstrained"), (*stiefel.available(), "default")


@pytest.mark.parametrize(
    ("name", "settings", "lr"),
    [
        ("gan", 1, 1e-3),
        ("rnn", 2, 1e-3),
        ("closed_form", 2, 0.1),
    ],
)
@pytest.mark.parametrize("methods", [SOME, pytest.param(ALL, marks=pytest.mark.slow)], ids=["some", "all"])
def test_methods_run_end_to_end(name, settings, lr, methods, tmp_path):
    options = ["--budget", "tiny", "--methods", *methods, "--lr", str(lr), "--seeds", "1", "--no-cost"]
    assert cli.main(["compare", str(FOLDER / f"{name}.py"), *options, "--out", str(tmp_path)]) == 0
    records, faults = read_all([tmp_path])
    assert not faults
    tuned = [r for r in records if r.spec.phase == "tuning"]
    assert sorted(r.label for r in tuned) == sorted(settings * [*methods])
    for record in records:
        assert record.status in ("done", "target missed", "skipped"), f"{record.label}: {record.reason}"
        assert record.status != "skipped" or record.reason
        lines = lines_of(record)
        assert parsed(lines) == [json.loads(line) for line in lines], "rows are written that are not read"
        if name == "gan" and record.status != "skipped":
            assert (record.path / "samples.png").read_bytes()[:4] == b"\x89PNG"
    skipped = {r.spec.method for r in tuned if r.status == "skipped"}
    assert len(skipped) <= 1, f"skipped: {skipped}"
    fresh = [r for r in records if r.spec.phase == "final"]
    assert len(fresh) == sum(r.status != "skipped" for r in tuned)


@pytest.mark.parametrize("problem", [RNN, GAN, CLOSED_FORM])
def test_every_budget_names_factors_that_fit(problem):
    for budget in problem.budgets:
        values = {name: choices[0] for name, choices in problem.budgets[budget].items()}
        assert problem(**values).target is None or problem(**values).target > 0


# --- recurrent ---


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru", "modrelu"])
def test_the_recurrent_weight_is_computed_once_per_forward_pass(cell, monkeypatch):
    method = type(stiefel.get("own"))
    calls, forward = [], method.forward
    monkeypatch.setattr(method, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    problem = RNN(cell=cell, hidden=8)
    model = stiefel.constrain(problem.make_model(), "own", layers=problem.layers)
    calls.clear()
    problem.loss(model, rnn.copying(4, problem.delay)).backward()
    assert len(calls) == 1
    assert stiefel.report(model).rows[0].layout.count("8×8") == 1
    gates = {"rnn": 1, "lstm": 4, "gru": 3, "modrelu": 1}[cell]
    weight = model.rnn.weight_hh_l0.detach().reshape(gates, 8, 8)
    assert torch.dist(weight @ weight.mT, torch.eye(8).expand(gates, 8, 8)) < 1e-5


def test_modrelu_shortens_or_lengthens_each_state_by_its_bias():
    cell = ModReLU(3, 5, batch_first=True).double()
    x, h, states = torch.randn(2, 4, 3, dtype=torch.float64), np.zeros((2, 5)), []
    w, u, b = (p.detach().numpy() for p in (cell.weight_ih_l0, cell.weight_hh_l0, cell.bias))
    for t in range(4):
        z = x[:, t].numpy() @ w.T + h @ u.T
        h = z / np.abs(z) * np.maximum(0, np.abs(z) + b)
        states.append(h)
    found, last = cell(x)
    np.testing.assert_allclose(found.detach().numpy(), np.stack(states, 1), rtol=1e-12)
    np.testing.assert_array_equal(last[0].detach().numpy(), found[:, -1].detach().numpy())


@pytest.mark.parametrize("method", ["own", "riemannian", "unconstrained"])
@pytest.mark.parametrize("cell", ["rnn", "lstm", "modrelu"])
def test_the_recurrent_matrix_has_a_rate_of_its_own(cell, method):
    problem = RNN(cell=cell, optim="rmsprop" if method != "riemannian" else "adam", recurrent=0.1, hidden=6)
    spec = RunSpec("quality", "final", "rnn", "", problem.identity(), method, {}, 0.01, 0)
    job = Training(problem, spec, torch.device("cpu"))
    rates = {id(p): group["lr"] for group in job.optimizer.param_groups for p in group["params"]}
    assert rates == {id(p): 0.001 if "weight_hh" in n else 0.01 for n, p in job.model.named_parameters()}
    assert sorted(rates.values()).count(0.001) == 1


def test_copying_is_the_task_of_the_papers():
    delay = 7
    x, y = rnn.copying(50, delay)
    assert x.shape == (50, delay + 20, 10)
    symbols = x.argmax(-1)
    assert torch.equal(symbols[:, :10], y[:, -10:])
    assert symbols[:, :10].max() == 7
    assert (symbols[:, 10 : 9 + delay] == rnn.BLANK).all()
    assert (symbols[:, 9 + delay] == rnn.SIGN).all()
    assert (symbols[:, 10 + delay :] == rnn.BLANK).all()
    assert (y[:, :-10] == rnn.BLANK).all()
    assert not torch.equal(*(x for x, _ in list(rnn.Draws(lambda: rnn.copying(50, delay), 2)))), "drawn anew"


def test_a_predictor_without_memory_has_the_metric_one():
    problem = RNN(delay=7)
    batch = rnn.copying(30, 7)
    probabilities = torch.zeros(27, 10)
    probabilities[:17, rnn.BLANK] = 1
    probabilities[17:, :8] = 1 / 8
    result = problem.evaluate(lambda x: probabilities.log().clamp(min=-1e4).expand(30, 27, 10), batch)
    assert result["relative_cross_entropy"] == pytest.approx(1, abs=1e-5)
    perfect = 1e4 * nn.functional.one_hot(batch[1], 10).float()
    assert problem.evaluate(lambda x: perfect, batch) == {"relative_cross_entropy": 0, "accuracy": 1}
    digits = RNN(task="digits")
    constant = digits.evaluate(lambda x: torch.zeros(30, 10), (torch.zeros(30, 64, 1), torch.zeros(30).long()))
    assert constant["relative_cross_entropy"] == pytest.approx(1, abs=1e-6)


def test_images_are_read_pixel_by_pixel_without_padding():
    image = torch.arange(784.0).reshape(1, 28, 28)
    padded = nn.functional.pad(image, (2, 2, 2, 2), value=-1).reshape(1, 1024)
    assert torch.equal(rnn._pixels(padded)[0, :, 0], torch.arange(784.0))
    assert rnn._pixels(torch.zeros(3, 64)).shape == (3, 64, 1)


@pytest.mark.parametrize("n", [1, 6, 7])
def test_rotations_are_orthogonal(n):
    matrix = rnn.rotations(n)
    assert torch.dist(matrix @ matrix.T, torch.eye(n)) < 1e-6
    assert torch.linalg.det(matrix) == pytest.approx(1, abs=1e-6)


# --- known optima ---


def test_the_optimum_of_procrustes_is_that_of_the_polar_factor():
    problem = CLOSED_FORM(n=12, p=5, batch_size=10)
    x, y = (part.double().numpy() for part in problem.examples)
    best = scipy.linalg.polar(y.T @ x)[0]
    assert np.square(y - x @ best.T).sum() / len(x) / 2 == pytest.approx(problem.optimum, rel=1e-12)
    covariance = np.linalg.eigvalsh(x.T @ x / len(x))
    assert covariance[[0, -1]] == pytest.approx([1 / problem.condition, 1], rel=1e-5)


def test_the_optimum_of_pca_is_that_of_the_leading_eigenvectors():
    problem = CLOSED_FORM(task="pca", n=12, p=5, batch_size=10)
    x = problem.examples[0].double().numpy()
    values, vectors = scipy.linalg.eigh(x.T @ x / len(x))
    assert -np.square(x @ vectors[:, -5:]).sum() / len(x) / 2 == pytest.approx(problem.optimum, rel=1e-12)
    assert values[[0, -1]] == pytest.approx([1 / problem.condition, 1], rel=1e-5)


@pytest.mark.parametrize("task", ["procrustes", "pca"])
def test_the_gap_is_that_of_the_nearest_orthonormal_matrix(task):
    problem = CLOSED_FORM(task=task, n=12, p=5, batch_size=10)
    model, whole = problem.make_model().double(), [problem.examples]

    def gap(weight):
        with torch.no_grad():
            model.weight.copy_(weight)
            return problem.measure(model, whole)["gap"]

    x, *y = (part.double() for part in problem.examples)
    best = closed_form.orthonormal(y[0].T @ x) if y else torch.linalg.eigh(x.T @ x)[1][:, -5:].T
    assert gap(best) == pytest.approx(0, abs=1e-12)
    assert gap(3 * best) == pytest.approx(0, abs=1e-12), "leaving the set gains nothing"
    worse = [gap(best + 0.1 * gaussian(*best.shape, seed=seed)) for seed in range(20)]
    assert min(worse) > 1e-4
    assert math.isnan(gap(best * float("nan")))


# --- adversarial ---


@pytest.mark.parametrize("d", [1, 6])
def test_the_frechet_distance_is_that_of_gaussians(d):
    def sample(seed):
        """A sample whose mean and covariance are exactly the ones returned."""
        white = gaussian(50, d, seed=seed)
        white = torch.linalg.qr(white - white.mean(0))[0] * 49**0.5
        mean, factor = gaussian(d, seed=seed + 1), gaussian(d, d, seed=seed + 2)
        return white @ factor.T + mean, mean.numpy(), (factor @ factor.T).numpy()

    (x, m1, s1), (y, m2, s2) = sample(10), sample(20)
    expected = np.square(m1 - m2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert frechet.frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
    assert frechet.frechet_distance(y, x) == pytest.approx(expected, rel=1e-9)
    assert frechet.frechet_distance(x, x) == pytest.approx(0, abs=1e-9 * np.trace(s1))
    if d == 1:
        assert expected == pytest.approx(((m1 - m2) ** 2 + (s1**0.5 - s2**0.5) ** 2).item())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "stiefel"


def test_the_classifier_is_trained_once_and_always_the_same(cache, monkeypatch):
    images, labels = GAN().images[0]
    first = frechet.classifier(images, labels)
    x, y = GAN().images[1]
    assert (first(x).argmax(-1) == y).float().mean() > 0.9
    (path,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(frechet, "_train", lambda *data: pytest.fail("trained again"))
        again = frechet.classifier(images, labels)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    path.write_bytes(path.read_bytes()[:1000])
    third = frechet.classifier(images, labels)
    assert torch.equal(torch.get_rng_state(), state), "the run's random numbers are left alone"
    for network in (again, third):
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), network.parameters(), strict=True))
    frechet.classifier(images[:128], labels[:128])
    assert len(list(cache.iterdir())) == 2, "other data, another classifier"


def test_a_cache_that_cannot_be_written_is_done_without(cache):
    cache.write_text("a file in the folder's place")
    images, labels = GAN().images[0]
    assert frechet.classifier(images[:128], labels[:128]).features(images[:5]).shape == (5, 64)


def test_a_step_updates_the_discriminator_then_the_generator():
    """As two optimizers do, each with its own parameters and loss."""
    problem, batch = GAN(width=4, latent=8), (gaussian(6, 1, 8, 8).float(), gaussian(6, 8).float())
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(problem.make_model())
    ours, theirs = models
    optimizer = torch.optim.Adam(ours.parameters(), lr=1e-2)
    d, g = (torch.optim.Adam(part.parameters(), lr=1e-2) for part in (theirs.discriminator, theirs.generator))
    bce = nn.functional.binary_cross_entropy_with_logits
    for _ in range(3):
        loss = problem.train_step(ours, optimizer, batch)
        fakes = theirs.generator(batch[1])
        real, fake = theirs.discriminator(batch[0]), theirs.discriminator(fakes.detach())
        expected = bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake))
        theirs.zero_grad()
        expected.backward()
        d.step()
        fake = theirs.discriminator(fakes)
        theirs.zero_grad()
        bce(fake, torch.ones_like(fake)).backward()
        g.step()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        assert not loss.requires_grad
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_only_the_discriminator_is_constrained_and_stays_so():
    problem = GAN(width=4, latent=8)
    model = stiefel.constrain(problem.make_model(), "retraction", exclude=problem.exclude)
    optimizer = stiefel.optimizer(model, torch.optim.Adam, lr=1e-2)
    for seed in range(3):
        problem.train_step(model, optimizer, (gaussian(6, 1, 8, 8, seed=seed).float(), gaussian(6, 8).float()))
    report = stiefel.report(model)
    assert [row.name for row in report.rows] == [f"discriminator.{i}.weight" for i in (0, 2, 5)]
    assert report.worst < 1e-5
    steps = {name: int(optimizer.state[p]["step"]) for name, p in model.named_parameters()}
    assert set(steps.values()) == {3}, f"each parameter once a step: {steps}"


def test_images_fill_the_range_of_the_generator():
    (train, _), (validation, labels), _ = GAN(held_out=50).images
    assert (train.min(), train.max()) == (-1, 1)
    assert train.shape[1:] == (1, 8, 8)
    assert len(validation) == len(labels) == 50


def test_a_change_of_the_features_makes_other_runs(monkeypatch):
    before = GAN.digest()
    monkeypatch.setattr(frechet, "digest", lambda: "another")
    assert GAN.digest() != before
    with pytest.raises(ProblemError, match="8, 16 or 32"):
        GAN(size=12)


# --- stability over learning rates ---


def test_stability_counts_the_rates_that_end_near_the_best():
    def record(method, lr, final, status="done", **changes):
        base = {"kind": "quality", "phase": "tuning", "problem": "p", "digest": "d", "fields": {"depth": 2}, "seed": 0}
        spec = RunSpec(**{**base, "method": method, "options": {"scale": 1.0}, "lr": lr, **changes})
        return Record(Path("."), spec, status, None, {"final_validation": final, "higher_is_better": False}, {})

    records = [
        *(record("own", lr, value) for lr, value in ((0.1, 1.0), (0.3, 1.9), (1.0, 2.1))),
        *(record("soft", lr, value) for lr, value in ((0.1, 5.0), (0.3, 4.0))),
        record("soft", 1.0, 0.5, status="diverged"),
        record("soft", 3.0, 0.1, knobs={"strength": 1.0}),
        record("soft", 3.0, 0.1, phase="final"),
        record("riemannian", 0.1, None, status="diverged"),
        record("oni", 0.1, None, status="skipped"),
    ]
    setting = "p, depth=2, scale=1.0"
    expected = [
        Stability(setting, "own", 3, 2, 2),
        Stability(setting, "soft", 3, 2, 0),
        Stability(setting, "riemannian", 1, 0, 0),
    ]
    assert stability(records, 2.0) == expected
    assert [row.all for row in stability(records, 4.0)] == [3, 1, 0]
