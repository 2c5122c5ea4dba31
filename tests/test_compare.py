"""The comparison engine: specs, plans, problems, data, isolation of runs, resuming, reports."""

import gzip
import hashlib
import json
import math
import pickle
import re
import signal
import struct
import subprocess
import sys
import time
import types
import urllib.error
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from common import FAULTY, compare

import stiefel
from stiefel.compare import cli, datasets, load_problem
from stiefel.compare.plan.plan import FRESH, Plan
from stiefel.compare.plan.variants import Variant, label_of, parse_variants
from stiefel.compare.record.choice import Choice, cell_key, on_edge, winners
from stiefel.compare.record.folder import RunFolder
from stiefel.compare.record.records import Record, read, read_all
from stiefel.compare.record.spec import RunSpec
from stiefel.compare.worker.cost import run_cost
from stiefel.compare.worker.quality import run_quality
from stiefel.compare.worker.training import Training
from stiefel.errors import RecordError

OMDSM = Path(__file__).parent.parent / "benchmarks" / "omdsm.py"


@pytest.fixture
def toy(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text(FAULTY)
    return path


def spec(**changes):
    base = {
        "kind": "quality",
        "phase": "tuning",
        "problem": "toy",
        "digest": "d",
        "fields": {"depth": 4},
        "method": "own",
    }
    return RunSpec(**{**base, "options": {"scale": 1.0}, "lr": 0.1, "seed": 0, **changes})


def record(lr, value, status="done", seed=0, **changes):
    summary = {"best_validation": value}
    return Record(Path("."), spec(lr=lr, seed=seed, **changes), status, None, summary, {})


# --- specs and plans ---


def test_hash_identifies_a_spec_and_does_not_drift():
    assert spec().hash == RunSpec.from_dict(json.loads(json.dumps(spec().to_dict()))).hash
    changed = [{"lr": 0.2}, {"seed": 1}, {"options": {"scale": "relu"}}, {"fields": {"depth": 8}}, {"phase": "final"}]
    assert len({spec(**c).hash for c in [{}, *changed]}) == 6
    # Records on disk are found by this hash: a change of it orphans every earlier result.
    assert spec().hash == "1a813998f7e33059"


def test_plan_gives_every_method_the_same_trials():
    variants = parse_variants(["own", "soft:strength=0.5", "riemannian:metric=canonical"])
    plan = Plan(
        "toy", "d", ({"depth": 4}, {"depth": 8}), variants, (1.0, "relu"), (0.1, 1.0, 10.0), seeds=3, tuning_seeds=2
    )
    tuning = plan.tuning()
    assert len(tuning) == 2 * 3 * 2 * 3 * 2
    assert len({s.hash for s in tuning}) == len(tuning)
    counts = [sum(label_of(s) == label for s in tuning) for label in {label_of(s) for s in tuning}]
    assert len(set(counts)) == 1
    # Methods are compared on one set: own does not centre unless told to.
    assert all(s.options["center"] is False for s in tuning if s.method == "own")
    assert {label_of(s) for s in tuning} == {"own", "soft:strength=0.5", "riemannian:metric=canonical"}


def test_winner_is_chosen_on_validation_and_run_again_with_fresh_seeds():
    plan = Plan("toy", "d", ({"depth": 4},), (Variant("own"),), (1.0,), (0.1, 1.0, 10.0), seeds=2)
    tuned = [record(0.1, 0.8), record(1.0, 0.9), record(10.0, 0.95, "diverged")]
    final = plan.final(tuned, higher_is_better=True)
    assert [s.lr for s in final] == [1.0, 1.0]
    assert {s.seed for s in final} == {FRESH, FRESH + 1}
    assert not {s.seed for s in final} & {s.seed for s in plan.tuning()}
    assert [s.lr for s in plan.final(tuned, higher_is_better=False)] == [0.1, 0.1]
    assert plan.final([record(0.1, 0.8, "diverged")], higher_is_better=True) == []


def test_a_rate_that_fails_on_some_seeds_loses_to_one_that_does_not():
    tuned = [record(0.1, 0.8), record(0.1, 0.8, seed=1), record(1.0, 0.99), record(1.0, 0.9, "diverged", seed=1)]
    assert winners(tuned, higher_is_better=True) == {cell_key(spec()): Choice(0.1)}


def test_edges_of_the_grid():
    assert on_edge(0.1, (0.1, 1.0, 10.0))
    assert on_edge(10.0, (0.1, 1.0, 10.0))
    assert not on_edge(1.0, (0.1, 1.0, 10.0))


@pytest.mark.parametrize("text", ["nonsense", "own:centre=False", "own:center", "own:center=maybe", "soft:strength=-1"])
def test_bad_variants_are_named_errors(text):
    with pytest.raises(stiefel.StiefelError):
        parse_variants([text])


# --- problems and data ---


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x = 1", "no problem"),
        ("import does_not_exist", "fails on import"),
        (FAULTY + FAULTY.replace("class Toy", "class Other"), "2 problems"),
        ("from stiefel.compare import Problem\nclass P(Problem): pass", "does not define make_data, make_model"),
    ],
)
def test_a_file_without_a_usable_problem(tmp_path, source, words):
    path = tmp_path / "p.py"
    path.write_text(source)
    with pytest.raises(stiefel.ProblemError, match=words):
        load_problem(path)


