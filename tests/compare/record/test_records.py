"""Records: written whole, read with care, and reported; resuming where a comparison stopped."""

import json
import math
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from common import FAULTY, compare
from specs import spec

from stiefel.compare import cli, load_problem, read_report
from stiefel.compare.plan.plan import Plan
from stiefel.compare.plan.variants import Variant, label_of, parse_variants
from stiefel.compare.record.records import Record, read, read_all
from stiefel.compare.record.run_folder import RunFolder
from stiefel.compare.worker.quality import run_quality
from stiefel.errors import RecordError


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
        ({"summary": {"best_validation": 0.9, "metric": 3}}, "metric is 3, not a string"),
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


OLD_SPEC = {
    "schema": 1, "kind": "quality", "phase": "final", "problem": "omdsm", "digest": "0f3a",
    "fields": {"depth": 8, "width": 100, "bias": True, "lr_decay": 1.0}, "method": "riemannian",
    "options": {"scale": "relu", "metric": "euclidean"}, "lr": 0.3, "seed": 1001, "device": "cpu", "dtype": "float32",
}  # fmt: skip
OLD_SUMMARY = {
    "metric": "accuracy", "target": 0.95, "higher_is_better": True, "default_rate": 0.1, "best_epoch": 2,
    "best_validation": 0.75, "test_at_best": 0.7, "final_validation": 0.74, "steps_to_target": None,
    "seconds_to_target": None, "orthogonality_worst": 3e-7, "orthogonality_final": 2e-7, "compile_seconds": 0.0,
    "faults": "", "steps": 32, "seconds": 0.7, "peak_resident_bytes": 300000000, "gpu_peak_bytes": None,
}  # fmt: skip
OLD_STEP = {"median": 0.01, "q1": 0.0099, "q3": 0.0102, "n": 60}
OLD_COST = {
    "step_seconds": {"control": OLD_STEP, "method": OLD_STEP}, "step_ratio": 1.0, "constraint_share": 0.0,
    "parameters": 9000, "constrained_weights": 8, "matmul_flops": 1000, "factorization_flops": 10, "operators": 90,
    "flops_reason": None, "gpu_peak_bytes": None, "gpu_reserved_bytes": None, "gpu_energy_joules": None,
    "gpu_reason": "no CUDA device",
}  # fmt: skip
OLD_ENVIRONMENT = {
    "stiefel": "0.1.0", "commit": "5199a250cca7", "python": "3.11.7", "torch": "2.13.0+cpu", "geoopt": None,
    "numpy": "2.3.0", "scipy": "1.16.0", "platform": "Linux", "cpu": "a processor", "cores": 2, "threads": 1,
    "device": "cpu", "gpu": None, "gpu_reason": "no CUDA device",
}  # fmt: skip
OLD_ROW = {
    "step": 16, "epoch": 1, "seconds": 0.35, "train_loss": 0.5, "validation": {"accuracy": 0.75, "loss": None},
    "test": {"accuracy": 0.7, "loss": 0.9}, "orthogonality": {"worst": 3e-7, "layers": {"1.weight": 3e-7}},
}  # fmt: skip


def test_records_of_version_0_1_0_are_read_and_reported(tmp_path):
    """With the hashes that it gave them, short of the target, without what later versions added."""
    short = "best validation accuracy 0.75, target 0.95"
    runs = [
        ("791df2dfc5e579f4", {"knobs": {"retraction": "qr"}}, "target missed", short, OLD_SUMMARY),
        ("b4541f1851dfdcd2", {"method": "unconstrained", "options": {"scale": "relu"}, "lr": 1}, "target missed", short,
         OLD_SUMMARY | {"test_at_best": 0.72}),
        ("1dbb75ecdda341c0", {"knobs": {"retraction": "qr"}, "kind": "cost", "seed": 1000}, "done", None, OLD_COST),
    ]  # fmt: skip
    for name, changes, status, reason, summary in runs:
        (tmp_path / name).mkdir()
        record = {"schema": 1, "hash": name, "spec": OLD_SPEC | changes, "status": status, "reason": reason}
        record |= {"summary": summary, "wall_seconds": 2.0, "environment": OLD_ENVIRONMENT}
        (tmp_path / name / "run.json").write_text(json.dumps(record, indent=1))
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(OLD_ROW) + "\n" if summary is not OLD_COST else "")
    report = read_report(tmp_path)
    assert report.faults == ()
    rows = report.table().set_index("method")
    assert list(rows.test_accuracy) == [0.72, 0.7]
    own = rows.loc["riemannian:metric=euclidean"]
    assert (own.n, own.failed, own.short_of_target, own.step_ratio, own.knobs) == (1, 0, 1, 1.0, "retraction=qr")
    assert len(report.epochs()) == 2
    assert set(report.runs().status) == {"done", "target missed"}
    assert cli.main(["report", str(tmp_path)]) == 0


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
    plan = Plan("toy", "d", ({},), variants, (1.0,), (0.1, 0.2, 0.4), seeds=1, trials=5)
    # The best rate is inside and known to a factor of 2, so that what is left goes to knobs.
    tuned = [Record(Path("."), s, "done", None, {"best_validation": -abs(s.lr - 0.2)}, {}) for s in plan.tuning()]
    knobs = {(label_of(s), key) for s in plan.refinement(plan.tuned(tuned)) for key in s.knobs}
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
        (("target = 0.1", 'metric = "f1"'), r"must return the metric 'f1', got a dictionary with 'loss', 'accuracy'"),
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
    assert compare(toy, *arguments) == 3
    assert "broken on purpose" in capsys.readouterr().out  # the terminal says why
    assert compare(toy, *arguments) == 3  # a failure is not run again unasked
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
