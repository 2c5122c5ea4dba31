"""A problem is tried in a process of its own: whatever its code does there is an error with a name, and a place."""

import contextlib
import os
import sys
import time
from pathlib import Path

import pytest
from common import FAULTY

from stiefel.compare.driver import trial
from stiefel.errors import DataError, ProblemError

SETTING = {"fault": "none", "epochs": 1, "batch_size": 16}


@pytest.fixture
def problem(tmp_path):
    """Writes the toy problem with a line of misbehaviour before the return of one of its methods."""

    def write(line, method="make_model", top=""):
        source = FAULTY.replace(f"    def {method}(", f"    def {method}(", 1)
        head, _, rest = source.partition(f"    def {method}(")
        signature, _, body = rest.partition("\n")
        path = tmp_path / "odd.py"
        path.write_text(f"{head}    def {method}({signature}\n        {line}\n{body}\n{top}\n")
        return path

    return write


def tried(path, *settings, timeout=20.0, **limits):
    trial.attempt(path, settings or [SETTING], timeout=timeout, **limits)


def test_a_sound_problem_passes_in_all_settings_and_what_it_prints_is_shown(problem, capsys):
    tried(problem("print('fetching', self.epochs)"), SETTING, {**SETTING, "epochs": 7})
    said = capsys.readouterr().err
    assert "fetching 1" in said
    assert "fetching 7" in said


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("os._exit(0)", r"Toy: make_model\(\) ends the process, with code 0"),
        ("os._exit(74)", r"Toy: make_model\(\) ends the process, with code 74"),
        ("ctypes.string_at(0)", r"Toy: make_model\(\) ends the process, by SIGSEGV, in\n(?s:.*)make_model"),
        ("sys.exit(3)", r"Toy: make_model\(\) fails: SystemExit: 3"),
        ("raise KeyboardInterrupt", r"Toy: make_model\(\) fails: KeyboardInterrupt"),
        ("os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)", r"ends the process, by SIGKILL"),
        ("raise ValueError('\\ud800')", r"fails: ValueError: \\ud800"),
        ("raise OSError(28, 'no font')", r"make_model\(\) fails: OSError"),
    ],
)
def test_the_end_of_the_process_is_an_error_that_says_where(problem, line, words):
    with pytest.raises(ProblemError, match=words):
        tried(problem(line))


@pytest.mark.parametrize("method", ["make_data", "loss"])
def test_a_hang_ends_at_the_timeout_with_its_stack(problem, method):
    start = time.monotonic()
    with pytest.raises(ProblemError, match=rf"Toy: {method}\(\) has not returned after 0.5 s(?s:.*)in {method}"):
        tried(problem("time.sleep(600)", method), timeout=0.5)
    assert time.monotonic() - start < 15


def test_each_setting_has_the_timeout_for_itself(problem):
    tried(problem("time.sleep(0.7)"), *[{**SETTING, "epochs": n} for n in (1, 2, 3)], timeout=1.5)


def test_errors_keep_their_kind(problem):
    with pytest.raises(DataError, match="not here"):
        tried(problem("from stiefel.errors import DataError; raise DataError('not here')", "make_data"))
    with pytest.raises(ProblemError, match=r"make_model\(\) must return a torch.nn.Module, got str"):
        tried(problem("return 'a net'"))


@pytest.mark.parametrize(
    ("top", "words"),
    [
        ("os._exit(0)", "odd.py: its import ends the process, with code 0"),
        ("time.sleep(600)", r"odd.py: its import has not returned after 1 s(?s:.*)odd.py"),
        ("sys.exit(0)", "odd.py fails on import: SystemExit: 0"),
    ],
)
def test_the_import_of_the_file_is_tried_too(problem, top, words):
    with pytest.raises(ProblemError, match=words):
        trial.attempt(problem("pass", top=top), timeout=1.0)


def test_memory_is_limited_as_in_runs(problem):
    with pytest.raises(ProblemError, match=r"make_model\(\) fails: RuntimeError.*allocate"):
        tried(problem("torch.ones(10**9)"), memory=3_000_000_000)


def test_a_factor_that_is_no_plain_data_is_told(problem):
    with pytest.raises(ProblemError, match=r"<object object.*an? object, which cannot be handed"):
        tried(problem("pass"), {**SETTING, "fault": object()})


def test_a_trial_leaves_no_process(problem):
    path = problem("import subprocess; subprocess.Popen(['sleep', '311'])")
    tried(path)
    if sys.platform == "linux":
        commands = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                commands.append(Path(f"/proc/{pid}/cmdline").read_bytes())
        assert b"sleep\x00311\x00" not in commands
