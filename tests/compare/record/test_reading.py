"""What is read of a record: types of every field, whole lines of measurements, time of the end, names of folders."""

import json
import os
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from records import comparison, edit, measured, spec, timed, trained, write

from stiefel.compare import read_report
from stiefel.compare.analyse.notes import notes
from stiefel.compare.record.check import printable
from stiefel.compare.record.choice import cell_key
from stiefel.compare.record.measurements import lines_of, parsed
from stiefel.compare.record.portable import portable
from stiefel.compare.record.records import read, read_all
from stiefel.compare.record.spec import RunSpec
from stiefel.errors import RecordError


def rewrite(path: Path, **changes) -> Path:
    """Change entries of a record, and its hash with its spec."""
    file = path / "run.json"
    raw = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(raw | {"hash": RunSpec.from_dict(raw["spec"]).hash}))
    return path


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("kind", "other", "quality or cost"),
        ("phase", None, "tuning or final"),
        ("problem", "", "not a string"),
        ("digest", 3, "not a string"),
        ("method", ["own"], "not a string"),
        ("device", None, "not a string"),
        ("dtype", {}, "not a string"),
        ("fields", {"depth": {"a": 1}}, "not an object of"),
        ("options", ["scale"], "not an object of"),
        ("knobs", ["ns_iters", 5], "not an object of"),
        ("lr", 0, "positive"),
        ("lr", -0.1, "positive"),
        ("lr", float("nan"), "no run writes"),
        ("lr", float("inf"), "no run writes"),
        ("lr", 10**400, "no run writes"),
        ("lr", "0.1", "positive"),
        ("lr", True, "positive"),
        ("seed", 1.5, "whole number"),
        ("seed", False, "whole number"),
        ("seed", -1, "whole number"),
        ("study", "0", "whole number"),
        ("study", False, "whole number"),
        ("method", "\ud800", "no run writes"),
    ],
)
def test_a_spec_that_no_run_has_is_named_and_costs_no_other_record(tmp_path, key, value, words):
    whole = trained(tmp_path, spec(seed=1), 0.9)
    odd = rewrite(trained(tmp_path, spec(seed=2), 0.9), spec=spec(seed=2).to_dict() | {key: value})
    with pytest.raises(RecordError, match=f"corrupt.*{words}"):
        read(odd)
    records, faults = read_all([tmp_path])
    assert [record.path for record in records] == [whole]
    assert len(faults) == 1
    assert faults[0].startswith(f"{odd.name}/run.json is corrupt")
    assert str(tmp_path) not in faults[0]


def test_every_field_of_a_spec_is_checked(tmp_path):
    """A field that is added to the spec, and not to the check, fails here."""
    path = trained(tmp_path, spec(study=0, knobs={"a": 1}), 0.9)
    for name in (f.name for f in fields(RunSpec)):
        rewrite(path, spec=spec(study=0, knobs={"a": 1}).to_dict() | {name: [[]] if name != "fields" else [1]})
        with pytest.raises(RecordError, match="corrupt"):
            read(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("test_at_best", True),
        ("best_validation", [0.9]),
        ("steps_to_target", -1),
        ("higher_is_better", "yes"),
        ("metric", 3),
        ("test_parts", [0.9, "0.8"]),
        ("test_parts", "0.9"),
        ("peak_resident_bytes", {"a": 1}),
        ("default_rate", -0.1),
        ("test_examples", "360"),
        ("log_scale", 1),
    ],
)
def test_an_entry_of_another_type_is_named(tmp_path, key, value):
    with pytest.raises(RecordError, match=f"corrupt.*{key}"):
        read(trained(tmp_path, spec(), 0.9, **{key: value}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reason": ["a"]}, "reason"),
        ({"traceback": "line"}, "traceback"),
        ({"traceback": [1]}, "traceback"),
        ({"label": 5}, "label"),
        ({"control": 1}, "control"),
        ({"ended": "noon"}, "ended"),
        ({"wall_seconds": -1}, "wall_seconds"),
        ({"environment": {"cpu": ["a"]}}, "cpu"),
        ({"environment": {"threads": "two"}}, "threads"),
        ({"status": ["done"]}, "status"),
        ({"schema": [1]}, "schema"),
    ],
)
def test_an_outcome_of_another_type_is_named(tmp_path, change, words):
    with pytest.raises(RecordError, match=words):
        read(rewrite(trained(tmp_path, spec(), 0.9), **change))


def test_a_cost_that_nothing_can_be_divided_by_is_named(tmp_path):
    for step in ({"median": 0.0, "q1": 0.0, "q3": 0.0, "n": 60}, {"median": 1.0, "q1": 1.0, "q3": 1.0}, [1.0]):
        path = timed(tmp_path, spec(kind="cost"), 2.0, step_seconds={"method": step, "control": step})
        with pytest.raises(RecordError, match="corrupt"):
            read(path)


