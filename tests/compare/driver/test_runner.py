"""The runner: processes of their own, statuses, claims, resuming, storage, engines of other machines."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from statistics import median

import pytest
import torch
from common import FAULTY, compare
from kill_and_resume import kill_and_resume

from stiefel.compare import cli
from stiefel.compare.driver import executors, runner
from stiefel.compare.record.lock import RunLock
from stiefel.compare.record.records import read, read_all
from stiefel.compare.record.run_folder import RunFolder
from stiefel.compare.record.spec import RunSpec
from stiefel.compare.worker.job import Job
from stiefel.errors import OptionError, RecordError, StorageError


@pytest.fixture
def problem(tmp_path):
    path = tmp_path / "faulty.py"
    path.write_text(FAULTY)
    return path


def job(problem, fault="none", **changes):
    fields = {"fault": fault, "epochs": 2, "batch_size": 16}
    spec = RunSpec(
        kind=changes.pop("kind", "quality"), phase=changes.pop("phase", "tuning"), problem="faulty", digest="d",
        fields=fields, method="own",
        options={"scale": 1.0}, lr=0.1, seed=changes.pop("seed", 0),
    )  # fmt: skip
    settings = {"file": str(problem), "settings": fields, "root": problem.parent / "runs", "timeout": 60.0}
    return Job(spec=spec, **{**settings, **changes})


def command(problem, *arguments):
    return [sys.executable, "-m", "stiefel", "compare", str(problem), "--methods", "own", "--lr", "0.1", *arguments]


# --- statuses ---


def test_each_fault_is_a_status_of_its_own_and_costs_its_run_alone(problem):
    faults = {
        "none": "done", "raise": "error", "segfault": "crashed", "kill": "killed", "allocate": "out of memory",
        "hang": "timeout", "nan": "diverged",
    }  # fmt: skip
    jobs = [job(problem, fault, timeout=3.0 if fault == "hang" else 60.0, memory=4_000_000_000) for fault in faults]
    told = []
    with executors.Local(2) as pool:
        records = runner.run_all(jobs, pool, told.append)
    found = {r.spec.fields["fault"]: r for r in records}
    assert {fault: r.status for fault, r in found.items()} == faults
    assert len(told) == len(jobs)
    assert "KeyError" in found["raise"].reason
    assert any("broken on purpose" in line for line in found["raise"].traceback)
    assert "SIGSEGV" in found["segfault"].reason
    assert any("loss" in line for line in found["segfault"].traceback), "the stack where it crashed"
    assert "SIGKILL" in found["kill"].reason
    assert "allocate" in found["allocate"].reason
    assert "3 s" in found["hang"].reason
    assert any("loss" in line for line in found["hang"].traceback), "the stack where it hung"
    assert found["none"].wall_seconds > 0


def test_a_fresh_process_reports_the_same_faults(problem):
    for fault, status in {"none": "done", "segfault": "crashed", "kill": "killed"}.items():
        record = runner.execute(job(problem, fault))
        assert record.status == status, (fault, record)
    files = {path.name for path in problem.parent.glob("runs/*/*")}
    assert files == {"claim", "metrics.jsonl", "output.txt", "run.json"}, "what is run lies in no file"


@pytest.mark.parametrize(("number", "local"), [("SIGKILL", True), ("SIGTERM", True), ("SIGKILL", False)])
def test_a_run_that_is_killed_once_is_run_again(problem, local, number):
    """The toy that kills itself where it has not been before."""
    problem.write_text(FAULTY.replace("import torch\n", AT_FIRST.format(number=number), 1))
    record = runner.execute(job(problem), None, runner.Stop() if local else None)
    assert record.status == "done"
    assert [row["epoch"] for row in record.metrics()] == [0, 1, 2], "nothing is left of the first attempt"
    assert len((problem.parent / "starts").read_text().split()) == 2


AT_FIRST = """
import pathlib
import torch
starts = pathlib.Path(__file__).with_name("starts")
if "stiefel.compare.worker.quality" in sys.modules:
    starts.open("a").write("start ")
    if len(starts.read_text().split()) == 1:
        os.kill(os.getpid(), signal.{number})