def test_a_file_that_does_not_exist(tmp_path):
    with pytest.raises(stiefel.ProblemError, match="no problem file"):
        load_problem(tmp_path / "missing.py")


def test_digits_are_split_once_and_centred():
    data = datasets.load("digits")
    assert [len(y) for _, y in (data.train, data.validation, data.test)] == [1077, 360, 360]
    rows = torch.cat([data.train[0], data.validation[0], data.test[0]])
    assert len(torch.unique(rows, dim=0)) == 1797  # no image is in two parts
    assert abs(data.train[0].mean().item()) < 1e-6
    again = datasets.load("digits")
    assert torch.equal(data.test[0], again.test[0])
    assert not torch.equal(data.test[1], datasets.load("digits", split_seed=1).test[1])


def write_idx(path, array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    raw = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(raw, 1) if path.suffix == ".gz" else raw)


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """A folder in the form of Fashion-MNIST, small: one training part plain, the rest gzipped; with its checksums."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "fashion"
    folder.mkdir()
    write_idx(folder / "train-images-idx3-ubyte", rng.integers(0, 256, (10_020, 28, 28)))
    write_idx(folder / "train-labels-idx1-ubyte.gz", rng.integers(0, 10, 10_020))
    write_idx(folder / "t10k-images-idx3-ubyte.gz", rng.integers(0, 256, (7, 28, 28)))
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", rng.integers(0, 10, 7))
    for path in folder.iterdir():
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        key = f"fashion-mnist/{path.name.removesuffix('.gz')}"
        monkeypatch.setitem(datasets.CHECKSUMS, key, hashlib.sha256(raw).hexdigest())
    return folder


def test_fashion_mnist_from_idx_files(fashion):
    data = datasets.load("fashion-mnist", fashion)
    assert data.train[0].shape == (20, 1024)
    assert data.validation[0].shape == (10_000, 1024)
    assert data.test[0].shape == (7, 1024)
    raw = gzip.decompress((fashion / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    image = data.test[0][0].reshape(32, 32)
    background = image[0, 0]  # a padded zero, less the mean
    assert torch.allclose(image[2:30, 2:30].flatten() - background, torch.tensor(list(raw[:784])) / 255, atol=1e-6)


def test_a_part_of_it(fashion):
    """The first of each part, so that more examples only add to what fewer have; less the mean of what trains."""
    whole, part = datasets.load("fashion-mnist", fashion), datasets.load("fashion-mnist", fashion, examples=8)
    assert [len(y) for _, y in (part.train, part.validation, part.test)] == [8, 2, 2]
    for few, all_ in ((part.train, whole.train), (part.validation, whole.validation), (part.test, whole.test)):
        assert torch.equal(few[1], all_[1][: len(few[1])])
        difference = few[0] - all_[0][: len(few[1])]
        assert torch.allclose(difference, difference[0, 0], atol=1e-6)
    assert abs(part.train[0].mean().item()) < 1e-6


def test_the_environment_says_where_data_are(fashion, tmp_path, monkeypatch):
    root = tmp_path / "root"
    root.mkdir()
    fashion.rename(root / "fashion-mnist")
    monkeypatch.setenv(datasets.VARIABLE, str(root))
    monkeypatch.setattr(datasets, "DEBIAN", tmp_path / "nowhere")
    assert len(datasets.load("fashion-mnist").test[1]) == 7


@pytest.mark.parametrize(("name", "remedy"), [("mnist", "idx files"), ("cifar-10", "cifar-10-python.tar.gz")])
def test_data_that_nothing_downloads_say_where_to_get_them(name, remedy, tmp_path, monkeypatch):
    monkeypatch.setenv(datasets.VARIABLE, str(tmp_path))
    monkeypatch.setattr(datasets, "DEBIAN", tmp_path / "nowhere")
    with pytest.raises(stiefel.DataError, match=remedy):
        datasets.load(name)


def test_cifar_from_its_own_files_and_no_other_pickle_is_loaded(tmp_path, monkeypatch):
    rng, stems = np.random.default_rng(0), {"train": 5_004, "test": 3}
    batches = {}
    for stem, count in stems.items():
        batch = {b"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8), b"fine_labels": [7] * count}
        batches[stem] = pickle.dumps(batch)
        (tmp_path / stem).write_bytes(batches[stem])
        digest = hashlib.md5(batches[stem]).hexdigest()
        monkeypatch.setitem(datasets.CHECKSUMS, f"cifar-100-python/{stem}", digest)
    data = datasets.load("cifar-100", tmp_path)
    assert [x.shape for x, _ in (data.train, data.validation, data.test)] == [(4, 3072), (5_000, 3072), (3, 3072)]
    assert set(data.train[1].tolist()) == {7}

    class Trap:
        def __reduce__(self):
            return exec, ("raise AssertionError('it was loaded')",)

    (tmp_path / "test").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(stiefel.DataError, match=r"test is corrupt, or another file of that name: its md5"):
        datasets.load("cifar-100", tmp_path)


def test_faces_are_averaged_and_told_before_they_are_fetched(monkeypatch, capsys):
    import sklearn.datasets

    def fetch(data_home=None, download_if_missing=True):
        if not download_if_missing:
            raise OSError("Data not found and `download_if_missing` is False")
        assert "4 MB" in capsys.readouterr().err
        images = np.arange(400 * 64 * 64, dtype=np.float32).reshape(400, 64, 64) % 7 / 7
        return types.SimpleNamespace(images=images, target=np.arange(400) // 10)

    monkeypatch.setattr(sklearn.datasets, "fetch_olivetti_faces", fetch)
    data = datasets.load("olivetti")
    assert [x.shape for x, _ in (data.train, data.validation, data.test)] == [(240, 1024), (80, 1024), (80, 1024)]

    def offline(data_home=None, download_if_missing=True):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(sklearn.datasets, "fetch_olivetti_faces", offline)
    with pytest.raises(stiefel.DataError, match=r"olivetti_py3\.pkz"):
        datasets.load("olivetti")


@pytest.mark.parametrize("damage", ["missing", "truncated", "not gzip", "not idx", "other length", "one bit"])
def test_missing_or_corrupt_files_name_the_file_and_the_remedy(fashion, damage):
    path = fashion / "train-labels-idx1-ubyte.gz"
    raw = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "other length":
        write_idx(path, np.zeros(5))
    elif damage == "one bit":
        content = bytearray(gzip.decompress(raw))
        content[-1] ^= 1
        path.write_bytes(gzip.compress(bytes(content)))
    else:
        path.write_bytes({"truncated": raw[:40], "not gzip": b"hello" * 9, "not idx": gzip.compress(b"x" * 99)}[damage])
    with pytest.raises(stiefel.DataError, match="train-labels-idx1-ubyte") as caught:
        datasets.load("fashion-mnist", fashion)
    assert "dataset-fashion-mnist" in str(caught.value)


def test_offline_without_files_says_what_to_do(monkeypatch, tmp_path, capsys):
    import sklearn.datasets

    def offline(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", offline)
    monkeypatch.setattr(datasets, "DEBIAN", tmp_path / "nowhere")
    monkeypatch.delenv(datasets.VARIABLE, raising=False)
    with pytest.raises(stiefel.DataError, match="OpenML is out of reach") as caught:
        datasets.load("fashion-mnist")
    assert "30 MB" in capsys.readouterr().err  # told before anything is downloaded
    assert "apt-get download dataset-fashion-mnist" in str(caught.value)


def test_unknown_data():
    with pytest.raises(stiefel.DataError, match="did you mean 'mnist'"):
        datasets.load("mnist1d")


# --- one run ---


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


# --- the command line, with runs in processes of their own ---


def test_the_same_command_again_does_only_what_is_missing(toy):
    arguments = ("--methods", "own", "soft", "--jobs", "2", "--scale", "1", "--seeds", "1")
    assert compare(toy, *arguments) == 0
    records = {path: path.stat().st_mtime_ns for path in toy.parent.glob("runs/*/run.json")}
    assert len(records) == 2 * (1 + 1 + 1)  # tuning, final and cost for each method
    lost = min(records)
    lost.unlink()
    (lost.parent / "metrics.jsonl").write_text('{"half a row')  # as a killed run leaves it
    assert compare(toy, *arguments) == 0
    again = {path: path.stat().st_mtime_ns for path in toy.parent.glob("runs/*/run.json")}
    assert again.keys() == records.keys()
    assert {path for path in again if again[path] != records[path]} == {lost}
    assert all(json.loads(line) for line in (lost.parent / "metrics.jsonl").read_text().splitlines())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "ownn"], "did you mean 'own'"),
        (["--device", "cuda"], "no CUDA device"),
        (["--methods", "own:eps=7"], "eps=7"),
    ],
)
def test_bad_arguments_are_one_line_on_stderr(toy, capsys, arguments, words):
    assert cli.main(["compare", str(toy), *arguments, "--out", str(toy.parent / "runs")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert not (toy.parent / "runs").exists()


def test_compare_on_a_file_without_a_problem(tmp_path, capsys):
    (tmp_path / "empty.py").write_text("x = 1")
    assert cli.main(["compare", str(tmp_path / "empty.py")]) == 2
    assert "ProblemError" in capsys.readouterr().err


def test_report_on_nothing(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "no finished run" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "missing")]) == 2


def test_dry_run_runs_nothing(toy, capsys):
    out = toy.parent / "runs"
    assert cli.main(["compare", str(toy), "--dry-run", "--methods", "own", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "20 tuning runs (7 learning rates, 10 trials each)" in said  # two scales
    assert "no estimate yet" in said
    assert not out.exists()


def test_dry_run_estimates_from_what_has_ended(toy, capsys):
    out = toy.parent / "runs"
    arguments = ["compare", str(toy), "--methods", "own", "--out", str(out), "--lr", "0.1", "1", "--scale", "1"]
    assert cli.main([*arguments, "--dry-run", "--jobs", "2"]) == 0
    plan = Plan("toy", load_problem(toy).digest(), (load_problem(toy)().identity(),), parse_variants(["own"]), (1,),
                (0.1, 1.0), seeds=5)  # fmt: skip
    folder = RunFolder(out, plan.tuning()[0])
    folder.start()
    folder.finish({"status": "done", "reason": None, "summary": {"best_validation": 0.9}, "wall_seconds": 60.0}, {})
    capsys.readouterr()
    assert cli.main([*arguments, "--dry-run", "--jobs", "2", "--no-cost"]) == 0
    said = capsys.readouterr().out  # (2 + 5) runs of a minute, two at a time, of which one has ended
    assert "from nothing about 3 min 30 s, about 3 min 00 s of it left; judged by 1 training runs" in said


# --- records and reports ---


def test_a_corrupt_record_is_an_error_that_names_it(tmp_path):
    folder = RunFolder(tmp_path, spec())
    folder.start()
    assert read(folder.path) is None
    for text in ("", "{", "[]", '{"schema": 999}', '{"schema": 1}'):
        (folder.path / "run.json").write_text(text)
        with pytest.raises(RecordError):
            read(folder.path)
    folder.finish({"status": "done", "reason": None, "summary": {"best_validation": 0.9, "x": math.inf}}, {})
    assert read(folder.path).summary == {"best_validation": 0.9, "x": None}  # strict JSON has no infinity


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"status": "finished"}, "finished"),
        ({"hash": "0" * 16}, "hash of its spec"),
        ({"spec": spec().to_dict() | {"seed": 7}}, "hash of its spec"),
        ({"spec": spec().to_dict() | {"fields": None}}, "hash of its spec"),
        ({"summary": None}, "objects"),
        ({"environment": "here"}, "objects"),
        ({"summary": {"best_validation": 0.9, "test_at_best": "0.9"}}, "test_at_best"),
        ({"summary": {"best_validation": 0.9, "step_seconds": {"method": {"median": []}}}}, "step_seconds"),
        ({"summary": {"test_at_best": 0.9}}, "no best_validation"),
        ({"summary": {"best_validation": None}}, "no best_validation"),
        ({"summary": {}, "status": "target missed"}, "no best_validation"),
        ({"summary": {"best_validation": 0.9, "metric": 3}}, "metric is 3, not a text"),
        ({"wall_seconds": [1]}, "wall_seconds"),
    ],
)
def test_json_that_no_run_wrote_is_corrupt(tmp_path, change, words):
    folder = RunFolder(tmp_path, spec())
    folder.start()
    folder.finish({"status": "done", "reason": None, "summary": {"best_validation": 0.9}}, {})
    raw = json.loads((folder.path / "run.json").read_text())
    assert read(folder.path).summary == {"best_validation": 0.9}
    (folder.path / "run.json").write_text(json.dumps(raw | change))
    with pytest.raises(RecordError, match=rf"corrupt.*{words}"):
        read(folder.path)


def test_what_a_later_version_may_add_is_no_corruption(tmp_path):
    folder = RunFolder(tmp_path, spec())
    folder.start()
    folder.finish({"status": "done", "reason": None, "summary": {"best_validation": 0.9, "why": ["a", "text"]}}, {})
    assert read(folder.path).summary["why"] == ["a", "text"]


def test_a_record_says_what_the_method_is_called(tmp_path):
    """The name in a report depends on what was run, not on what the reader's catalogue says of it by now."""
    options = {"scale": 1.0, "center": False, "strength": 0.5}
    folder = RunFolder(tmp_path, spec(options=options))
    folder.start()
    outcome = {"status": "done", "reason": None, "summary": {"best_validation": 0.9}}
    folder.finish(outcome, {})  # as 0.1.0 wrote it
    assert (read(folder.path).label, read(folder.path).control) == ("own:strength=0.5", False)
    folder.finish(outcome | {"label": "mine", "control": True}, {})
    assert (read(folder.path).label, read(folder.path).control) == ("mine", True)
    plain = RunFolder(tmp_path, spec(method="unconstrained"))
    plain.finish(outcome, {})
    assert read(plain.path).control


