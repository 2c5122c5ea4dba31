"""The examples of training frameworks run as they are."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import stiefel

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("method", ["own", "retraction", "soft"])
def test_lightning(method, monkeypatch, tmp_path):
    pytest.importorskip("lightning")
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning
        example = importlib.import_module("lightning_digits")
        model = example.main(method, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
        (checkpoint,) = tmp_path.rglob("*.ckpt")
        again = example.Digits.load_from_checkpoint(checkpoint, method=method)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert p.equal(q)
    if stiefel.get(method).feasible:
        assert stiefel.report(again).worst < 1e-6


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_accelerate(processes):
    pytest.importorskip("accelerate")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, "--main_process_port", "0", str(EXAMPLES / "accelerate_digits.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (worst,) = [line for line in done.stdout.splitlines() if line.startswith("worst")]
    assert float(worst.split(":")[1]) < 1e-6