"""


def test_errors_of_the_files_that_a_problem_keeps_are_its_own(problem):
    """Neither they nor an exit status say that the records cannot be written."""
    keep = "\n    def keep(self, model, folder):\n        {}\n"
    for line, words in {"open('/nowhere/font')": "FileNotFoundError", "sys.exit(74)": "SystemExit: 74"}.items():
        problem.write_text(FAULTY + keep.format(line))
        record = runner.execute(job(problem, seed=len(words)), None, runner.Stop())
        assert record.status == "error"
        assert words in record.reason
        assert any("in keep" in line for line in record.traceback)


def test_copies_of_a_run_end_and_the_children_of_a_loader_work(problem):
    """A fork in every call of the loss, of which a reported run has many; and a loader whose workers are forked."""
    loader = "DataLoader(torch.utils.data.TensorDataset(x[:64], y[:64]), 16, num_workers=2)"
    source = FAULTY.replace("import torch\n", "import torch\nfrom torch.utils.data import DataLoader\n", 1)
    source = source.replace("Data((x[:64], y[:64])", f"Data({loader}")
    source = source.replace("        loss = ", "        os.fork()\n        loss = ", 1)
    problem.write_text(source)
    record = runner.execute(job(problem, phase="final"), None, runner.Stop())
    assert record.status == "done", record
    assert record.summary["steps"] == 2 * 4
    assert [row["epoch"] for row in record.metrics()] == [0, 1, 2]


def test_waiting_threads_sleep_but_in_a_cost_run(problem, monkeypatch):
    """A cost run is alone on the machine, and takes what the user's own training would."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    seen = "import torch\nopen(os.path.join(os.path.dirname(__file__), 'seen'), 'w').write(str(os.environ.get('{}')))\n"
    problem.write_text(FAULTY.replace("import torch\n", seen.format("OMP_WAIT_POLICY"), 1))
    for kind, policy in (("quality", "PASSIVE"), ("cost", "None")):
        assert runner.execute(job(problem, kind=kind, phase="final")).status == "done"
        assert (problem.parent / "seen").read_text() == policy, kind


def test_threads_are_as_many_as_were_asked_for(monkeypatch):
    monkeypatch.setattr(runner, "available_cores", lambda: 16)
    for asked, threads in {"": (16, 4), "1": (1, 1), "6": (6, 4), "8,2": (8, 4), "many": (16, 4), "0": (16, 4)}.items():
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        assert (runner.threads_for(1), runner.threads_for(4)) == threads, asked
    assert runner.threads_for(99) == 1