def test_deep_nesting_and_cut_files_are_corrupt(tmp_path):
    path = trained(tmp_path, spec(), 0.9)
    whole = (path / "run.json").read_text()
    texts = [
        "[" * 100_000,
        whole.replace('"accuracy"', "[" * 50 + "]" * 50),
        *(whole[:i] for i in range(0, len(whole) - 1, 37)),
    ]
    for text in texts:
        (path / "run.json").write_text(text)
        with pytest.raises(RecordError, match="corrupt"):
            read(path)
    (path / "run.json").write_bytes(b"\xff\xfe" + whole.encode())
    with pytest.raises(RecordError, match="corrupt"):
        read(path)


def test_half_characters_become_printable_and_infinities_nothing(tmp_path):
    path = write(tmp_path, spec(), "error")
    edit(path, reason="a file named \ud800", environment={"cpu": "\udfff", "cores": 2})
    record = read(path)
    assert (record.reason, record.environment["cpu"]) == ("a file named \ufffd", "\ufffd")
    assert printable({"a": [1e200, float("nan"), 2**70, 0.5, "\U0001f600"]}) == {
        "a": [None, None, None, 0.5, "\U0001f600"]
    }


def test_a_folder_whose_name_is_no_text_is_named(tmp_path):
    whole = trained(tmp_path, spec(), 0.9)
    shutil.copytree(os.fsencode(whole), os.fsencode(tmp_path) + b"/copy\xff")
    records, faults = read_all([tmp_path])
    assert len(records) == 1
    assert faults == ["copy\ufffd is a folder whose name is no text; rename it"]


def test_a_sequence_is_a_factor_like_any_other(tmp_path):
    """A problem's field may be a tuple, which JSON writes as a list."""
    comparison(tmp_path, {"own": (0.9, 1e-8)}, fields=({"hidden": (4, 4)}, {"hidden": (8,)}), rates=(1.0,), seeds=2)
    report = read_report(tmp_path)
    assert not report.faults
    assert set(report.table().setting) == {"hidden (4, 4), scale 1", "hidden (8,), scale 1"}
    assert report.table().test_accuracy.notna().all()


def test_a_factor_that_is_a_list_belongs_to_the_same_cell_before_and_after_the_disk():
    planned = spec(fields={"hidden": [4, [4]]})
    assert cell_key(planned) == cell_key(RunSpec.from_dict(json.loads(json.dumps(planned.to_dict()))))
    assert len({cell_key(planned), cell_key(spec(fields={"hidden": [4]}))}) == 2


# --- measurements ---


def test_of_torn_measurements_the_whole_lines_are_read(tmp_path):
    """Wherever the file is cut."""
    path = trained(tmp_path, spec(phase="final"), 0.9)
    whole = (path / "metrics.jsonl").read_text()
    ends = [len("\n".join(whole.splitlines()[:k])) for k in (1, 2, 3)]
    record = read(path)
    assert len(parsed(lines_of(record))) == 3
    for cut in range(len(whole)):
        (path / "metrics.jsonl").write_text(whole[:cut])
        assert len(parsed(lines_of(record))) == len(record.metrics()) == sum(cut >= end for end in ends)


def test_a_run_with_torn_measurements_is_named_and_scored(tmp_path):
    comparison(tmp_path, {"own": (0.9, 1e-8)}, rates=(1.0,), signals=True)
    torn = next(r.path for r in read_all([tmp_path])[0] if r.spec.phase == "final" and r.spec.kind == "quality")
    lines = (torn / "metrics.jsonl").read_text()
    (torn / "metrics.jsonl").write_text(lines[:-30])
    report = read_report(tmp_path)
    row = report.problems[0].settings[0].rows[0]
    assert len(row.scores) == 5
    assert row.torn == (torn.name,)
    assert sorted(map(len, row.curves)) == [2, 3, 3, 3, 3]
    assert len(report.epochs()) == 6 * 3 - 1
    told = [note for note in notes(report.problems[0]) if "torn" in note]
    assert len(told) == 1
    assert torn.name in told[0]
    assert not report.layers().empty


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", None),
        ("step", True),
        ("seconds", "0.1"),
        ("train_loss", [1]),
        ("validation", 0.9),
        ("validation", {"accuracy": "0.9"}),
        ("test", []),
        ("orthogonality", {"worst": 0.1}),
        ("orthogonality", {"worst": {}, "layers": {}}),
        ("orthogonality", {"worst": 0.1, "layers": {"a": [1]}}),
        ("energy", {"l0": 1.0}),
        ("energy", {"l0": {"forward": "much"}}),
        ("energy", {"l0": {"forward": None, "reason": [1]}}),
        ("energy", {"l0": {"forward": None, "reason": []}}),
        ("conditioning", {"l0": 1.0}),
        ("conditioning", {"l0": {"input_rank": [1]}}),
        ("operator", {"l0": {"operator_largest": "much"}}),
        ("variance", [1]),
        ("redundancy", {"l0": []}),
        ("effective_rate", 0.1),
        ("gradients_reason", 3),
        ("dependence", {"layers": ["l0"]}),
        ("dependence", {"layers": ["l0"], "turn": [[1.0, 2.0]], "gradient": [0.1]}),
        ("dependence", {"layers": ["l0"], "turn": [[[]]], "gradient": [0.1]}),
        ("dependence", {"layers": ["l0", "l1"], "turn": [[1.0, 2.0]], "gradient": [0.1, 0.1]}),
        ("dependence", {"layers": [{}], "turn": [[1.0]], "gradient": [0.1]}),
    ],
)
def test_a_row_of_other_types_is_left_out(key, value):
    good = measured(1, 0.9, 1e-8)
    odd = json.dumps(good | {key: value})
    assert parsed([json.dumps(good), odd, json.dumps(good)]) == [good, good]


