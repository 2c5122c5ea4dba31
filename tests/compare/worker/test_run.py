"""One run: what it trains, times and measures."""

import json

import pytest
import torch
from common import FAULTY
from specs import OMDSM, spec

import stiefel
from stiefel.compare import load_problem
from stiefel.compare.problem.batches import Batches, seed_everything
from stiefel.compare.record.run_folder import RunFolder
from stiefel.compare.worker import cost
from stiefel.compare.worker.cost import doubt_of, run_cost
from stiefel.compare.worker.quality import QualityRun, due, run_quality
from stiefel.compare.worker.training import Training
from stiefel.measure.cost.clock import Spread


def test_every_method_starts_from_the_same_network_and_sees_the_same_batches(tmp_path):
    methods = stiefel.available()  # the problem brings some that start elsewhere
    problem = load_problem(OMDSM)(depth=3, epochs=1)
    weights = {}
    for method in methods:
        options = {**stiefel.methods.method_class(method).comparison, "scale": "relu"}
        training = Training(problem, spec(method=method, options=options), torch.device("cpu"))
        weights[method] = [training.model.get_submodule(f"hidden{i}").weight.detach() for i in (1, 2, 3)]
        head = training.model.get_submodule("head").weight.detach()
        weights[method].append(head)
    first = weights.pop("unconstrained")
    for method, others in weights.items():
        for a, b in zip(first, others, strict=True):
            assert torch.allclose(a, b, atol=1e-5), method
    w = first[1]
    assert torch.allclose(w @ w.T, 2 * torch.eye(100), atol=1e-4)


