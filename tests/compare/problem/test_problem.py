"""Problems: data of any kind, batches that are the same for all methods, the check before runs, the template."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from common import FAULTY, compare
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import stiefel
from stiefel.attach import constrained_weights
from stiefel.compare import Data, Problem, Regression, cli, load_problem
from stiefel.compare.problem.batches import Batches, examples, mover, share
from stiefel.compare.problem.check import check
from stiefel.compare.record.records import read_all
from stiefel.compare.record.run_folder import RunFolder
from stiefel.compare.record.spec import RunSpec
from stiefel.compare.worker.quality import run_quality
from stiefel.compare.worker.training import Training
from stiefel.errors import ProblemError

X = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


@dataclass(frozen=True, kw_only=True)
class Classes(Problem):
    """A classifier of X; tests override a part of it."""

    epochs: int = 2
    batch_size: int = 5

    def make_model(self):
        return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))

    def make_data(self):
        return Data((X, Y), (X, Y), (X, Y))


def spec(**changes):
    base = {"kind": "quality", "phase": "tuning", "problem": "p", "digest": "d", "fields": {}, "method": "own"}
    return RunSpec(**{**base, "options": {"scale": 1.0}, "lr": 0.1, "seed": 0, **changes})


def quality(problem, tmp_path, **changes):
    folder = RunFolder(tmp_path, spec(**changes))
    folder.start()
    outcome = run_quality(problem, folder.spec, folder)
    return outcome["status"], outcome["summary"]


# --- batches ---


def test_tensors_are_shuffled_anew_each_epoch_by_the_seed_alone():
    def orders(seed):
        batches = Batches((torch.arange(20), Y), 6, seed)
        torch.manual_seed(random.randrange(1000))
        return [torch.cat([x for x, _ in batches.epoch()]).tolist() for _ in range(2)]

    first, again, other = orders(3), orders(3), orders(4)
    assert first == again
    assert first != other
    assert first[0] != first[1]
    assert [len(set(epoch)) for epoch in first] == [18, 18], "the last partial batch is dropped, none twice"


def test_a_loader_shuffles_and_augments_alike_whatever_the_method_draws():
    """A method that draws from the global generators between batches changes nothing about the next ones."""

    class Noisy(TensorDataset):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return x + torch.randn(1) + random.random() + np.random.rand(), y  # noqa: NPY002

    def epoch(draws):
        batches, seen = Batches(DataLoader(Noisy(X, Y), batch_size=4, shuffle=True), 4, seed=1), []
        for _ in range(2):
            for x, _ in batches.epoch():
                seen.append(x)
                if draws:
                    torch.randn(3), random.random(), np.random.rand()  # noqa: NPY002
        return torch.cat(seen)

    states = torch.get_rng_state(), random.getstate()
    assert torch.equal(epoch(False), epoch(True))
    before = torch.get_rng_state()
    epoch(False)
    assert torch.equal(torch.get_rng_state(), before), "the state in use is left alone"
    assert len(epoch(False)) == 40
    torch.set_rng_state(states[0])
    random.setstate(states[1])


def test_an_endless_stream_ends_at_the_limit():
    class Stream:
        def __iter__(self):
            while True:
                yield torch.randn(3, 6)

    batches = Batches(Stream(), 3, 0, limit=4)
    assert len(list(batches.epoch())) == 4


def test_evaluation_sees_every_example_once_in_order():
    batches = Batches((torch.arange(20),), 6, 0)
    assert torch.cat([x for (x,) in batches.all()]).tolist() == list(range(20))
    assert [len(x) for (x,) in batches.all(7)] == [7, 7, 6]


def test_nested_batches_move_and_split():
    batch = {"x": X, "more": [Y, "name"]}
    moved = mover(torch.device("cpu"), torch.float64)(batch)
    assert moved["x"].dtype == torch.float64
    assert moved["more"][0].dtype == torch.int64
    assert moved["more"][1] == "name"
    assert examples(batch) == 20
    halves = [share(batch, rank, 2) for rank in (0, 1)]
    assert sorted(torch.cat([h["x"] for h in halves])[:, 0].tolist()) == sorted(X[:, 0].tolist())


# --- problems ---


def test_a_problem_may_train_in_its_own_way(tmp_path):
    """Two steps a batch where the problem says so, with the method's penalty; by default one step down the loss."""

    class Twice(Classes):
        def train_step(self, model, optimizer, batch):
            super().train_step(model, optimizer, batch)
            return super().train_step(model, optimizer, batch)

    def weights(problem, batches, method):
        training = Training(problem, spec(method=method), torch.device("cpu"))
        losses = [training.step(batch) for batch in batches]
        assert not any(loss.requires_grad for loss in losses)
        return [w.value for w in constrained_weights(training.model)]

    batch, other = (X[:5], Y[:5]), (X[5:10], Y[5:10])
    for method in ("own", "soft", "retraction"):
        once = weights(Classes(), [batch, batch, other, other], method)
        for a, b in zip(once, weights(Twice(), [batch, other], method), strict=True):
            assert torch.equal(a, b), method
    status, summary = quality(Twice(), tmp_path)
    assert (status, summary["steps"]) == ("done", 8)