def test_a_run_that_did_not_end_needs_no_validation(tmp_path):
    folder = RunFolder(tmp_path, spec())
    folder.start()
    folder.finish({"status": "diverged", "reason": "NaN", "summary": {}}, {})
    assert read(folder.path).status == "diverged"


def test_a_cost_record_without_times_is_corrupt(tmp_path):
    folder = RunFolder(tmp_path, spec(kind="cost"))
    folder.start()
    folder.finish({"status": "done", "reason": None, "summary": {"step_ratio": 2.0}}, {})
    with pytest.raises(RecordError, match=r"corrupt.*step_seconds"):
        read(folder.path)


def test_a_changed_problem_is_another_problem(toy):
    before = load_problem(toy).digest()
    toy.write_text(FAULTY + "# a comment\n")
    assert load_problem(toy).digest() == before
    toy.write_text(FAULTY.replace("target = 0.1", "target = 0.8"))
    assert load_problem(toy).digest() != before


def test_equal_numbers_are_the_same_run():
    assert spec(options={"scale": 1}, lr=1).hash == spec(options={"scale": 1.0}, lr=1.0).hash
    assert spec(options={"scale": 1}).hash != spec(options={"scale": True}).hash


def test_a_scale_given_with_a_method_is_that_variants_only_one():
    variants = parse_variants(["own:scale=learnable", "own:scale=relu", "soft"])
    plan = Plan("toy", "d", ({"depth": 4},), variants, (1.0, "relu"), (0.1,), seeds=1)
    cells = [(s.method, s.options["scale"]) for s in plan.tuning()]
    assert sorted(map(str, cells)) == sorted(
        map(str, [("own", "learnable"), ("own", "relu"), ("soft", 1.0), ("soft", "relu")])
    )