def test_same_seed_same_result_and_another_seed_another(tmp_path):
    problem = load_problem(OMDSM)(depth=2, epochs=2)
    rows = []
    for seed in (0, 0, 1):
        folder = RunFolder(tmp_path / str(len(rows)), spec(seed=seed, options={"scale": "relu", "center": False}))
        folder.start()
        run_quality(problem, folder.spec, folder)
        lines = (folder.path / "metrics.jsonl").read_text().splitlines()
        rows.append([{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines])
    assert rows[0] == rows[1]
    assert rows[0] != rows[2]
    assert [row["epoch"] for row in rows[0]] == [0, 1, 2]
    assert set(rows[0][0]["orthogonality"]["layers"]) == {"hidden1.weight", "hidden2.weight"}


def test_cost_is_measured_beside_the_control_and_gpu_fields_are_null_with_a_reason(toy, tmp_path):
    outcome = run_cost(load_problem(toy)(), spec(kind="cost"), RunFolder(tmp_path, spec(kind="cost")))
    summary = outcome["summary"]
    assert outcome["status"] == "done"
    ratio = summary["step_seconds"]["method"]["median"] / summary["step_seconds"]["control"]["median"]
    assert summary["step_ratio"] == pytest.approx(ratio)
    assert summary["step_seconds"]["method"]["n"] >= 20
    assert summary["gpu_peak_bytes"] is None
    assert summary["gpu_energy_joules"] is None
    assert "cuda" in summary["gpu_reason"].lower()


@pytest.mark.filterwarnings("default")  # what the compiler meets in tracing warns
def test_the_time_of_compiling_is_told_apart_from_that_of_the_steps(tmp_path):
    """With a stand-in for a compiler's back end, which takes its time and leaves the graph as it is."""
    source = FAULTY.replace("return nn.Sequential(", "return torch.compile(backend=slow, model=nn.Sequential(")
    source = source.replace("nn.Linear(8, 2))", "nn.Linear(8, 2)))")
    source = source.replace("@dataclass", "def slow(graph, inputs):\n    time.sleep(1)\n    return graph\n\n@dataclass")
    for name, text in {"compiled": source, "eager": FAULTY}.items():
        (tmp_path / f"{name}.py").write_text(text)
    runs = {}
    for name in ("compiled", "eager"):
        problem = load_problem(tmp_path / f"{name}.py")()
        folder = RunFolder(tmp_path, spec(problem=name))
        folder.start()
        runs[name] = run_quality(problem, folder.spec, folder)["summary"]
    assert runs["eager"]["compile_seconds"] == 0
    assert runs["compiled"]["compile_seconds"] >= 1
    assert runs["compiled"]["seconds"] < 1, "without what the compiler slept"


def test_a_layout_that_a_method_refuses_is_a_skipped_run(toy, tmp_path):
    skipped = spec(options={"scale": 1.0, "center": True})
    folder = RunFolder(tmp_path, skipped)
    folder.start()
    outcome = run_quality(load_problem(toy)(), skipped, folder)
    assert outcome["status"] == "skipped"
    assert "center=True" in outcome["reason"]


# --- what a verdict needs ---


def reported(problem, folder, **changes):
    run = spec(phase="final", **changes)
    run_folder = RunFolder(folder, run)
    run_folder.start()
    return run_quality(problem, run, run_folder)["summary"]


def test_a_reported_run_has_its_metric_on_equal_parts_of_the_test_set(tmp_path):
    problem = load_problem(OMDSM)(depth=2, epochs=2)
    summary = reported(problem, tmp_path)
    data = problem.make_data().test
    assert summary["test_examples"] == len(data[0])
    size = len(data[0]) // 20
    assert len(summary["test_parts"]) == len(data[0]) // size
    rest = len(data[0]) - size * len(summary["test_parts"])
    whole = size * sum(summary["test_parts"])
    # What is over after the equal parts is in the score: it can only add between none and all of its examples.
    assert whole <= summary["test_at_best"] * len(data[0]) + 1e-6 <= whole + rest + 2e-6


def test_parts_are_those_of_the_best_epoch_and_of_no_tuning_run(tmp_path):
    problem = load_problem(OMDSM)(depth=2, epochs=2)
    run = spec()
    folder = RunFolder(tmp_path, run)
    folder.start()
    assert run_quality(problem, run, folder)["summary"]["test_parts"] is None
    training = Training(problem, run, torch.device("cpu"))
    part = Batches(problem.make_data().test, problem.batch_size, 0)
    measures, parts = training.evaluate_parts(part)
    assert measures == pytest.approx(training.evaluate(part))
    first = tuple(t[: len(t) // 20] for t in part.part)
    with torch.no_grad():
        assert parts[0] == pytest.approx(problem.evaluate(training.model, first)["accuracy"])


def test_there_are_no_parts_where_the_metric_is_no_mean(toy, tmp_path):
    own = '    def measure(self, model, batches):\n        return {"loss": 0.0, "accuracy": 0.5}\n'
    toy.write_text(FAULTY + "\n" + own)
    assert reported(load_problem(toy)(), tmp_path)["test_parts"] is None


def test_orthogonality_is_measured_between_epochs_and_its_moments_are_counted(toy, tmp_path):
    assert [step for step in range(1, 1001) if due(step)] == [
        1,
        2,
        4,
        8,
        16,
        32,
        64,
        128,
        200,
        256,
        400,
        512,
        600,
        800,
        1000,
    ]
    problem = load_problem(toy)()
    summary = reported(problem, tmp_path, method="unconstrained", lr=0.5)
    steps = summary["steps"]
    assert summary["orthogonality_moments"] == problem.epochs + 1 + sum(due(step) for step in range(1, steps + 1))
    assert 0 < summary["orthogonality_worst_step"] <= steps
    assert summary["orthogonality_worst"] >= summary["orthogonality_final"]


@pytest.mark.parametrize("method", ["own", "retraction", "soft", "unconstrained"])
def test_a_reported_run_says_how_stationary_it_ended(toy, tmp_path, method, monkeypatch):
    """Against the mean over all training examples at once, at the end of the same training, done again."""
    problem = load_problem(toy)()
    monkeypatch.setattr("stiefel.compare.worker.training.GRADIENT_BATCH", 10)  # 64 examples: the last batch has 4
    final = spec(method=method, lr=0.1, phase="final")
    folder = RunFolder(tmp_path, final)
    folder.start()
    run = QualityRun(problem, final, folder)
    run.train()
    summary, net = run.conclude()["summary"], run.training.model
    (batch,) = run.data["train"].all(10_000)
    expected = stiefel.gradient_norm(net, lambda: problem.loss(net, batch) + stiefel.penalty(net))
    assert summary["gradient_norm"] == pytest.approx(expected, rel=1e-4)
    tuned = spec(method=method, lr=0.1)
    assert QualityRun(problem, tuned, RunFolder(tmp_path, tuned)).stationarity() == {}


def test_the_default_is_the_network_as_its_author_made_it(toy):
    problem = load_problem(toy)()
    for options in ({"start": "given"}, {"start": "given", "scale": 3.0}):
        trained = Training(problem, spec(method="unconstrained", options=options, seed=7), torch.device("cpu"))
        seed_everything(7)
        made = problem.make_model()
        assert trained.model.state_dict().keys() == made.state_dict().keys()
        for name, value in made.state_dict().items():
            assert torch.equal(trained.model.state_dict()[name], value), name


# --- costs that can be believed ---


def spread(median, width=0.02):
    return Spread(median, median * (1 - width / 2), median * (1 + width / 2), 60)


@pytest.mark.parametrize(
    ("again", "width", "words"),
    [(1.0, 0.02, None), (1.04, 0.1, None), (1.07, 0.02, "1.07 times itself"), (1.0, 0.2, "20% between")],
)
def test_a_busy_machine_is_seen_by_the_control_beside_itself(again, width, words):
    doubt = doubt_of({"control": spread(1.0), "again": spread(again), "method": spread(2.0, width)})
    assert (doubt is None) if words is None else (words in doubt)


def test_a_cost_that_cannot_be_believed_is_measured_again_longer(toy, tmp_path, monkeypatch):
    asked = []

    def busy(steps, device, *, warmup, repeats):
        asked.append((sorted(steps), warmup, repeats))
        return {"control": spread(1.0), "again": spread(1.2), "method": spread(2.0)}

    monkeypatch.setattr(cost, "interleaved", busy)
    run = spec(kind="cost", phase="final")
    summary = cost.run_cost(load_problem(toy)(), run, RunFolder(tmp_path, run))["summary"]
    assert asked == [(["again", "control", "method"], w, r) for w, r in ((20, 60), (0, 120), (0, 240))]
    assert summary["cost_attempts"] == 3
    assert "1.20 times itself" in summary["cost_doubt"]
    assert (summary["step_ratio"], summary["self_ratio"]) == (2.0, 1.2)


def test_the_control_costs_what_it_costs(toy, tmp_path):
    run = spec(kind="cost", phase="final", method="unconstrained")
    summary = cost.run_cost(load_problem(toy)(), run, RunFolder(tmp_path, run))["summary"]
    assert (summary["step_ratio"], summary["constraint_share"]) == (1.0, 0.0)
    assert summary["self_ratio"] > 0