def test_the_default_step_goes_down_the_loss_and_the_penalties_and_tells_the_loss():
    model = stiefel.constrain(Classes().make_model(), "soft", strength=1.0)
    with torch.no_grad():
        model[0].weight.mul_(2)
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    loss = Classes().loss(model, (X, Y))
    gradients = torch.autograd.grad(loss + stiefel.penalty(model), list(model.parameters()))
    assert Classes().train_step(model, optimizer, (X, Y)) == loss.item()
    for p, old, gradient in zip(model.parameters(), before, gradients, strict=True):
        assert torch.allclose(p, old - 0.1 * gradient, atol=1e-6)


def test_a_run_keeps_what_its_problem_writes(tmp_path):
    class Keeper(Classes):
        def keep(self, model, folder):
            assert not model.training
            assert not torch.is_grad_enabled()
            (folder / "weights.txt").write_text(str(model(X).sum().item()))

    status, _ = quality(Keeper(), tmp_path)
    assert status == "done"
    assert float((tmp_path / spec().hash / "weights.txt").read_text())


def test_the_mean_over_batches_is_the_mean_over_examples():
    problem, model = Classes(), Classes().make_model()
    whole = problem.evaluate(model, (X, Y))
    parts = problem.measure(model, Batches((X, Y), 7, 0).all())
    assert parts == pytest.approx(whole, abs=1e-6)


def test_tensors_loaders_and_dictionaries_train_alike(tmp_path):
    class Loaders(Classes):
        def make_data(self):
            batches = [{"inputs": X[i : i + 5], "targets": Y[i : i + 5]} for i in range(0, 20, 5)]
            return Data(batches, batches, DataLoader(batches, batch_size=None))

        def loss(self, model, batch):
            return super().loss(model, (batch["inputs"], batch["targets"]))

        def evaluate(self, model, batch):
            return super().evaluate(model, (batch["inputs"], batch["targets"]))

    check(Loaders())
    status, summary = quality(Loaders(), tmp_path)
    assert status == "done"
    assert summary["steps"] == 8
    assert 0 <= summary["test_at_best"] <= 1


def test_regression_wants_less(tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class Line(Regression):
        epochs: int = 3
        batch_size: int = 5

        def make_model(self):
            return nn.Linear(6, 1)

        def make_data(self):
            return Data(*((X, X[:, :1]),) * 3)

    check(Line())
    _, summary = quality(Line(), tmp_path)
    assert summary["metric"] == "mse"
    assert summary["higher_is_better"] is False
    assert summary["best_validation"] <= summary["final_validation"]


def test_regression_refuses_targets_that_would_broadcast():
    @dataclass(frozen=True, kw_only=True)
    class Crossed(Regression):
        batch_size: int = 5

        def make_model(self):
            return nn.Linear(6, 1)

        def make_data(self):
            return Data(*((X, X[:, 0]),) * 3)

    with pytest.raises(ProblemError, match=r"outputs of shape \(5, 1\) and targets of shape \(5,\)"):
        check(Crossed())


# --- the check before the first run ---


def once():
    yield X, Y


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"make_model": lambda self: "net"}, r"make_model\(\) must return a torch.nn.Module, got str"),
        ({"make_model": lambda self: 1 / 0}, r"make_model\(\) fails: ZeroDivisionError"),
        ({"make_data": lambda self: (X, Y)}, r"make_data\(\) must return a stiefel.compare.Data, got tuple"),
        (
            {"make_data": lambda self: Data((X, Y[:5]), (X, Y), (X, Y))},
            r"one length \(first dimension\), at least 1, got \[20, 5\]",
        ),
        (
            {"make_data": lambda self: Data((X.numpy(), Y), (X, Y), (X, Y))},
            "a tuple of ndarray, Tensor; convert arrays",
        ),
        (
            {"make_data": lambda self: Data((X, Y), once(), (X, Y))},
            r"\.validation can be iterated only once \(generator\)",
        ),
        ({"make_data": lambda self: Data((X, Y), 3, (X, Y))}, "iterable of batches, got int"),
        (
            {"make_data": lambda self: Data((X[:3], Y[:3]), (X, Y), (X, Y))},
            r"train must give at least one batch of 5, got 3 examples",
        ),
        ({"loss": lambda self, model, batch: model(batch[0])}, r"must return a scalar tensor .* shape \(5, 2\)"),
        ({"loss": lambda self, model, batch: 0.5}, "must return a scalar tensor .* got float"),
        ({"loss": lambda self, model, batch: torch.tensor(1.0)}, "without a graph"),
        ({"train_step": lambda self, model, optimizer, batch: self.loss(model, batch)}, "with a graph"),
        ({"train_step": lambda self, model, optimizer, batch: None}, r"train_step\(\) must return the loss"),
        ({"train_step": lambda self, model, optimizer, batch: model.nothing}, r"train_step\(\) fails: AttributeError"),
        (
            {"evaluate": lambda self, model, batch: {"loss": 1.0}},
            "must return the metric 'accuracy', got a dictionary with 'loss'",
        ),
        ({"measure": lambda self, model, batches: 0.3}, "must return a dictionary of numbers, got float"),
        (
            {"evaluate": lambda self, m, b: {"accuracy": torch.tensor([1.0, 2.0])}},
            r"must be a number \(use .item\(\)\)",
        ),
        ({"target": "high"}, "target must be a finite number or None, got 'high'"),
        ({"hyper": {"momentom": 0.9}}, r"optimizer\(\*\*hyper\) fails: TypeError"),
        ({"schedule": lambda self, optimizer: optimizer.nothing}, r"schedule\(\) fails: AttributeError"),
        ({"exclude": ("haed",)}, "no layer or parameter named 'haed'"),
    ],
)
def test_what_would_fail_in_every_run_is_told_first(change, words):
    with pytest.raises(ProblemError, match=words):
        check(type("Broken", (Classes,), change)())