def test_an_interpreter_that_does_not_come_to_its_run_says_why(problem, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{problem.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    (problem.parent / "ctypes.py").write_text("raise ImportError('a broken installation')")
    record = runner.execute(job(problem))
    assert record.status == "crashed"
    assert "code 1" in record.reason
    assert any("a broken installation" in line for line in record.traceback)


def test_a_comparison_with_faults_ends_with_a_report_and_says_so(problem, capsys):
    faults = ("none", "raise", "segfault", "nan")
    arguments = ("--methods", "own", "--fault", *faults, "--scale", "1", "--no-cost", "--seeds", "2")
    assert compare(problem, *arguments) == 3, "errors are told by the exit status too"
    statuses = {r.spec.fields["fault"]: r.status for r in read_all([problem.parent / "runs"])[0]}
    assert statuses == {"none": "done", "raise": "error", "segfault": "crashed", "nan": "diverged"}
    assert "broken on purpose" in capsys.readouterr().out
    assert (problem.parent / "runs" / "report.html").is_file()


@pytest.mark.parametrize("last", [False, True], ids=["while others run", "as the last one ends"])
def test_ctrl_c_waits_for_what_is_being_told_of(problem, last):
    told = []

    def interrupted(record):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)  # where an exception would come
        told.append(record.spec.fields["fault"])

    jobs = [job(problem, fault) for fault in (["none"] if last else ["none", "hang"])]
    before, start = signal.getsignal(signal.SIGINT), time.monotonic()
    with executors.Local(2) as pool, pytest.raises(KeyboardInterrupt):
        runner.run_all(jobs, pool, interrupted)
    assert told == ["none"]
    assert signal.getsignal(signal.SIGINT) is before
    assert time.monotonic() - start < 45, "the run that hangs was ended"
    assert [r.spec.fields["fault"] for r in read_all([problem.parent / "runs"])[0]] == ["none"]


# --- claims ---


def test_a_claim_is_exclusive_and_ends_with_its_last_holder(tmp_path):
    first = RunLock.take(tmp_path / "run")
    assert RunLock.take(tmp_path / "run") is None
    assert json.loads((tmp_path / "run" / "claim").read_text())["pid"] == os.getpid()
    sleeper = subprocess.Popen(["sleep", "60"], pass_fds=(first.descriptor,))
    first.close()
    assert RunLock.take(tmp_path / "run") is None, "the other holder lives"
    sleeper.kill()
    sleeper.wait()
    with RunLock.take(tmp_path / "run") as second:
        assert second is not None
    assert RunLock.take(tmp_path / "run") is not None


def test_a_claimed_run_is_left_to_its_owner_and_its_record_used(problem):
    mine = job(problem)
    claim = RunLock.take(mine.root / mine.spec.hash)
    assert runner.execute(mine) is None
    records = []

    def drive():
        with executors.Local(1) as pool:
            records.extend(runner.run_all([mine], pool, lambda record: None))

    waiting = threading.Thread(target=drive)
    waiting.start()
    time.sleep(0.5)
    assert not records
    folder = RunFolder(mine.root, mine.spec)
    folder.finish({"status": "done", "reason": "by the other driver", "summary": {"best_validation": 0.9}}, {})
    claim.close()
    waiting.join(20)
    assert [r.reason for r in records] == ["by the other driver"]


def test_two_drivers_share_a_grid_and_run_nothing_twice(problem):
    source = FAULTY.replace("    def make_data(self):", WITNESS + "    def make_data(self):")
    problem.write_text(source)
    arguments = ("--scale", "1", "--tuning-seeds", "3", "--seeds", "2", "--no-cost", "--jobs", "2")
    drivers = [
        subprocess.Popen(command(problem, *arguments), cwd=problem.parent, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [d.wait(300) for d in drivers] == [0, 0]
    for driver in drivers:
        assert "report:" in driver.stdout.read()
        driver.stdout.close()
    starts = (problem.parent / "starts").read_text().split()
    assert len(starts) == len(set(starts)) == 3 + 2


WITNESS = """
    def schedule(self, optimizer):
        import multiprocessing, pathlib
        name = multiprocessing.current_process().name
        if len(name) == 16:
            with open(pathlib.Path(__file__).with_name("starts"), "a") as stream:
                stream.write(name + "\\n")

"""


def test_killed_drivers_lose_nothing_and_repeat_nothing(tmp_path):
    """A short form of ``python tests/support/kill_and_resume.py``, whose full result is in docs/comparison.md."""
    outcome = kill_and_resume(tmp_path, kills=2, seed=5, methods=1, rates=2, seeds=2)
    assert outcome.passed, outcome
    assert outcome.runs == 2 * 2 + 2 * 4 + 5


# --- records and storage ---


def test_a_corrupt_record_is_told_put_aside_and_run_again(problem, capsys):
    mine = job(problem)
    with executors.Local(1) as pool:
        runner.run_all([mine], pool, lambda record: None)
    path = mine.root / mine.spec.hash / "run.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(RecordError, match="corrupt"):
        read(path.parent)
    records, faults = read_all([mine.root])
    assert not records
    assert len(faults) == 1
    with executors.Local(1) as pool:
        (record,) = runner.run_all([mine], pool, lambda record: None)
    assert record.status == "done"
    assert "corrupt" in capsys.readouterr().err
    assert len(path.with_name("run.json.corrupt").read_text()) == 100


def test_a_record_of_another_schema_is_told_and_left_alone(problem):
    mine = job(problem)
    path = mine.root / mine.spec.hash / "run.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"schema": 999}')
    with pytest.raises(RecordError, match="schema 999, this version reads schema 1"):
        read(path.parent)


def test_a_folder_that_cannot_be_written_is_told_before_the_first_run(problem, capsys):
    arguments = ["compare", str(problem), "--methods", "own", "--out", "/proc/stiefel-runs"]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert "StorageError" in error
    assert "--out" in error


def test_a_full_disk_stops_the_driver_and_blames_no_run(problem, monkeypatch):
    """/dev/full takes no byte, as a full disk."""
    jobs = [job(problem, seed=seed) for seed in range(3)]
    full = jobs[1].root / jobs[1].spec.hash
    real = RunFolder.start

    def start(self):
        real(self)
        if self.path == full:
            (self.path / "metrics.jsonl").unlink()
            (self.path / "metrics.jsonl").symlink_to("/dev/full")

    monkeypatch.setattr(RunFolder, "start", start)
    with pytest.raises(StorageError, match=r"No space left on device.*--out"), executors.Local(1) as pool:
        runner.run_all(jobs, pool, lambda record: None)
    assert read(jobs[0].root / jobs[0].spec.hash).status == "done"
    assert read(full) is None
    monkeypatch.undo()
    (full / "metrics.jsonl").unlink()
    with executors.Local(1) as pool:
        records = runner.run_all(jobs, pool, lambda record: None)
    assert [r.status for r in records] == ["done"] * 3


# --- devices, memory, processes ---


def test_gpus_are_handed_out_in_turn(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5")
    assert executors.gpu_slots(3) == ["2", "5", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert executors.gpu_slots(4) == ["0", "1", "0", "1"]


def test_each_run_sees_its_own_device_and_gives_it_back(problem, monkeypatch):
    seen, busy = [], set()

    def execute(job, again, stop):
        assert job.visible not in busy, "one run a slot"
        busy.add(job.visible)
        time.sleep(0.02)
        busy.discard(job.visible)
        seen.append(job.visible)
        RunFolder(job.root, job.spec).finish(
            {"status": "done", "reason": None, "summary": {"best_validation": 0.9}}, {}
        )
        return read(job.root / job.spec.hash)

    monkeypatch.setattr(runner, "execute", execute)
    with executors.Local(2, ["0", "1"]) as pool:
        runner.run_all([job(problem, seed=s) for s in range(6)], pool, lambda record: None)
    assert sorted(set(seen)) == ["0", "1"]
    assert len(seen) == 6


def test_torchrun_trains_one_model_on_the_shares_of_each_batch(problem):
    """Two processes, each half of every batch: the run of one process, to rounding."""
    one, two = (
        runner.execute(job(problem)),
        runner.execute(job(problem, seed=0, processes=2, root=problem.parent / "2")),
    )
    assert one.status == two.status == "done", two
    for row, other in zip(one.metrics(), two.metrics(), strict=True):
        assert row["validation"]["loss"] == pytest.approx(other["validation"]["loss"], abs=2e-6)
    assert [row["epoch"] for row in two.metrics()] == [0, 1, 2], "one process writes"


def test_an_error_in_one_of_several_processes_is_an_error_of_the_run(problem):
    """The process that writes waits for the gradients of the one that has raised."""
    problem.write_text(FAULTY.replace('self.fault == "raise"', 'os.environ.get("RANK") == "1"'))
    record = runner.execute(job(problem, processes=2, timeout=120))
    assert record.status in ("error", "crashed"), record
    assert "broken on purpose" in (record.path / "output.txt").read_text()


def test_a_process_starts_fast_and_the_driver_pays_little_for_a_run(problem, monkeypatch):
    """0.2 s from the fork to the first line of the problem's file, 50 ms of the driver's own: medians over 20 runs.

    Both in time of the processor, which other processes of the machine do not touch, and as the fastest on the clock.
    """
    problem.write_text(FAULTY + "\nprint('started', time.monotonic(), time.process_time(), flush=True)\n")
    begun, ended, between = {}, {}, []
    start, execute, watch = runner.start, runner.execute, runner.Stop.watch

    def noting_start(job, claim, *, forked):
        begun[job.spec.hash] = time.monotonic()
        return start(job, claim, forked=forked)

    def noting_watch(stop, process, seconds):
        found = watch(stop, process, seconds)
        ended[process._process.name] = time.monotonic()
        return found

    def noting_execute(job, again, stop):
        called = time.monotonic()
        record = execute(job, again, stop)
        between.append(time.monotonic() - called - (ended[job.spec.hash] - begun[job.spec.hash]))
        return record

    monkeypatch.setattr(runner, "start", noting_start)
    monkeypatch.setattr(runner.Stop, "watch", noting_watch)
    monkeypatch.setattr(runner, "execute", noting_execute)
    with executors.Local(1) as pool:
        runner.run_all([job(problem)], pool, lambda record: None)  # the server's imports
        between.clear()
        clocks = time.monotonic(), time.process_time()
        records = runner.run_all([job(problem, seed=1 + s) for s in range(20)], pool, lambda record: None)
        whole, spent = time.monotonic() - clocks[0], time.process_time() - clocks[1]
    names = [record.spec.hash for record in records]
    said = [(record.path / "output.txt").read_text().split() for record in records]
    starts = [float(words[1]) - begun[name] for words, name in zip(said, names, strict=True)]
    starts_cpu = [float(words[2]) for words in said]
    alive = sum(ended[name] - begun[name] for name in names)
    print(
        f"start {median(starts):.3f} s, fastest {min(starts):.3f} s, CPU {median(starts_cpu):.3f} s; driver "
        f"{1e3 * (whole - alive) / 20:.1f} ms a run, median {1e3 * median(between):.1f} ms, fastest "
        f"{1e3 * min(between):.1f} ms, CPU {1e3 * spent / 20:.1f} ms"
    )
    assert median(starts_cpu) < 0.2
    assert min(starts) < 0.2
    assert spent / 20 < 0.05
    assert min(between) < 0.05


# --- engines ---


def test_an_unknown_engine_or_option_is_told(tmp_path):
    with pytest.raises(OptionError, match="did you mean 'dask'"):
        executors.make("dusk", 1, threads=1, folder=tmp_path)
    with pytest.raises(OptionError, match="takes no options"):
        executors.make("local", 1, threads=1, folder=tmp_path, options={"address": "here"})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dask", {}),  # submitit, which starts processes of its own, is tried by default where one is cancelled
        pytest.param("submitit", {"cluster": "local", "timeout_min": 5}, marks=pytest.mark.slow),
        pytest.param("ray", {"num_cpus": 2}, marks=pytest.mark.slow),
    ],
)
def test_an_engine_runs_a_grid_in_its_workers(problem, name, options):
    pytest.importorskip({"dask": "distributed"}.get(name, name))
    jobs = [job(problem, fault) for fault in ("none", "segfault", "nan")]
    with executors.make(name, 2, threads=1, folder=problem.parent, options=options) as engine:
        records = runner.run_all(jobs, engine, lambda record: None)
    assert [r.status for r in records] == ["done", "crashed", "diverged"]
    holders = {json.loads((r.path / "claim").read_text())["pid"] for r in records}
    assert os.getpid() not in holders, "the claims were taken elsewhere"


def test_a_job_survives_pickling(problem):
    assert pickle.loads(pickle.dumps(job(problem))) == job(problem)


def test_cancelling_ends_what_an_engine_is_running(problem):
    pytest.importorskip("submitit")
    slow, options = job(problem, "hang", timeout=30.0), {"cluster": "local", "timeout_min": 5}
    start = time.monotonic()
    with executors.make("submitit", 1, threads=1, folder=problem.parent, options=options) as engine:
        future = engine.submit(runner.execute, slow)
        while not list(slow.root.glob("*/claim")):
            time.sleep(0.1)
        engine.shutdown(wait=False, cancel_futures=True)
        with pytest.raises(Exception, match="Job"):
            future.result(60)
    assert time.monotonic() - start < 100
