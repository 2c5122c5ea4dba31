"""A whitening layer in two processes: gradients are averaged, running statistics are those of process 0."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

SCRIPT = Path(__file__).parents[1] / "support" / "whitening_processes.py"


def test_a_layer_under_distributed_data_parallel_is_as_batch_normalization(tmp_path):
    file = tmp_path / "found.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)}
    done = subprocess.run([*command, str(file)], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(file.read_text())
    assert found["size"] == 2
    # Each process whitens its own part of the batch, and the gradients of the parameters are averaged.
    assert found["gradients"] == 0
    assert found["gradient of the mean"] < 1e-12
    # After a step each has its own running statistics, as torch's BatchNorm, until the next forward pass.
    assert found["covariances before"] > 1e-2
    assert found["variances before"] > 1e-2
    assert found["covariances after"] == 0
    assert found["outputs"] == 0
    assert found["against process 0"] < 1e-12
    assert found["against its covariance"] < 1e-12
    assert found["converted"] == "Whitening1d"