@pytest.mark.parametrize("decorate", [dataclass(frozen=True, kw_only=True), lambda cls: cls])
def test_a_value_that_a_dataclass_would_leave_out_is_told(decorate):
    """Without the annotation, or the decorator, the field would silently keep its default."""
    with pytest.raises(ProblemError, match=r"epochs = 7 has no effect .* write epochs: int = 7"):
        decorate(type("Bare", (Classes,), {"epochs": 7}))()


def test_a_sound_problem_passes_its_check():
    check(Classes())


# --- the template ---


def test_new_problem_writes_a_problem_that_runs_as_it_is(tmp_path, capsys):
    path = tmp_path / "my_problem.py"
    assert cli.main(["new-problem", str(path)]) == 0
    assert "it runs as it is" in capsys.readouterr().out
    problem = load_problem(path)
    check(problem())
    assert "my_problem.py" in path.read_text()
    assert compare(path, "--methods", "own", "--scale", "1", "--seeds", "1", "--no-cost") == 0
    (final,) = (r for r in read_all([tmp_path / "runs"])[0] if r.spec.phase == "final")
    assert final.status == "done"
    assert final.summary["test_at_best"] > 0.9


def test_new_problem_never_writes_over_a_file(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text("precious")
    assert cli.main(["new-problem", str(path)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert path.read_text() == "precious"
    assert cli.main(["new-problem", str(tmp_path / "mine")]) == 2
    assert "must end in .py" in capsys.readouterr().err
    assert cli.main(["new-problem", str(tmp_path / "no" / "mine.py")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_digest_covers_what_is_imported_from_beside_the_file(tmp_path):
    problem, net, part = tmp_path / "p.py", tmp_path / "p_net.py", tmp_path / "p_parts" / "width.py"
    part.parent.mkdir()
    assert cli.main(["new-problem", str(problem)]) == 0
    alone = load_problem(problem).digest()
    problem.write_text("import p_net\n" + problem.read_text())
    net.write_text("from p_parts.width import width  # this one\nimport p_net, torch\n")
    part.write_text("width = 3\n")
    try:
        first = load_problem(problem).digest()
        net.write_text(net.read_text().replace("this", "that"))
        assert load_problem(problem).digest() == first != alone
        part.write_text("width = 4\n")
        assert load_problem(problem).digest() != first
    finally:
        sys.path.remove(str(tmp_path))
        for name in ("p_net", "p_parts", "p_parts.width"):
            sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("statement", "file"),
    [
        ("import nets", "nets/__init__.py"),
        ("from nets import Net", "nets/__init__.py"),
        ("from nets.deep import Net", "nets/deep.py"),
        ("from nets.deep import Net", "nets/__init__.py"),
        ("import nets", "nets/parts.py"),  # which the package imports itself, by a relative import
    ],
)
def test_the_digest_covers_packages_beside_the_file(statement, file, tmp_path):
    problem, package = tmp_path / "problem.py", tmp_path / "nets"
    package.mkdir()
    (package / "__init__.py").write_text("from . import parts\nfrom .deep import Net\n")
    (package / "parts.py").write_text("SIZE = 3\n")
    (package / "deep.py").write_text("from .parts import SIZE\nclass Net: pass\n")
    problem.write_text(statement + "\n" + FAULTY)
    try:
        first = load_problem(problem).digest()
        with (tmp_path / file).open("a") as stream:
            stream.write("CHANGED = True\n")
        assert load_problem(problem).digest() != first
    finally:
        sys.path.remove(str(tmp_path))
        for name in [name for name in sys.modules if name.partition(".")[0] == "nets"]:
            del sys.modules[name]