def test_a_row_of_a_layer_that_could_not_be_measured_is_kept():
    row = measured(1, 0.9, 1e-8) | {"energy": {"l0": {"forward": None, "backward": None, "reason": "never called"}}}
    assert parsed([json.dumps(row)]) == [row]


# --- the time of the end ---


def test_the_newest_source_is_that_of_the_run_that_ended_last(tmp_path):
    """A copy that does not keep the times of files, or a clock that was wrong, does not turn their order."""
    for digest, ended, value in (("old", 1000.0, 0.1), ("new", 2000.0, 0.9)):
        path = rewrite(trained(tmp_path, spec(digest=digest, phase="final"), value), ended=ended)
        os.utime(path / "run.json", (5000 - ended, 5000 - ended))
        assert read(path).written == ended
    summary = read_report(tmp_path).problems[0]
    assert (summary.digest, summary.older) == ("new", 1)


@pytest.mark.parametrize("ended", ["2001-09-09T01:46:40+00:00", "2001-09-09T01:46:40Z", 1e9, 10**9])
def test_the_end_of_a_run_may_be_written_in_words(tmp_path, ended):
    assert read(rewrite(trained(tmp_path, spec(), 0.9), ended=ended)).written == 1e9


def test_a_record_that_does_not_say_when_it_ended_is_as_old_as_its_file(tmp_path):
    path = trained(tmp_path, spec(), 0.9)
    edit(path, drop=["ended"])
    os.utime(path / "run.json", (1234, 1234))
    assert read(path).written == 1234


# --- names of folders ---


@pytest.mark.parametrize(
    ("text", "short"),
    [
        (
            'File "/home/ann/.venv/lib/python3.11/site-packages/torch/nn.py", line 3',
            'File "site-packages/torch/nn.py", line 3',
        ),
        ('File "/usr/lib/python3/dist-packages/numpy/core.py"', 'File "dist-packages/numpy/core.py"'),
        ('File "/usr/lib/python3.12/json/decoder.py", line 3', 'File "python3.12/json/decoder.py", line 3'),
        ("no file '/home/ann/data/x.csv' is there", "no file '~/data/x.csv' is there"),
        ("/Users/ann/x, /root/y and /home/bob", "~/x, ~/y and ~"),
        (r"C:\Users\ann\x.py is not there", r"~\x.py is not there"),
        ('File "/scratch/ann/trial/toy.py", line 3', 'File "…/trial/toy.py", line 3'),
        ("half of a/b, 3 / 4, https://a.org/home/x/", "half of a/b, 3 / 4, https://a.org/home/x/"),
        ("CUDA out of memory", "CUDA out of memory"),
    ],
)
def test_texts_name_no_folder_of_the_machine(text, short):
    assert portable(text) == short


def test_the_folders_of_a_run_have_short_names(tmp_path, monkeypatch):
    for name in ("home", "work", "problem"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    for name, short in (("home", "~"), ("work", "."), ("problem", ".")):
        text = f'File "{tmp_path / name}/a/toy.py"; {tmp_path / name}: {tmp_path / name}more'
        assert portable(text, tmp_path / "problem") == f'File "{short}/a/toy.py"; {short}: {tmp_path / name}more'


def test_old_records_are_reported_without_folders_of_their_machine(tmp_path):
    path = write(tmp_path, spec(), "error", "FileNotFoundError: '/home/ann/data/x'")
    rewrite(path, traceback=["Traceback:", '  File "/home/ann/work/toy.py", line 3, in make_data'])
    record = read(path)
    assert record.reason == "FileNotFoundError: '~/data/x'"
    assert record.traceback == ("Traceback:", '  File "~/work/toy.py", line 3, in make_data')