def test_default_options_do_not_make_another_variant():
    assert Variant.parse("own:eps=None") == Variant.parse("own")
    assert Variant.parse("own:center=True") != Variant.parse("own")


def test_a_knob_that_is_given_is_held_also_at_its_default():
    variants = parse_variants(["riemannian:metric=euclidean,retraction=qr", "riemannian"])
    plan = Plan("toy", "d", ({},), variants, (1.0,), (0.1, 1.0), seeds=1, trials=5)
    tuned = [Record(Path("."), s, "done", None, {"best_validation": s.lr}, {}) for s in plan.tuning()]
    knobs = {(label_of(s), key) for s in plan.refinement(tuned, higher_is_better=True) for key in s.knobs}
    assert knobs == {("riemannian", "metric"), ("riemannian", "retraction")}
    assert {label_of(s) for s in plan.cells()} == {"riemannian:metric=euclidean,retraction=qr", "riemannian"}


def test_an_optimizer_that_a_method_cannot_have_is_a_skipped_run(toy, tmp_path):
    toy.write_text(FAULTY.replace("target = 0.1", "target = 0.1\n    optimizer = torch.optim.AdamW"))
    run = spec(method="riemannian")
    outcome = run_quality(load_problem(toy)(), run, RunFolder(tmp_path, run))
    assert outcome["status"] == "skipped"
    assert "AdamW" in outcome["reason"]


