"""One run: what it trains, times and measures."""

import json

import pytest
import torch
from common import FAULTY
from specs import OMDSM, spec

import stiefel
from stiefel.compare import load_problem
from stiefel.compare.record.run_folder import RunFolder
from stiefel.compare.worker.cost import run_cost
from stiefel.compare.worker.quality import run_quality
from stiefel.compare.worker.training import Training


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