def test_a_metric_that_is_never_finite_is_a_diverged_run(toy, tmp_path):
    nan = '    def evaluate(self, model, batch):\n        return {"loss": 0.0, "accuracy": float("nan")}\n'
    toy.write_text(FAULTY + "\n" + nan)
    folder = RunFolder(tmp_path, spec())
    folder.start()
    outcome = run_quality(load_problem(toy)(), spec(), folder)
    assert (outcome["status"], "never finite" in outcome["reason"]) == ("diverged", True)


def test_a_problem_may_import_its_neighbour(toy):
    (toy.parent / "my_network_beside.py").write_text("WIDTH = 8\n")
    toy.write_text("from my_network_beside import WIDTH\n" + FAULTY)
    assert load_problem(toy)().make_model()[0].out_features == 8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("fault: str", "device: str"), "which is an option of the comparison"),
        (("target = 0.1", 'metric = "f1"'), r"evaluate\(\) must return the metric 'f1', got 'loss', 'accuracy' alone"),
        (("target = 0.1", 'exclude = ("haed",)'), "no layer or parameter named 'haed'"),
        (("def make_data(self):", "def make_data(self):\n        1 / 0"), r"make_data\(\) fails: ZeroDivisionError"),
    ],
)
def test_what_would_fail_in_every_run_fails_before_the_first(toy, capsys, change, words):
    toy.write_text(FAULTY.replace(*change))
    assert cli.main(["compare", str(toy), "--methods", "own", "--out", str(toy.parent / "runs")]) == 2
    assert re.search(words, capsys.readouterr().err)
    assert not (toy.parent / "runs").exists()


def test_a_sequence_as_a_default_is_one_value(toy, capsys):
    toy.write_text(FAULTY.replace('fault: str = "none"', 'fault: str = "none"\n    hidden: tuple = (4, 4)'))
    assert cli.main(["compare", str(toy), "--methods", "own", "--scale", "1", "--lr", "0.1", "--dry-run"]) == 0
    assert "settings 1" in capsys.readouterr().out


def test_retry_replaces_what_failed(toy, capsys):
    mended = toy.parent / "mended"
    toy.write_text(FAULTY.replace('if self.fault == "raise":', f'if not os.path.exists("{mended}"):'))
    arguments = ("--methods", "own", "--no-cost", "--jobs", "1", "--scale", "1", "--seeds", "1")
    assert compare(toy, *arguments) == 1
    assert "broken on purpose" in capsys.readouterr().out  # the terminal says why
    assert compare(toy, *arguments) == 1  # a failure is not run again unasked
    mended.write_text("")
    assert compare(toy, *arguments, "--retry-failed") == 0
    assert {r.status for r in read_all([toy.parent / "runs"])[0]} <= {"done", "target missed"}


def test_an_interrupted_comparison_goes_on_where_it_stopped(toy):
    command = [sys.executable, "-m", "stiefel", "compare", str(toy), "--methods", "own", "--fault", "none", "hang"]
    command += ["--lr", "0.1", "--scale", "1", "--seeds", "1", "--jobs", "2", "--no-cost"]
    process = subprocess.Popen(
        command,
        cwd=toy.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # shells' background jobs ignore Ctrl-C
    )
    runs = toy.parent / "runs"
    for _ in range(600):  # until one run has ended and the other hangs
        if list(runs.glob("*/run.json")):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error.decode()
    assert b"Interrupted" in error
    assert [r.spec.fields["fault"] for r in read_all([runs])[0]] == ["none"]  # the interrupted run has not failed
