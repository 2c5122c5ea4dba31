"""Several processes on one model (gloo): sharded, tensor-parallel and data-parallel, over all methods.

Each is right to rounding, or refused by an error that names the weight and says what to do; nothing is silent, and no
error is torch's own.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from features import documented, in_several
from filelock import FileLock

import stiefel
from stiefel.constraint import TransportMethod

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

SCRIPT = Path(__file__).parents[1] / "support" / "processes.py"
METHODS = [m for m in stiefel.available() if not m.startswith("test_")]
SOME = ["cayley", "own", "pogo", "riemannian", "soft"]
"""One of each kind: a proxy without and with a base point, steps of an optimizer or geoopt, a penalty."""
PROXIED = [m for m in METHODS if stiefel.get(m).place == "forward"]
MOVED = [m for m in METHODS if stiefel.get(m).moves]
# Not continuous: a sign, or the order of equal singular values, may turn on the last digit of a sum.
CHAOTIC = [*(m for m in METHODS if stiefel.get(m).step_length), "own_pca", "spectral_norm"]
PAIR = (
    "double",
    "single",
    "plain",
    "whole_again",
    "half",
    "clipped_and_accumulated",
    "diverged",
    "work",
    "recomputed_and_offloaded",
    "resumed",
    "shared_work",
    "not_averaged",
    "loaded_sharded",
    "tensor_parallel",
    "data_parallel",
    "moving_start",
    "wrapped_first",
)


# What one worker of this test run has found serves the others: two runs at once would take twice as long.
RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))


@cache
def run(features: tuple[str, ...], size: int, methods: tuple[str, ...]) -> dict[str, dict[str, dict[str, Any]]]:
    """What so many processes found, by feature and method."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "PYTHONPATH": str(SCRIPT.parent)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}", str(SCRIPT)]
    name = hashlib.sha256(repr((features, size, methods)).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"processes-{RUN}" / name
    folder.mkdir(parents=True, exist_ok=True)
    ended = folder / "ended.txt"
    with FileLock(folder / "lock"):
        if not ended.exists():
            done = subprocess.run(
                [*command, ",".join(features), str(folder), *methods],
                env=environment,
                capture_output=True,
                text=True,
                timeout=900,
            )
            # torchrun's own account of a failure comes last
            ended.write_text("" if done.returncode == 0 else f"{done.returncode}: {done.stderr[:6000]}")
    failure = ended.read_text()
    assert not failure, failure
    return {f: json.loads((folder / f"{f}.json").read_text(encoding="utf-8")) for f in features}


@pytest.fixture(autouse=True, params=["some", pytest.param("all", marks=pytest.mark.slow)])
def _asked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which methods are tried: two processes take some minutes for all."""
    monkeypatch.setattr(sys.modules[__name__], "ASKED", METHODS if request.param == "all" else SOME)


ASKED = SOME


def found(feature: str, size: int = 2, methods: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """What so many processes found, by method; an error that is not this library's fails the test."""
    features = PAIR if size == 2 and methods is None else (feature,)
    methods = ASKED if methods is None else methods
    results = run(features, size, tuple(methods))[feature]
    assert list(results) == methods
    assert {m: r["raw"] for m, r in results.items() if "raw" in r} == {}
    return results


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("feature", "tolerance"), [("double", 2e-12), ("single", 2e-6)])
def test_sharded_training_is_that_of_one_process(feature, tolerance, size):
    """To the tolerance; in float32, where an optimizer may divide by mere rounding, to what another order does."""
    for method, result in found(feature, size).items():
        for name in ("momentum", "adam", "adamw"):
            if name in result:
                assert result[f"{name} ranks"] == 0, (method, result)
                allowed = max(tolerance, 4 * result.get(f"{name} rounding", 0.0))
                assert method in CHAOTIC or result[name] < allowed, (method, result)
        assert method in CHAOTIC or result["report"] < max(tolerance, 1e-6 * (feature == "single")), (method, result)


def test_shards_with_replicas():
    some = ["own", "retraction", "soft", "riemannian", "pogo", "unconstrained"]
    for method, result in found("hybrid", 4, some).items():
        assert all(result[f"{name}{more}"] < 2e-12 for name in ("momentum",) for more in ("", " ranks")), (
            method,
            result,
        )


def test_a_plain_optimizer_on_a_sharded_model_is_refused_where_it_would_be_on_a_whole_one():
    for method, result in found("plain").items():
        assert bool(result["refused"]) == (method in MOVED), (method, result)
        if result["refused"]:
            assert "'0.weight'" in result["refused"]
            assert "stiefel.optimizer(model, SGD, ...)" in result["refused"]
            assert result["moved"] == 0


def test_a_sharded_model_is_projected_saved_loaded_and_released():
    for method, result in found("whole_again").items():
        assert result["loaded"] == 0, method
        assert bool(result["released"]) == (method in PROXIED), (method, result)
        if result["released"]:
            assert "'0.weight'" in result["released"]
            assert "full_state_dict=True" in result["released"]
        else:
            assert result["released apart"] == 0
        if stiefel.get(method).feasible:
            assert result["projected"] < 1e-14


def test_half_precision_by_policy_computes_with_orthogonal_weights_or_is_refused():
    for method, result in found("half").items():
        assert bool(result["refused"]) == (method in PROXIED), (method, result)
        if result["refused"]:
            assert "'0.weight' is torch.bfloat16" in result["refused"]
        elif stiefel.get(method).feasible:
            assert result["worst"] < 1e-6


def test_accumulation_and_clipping_of_sharded_gradients():
    for method, result in found("clipped_and_accumulated").items():
        assert method in CHAOTIC or result["apart"] < 1e-13, (method, result)


def test_a_part_that_is_not_finite_stops_every_process_before_the_step():
    for method, result in found("diverged").items():
        assert all("'0.weight'" in told and "NaN or infinite" in told for told in result["told"]), (method, result)
        assert result["moved"] == 0, method


@pytest.mark.parametrize("size", [2, 4])
def test_the_work_and_the_traffic_of_a_process_fall_with_their_number(size):
    """(R−1)/R² · N entries received for each of X, G, P(G), U and the new X, and twice for a momentum that is carried.

    Each matrix is stepped once.
    """
    for method, result in found(
        "work", size, None if size == 2 else [*(m for m in MOVED if m in ASKED), "own", "soft"]
    ).items():
        matrices = [c["matrices"] for c in result["counts"]]
        received = sum(c["received"] for c in result["counts"]) / size
        if method not in MOVED:
            assert sum(matrices) == received == 0
            continue
        assert sum(matrices) == result["weights"]
        assert max(matrices) <= -(-result["weights"] // size)
        carries = isinstance(stiefel.get(method), TransportMethod)
        most = (5 + 2 * carries) * (size - 1) / size**2 * result["entries"]
        assert 0 < received <= 1.15 * most, (method, received, most)  # shards are uneven


def test_recomputed_activations_and_weights_kept_on_the_host():
    for method, result in found("recomputed_and_offloaded").items():
        for name in ("recomputed", "offloaded"):
            assert result[f"{name} ranks"] == 0, (method, result)
            assert method in CHAOTIC or result[name] < 2e-12, (method, result)


def test_training_goes_on_from_a_distributed_checkpoint_bit_for_bit():
    for method, result in found("resumed").items():
        assert result == {"at once": 0, "async": 0}, (method, result)


def test_processes_with_equal_models_share_the_work_on_large_weights():
    """Each of the two large matrices of a step is computed once; the small one by both."""
    for method, result in found("shared_work").items():
        for name in ("momentum", "adam", "adamw"):
            if name in result:
                assert result[f"{name} ranks"] == 0, (method, result)
                assert method in CHAOTIC or result[name] < 2e-12, (method, result)
        lifted = method in MOVED and stiefel.get(method).lifts
        assert sum(result["matrices"]) == (2 * (3 + 2 * 1) if lifted else 0), (method, result)
        assert result["uneven"], (method, result)


def test_weights_that_are_not_alike_on_the_processes_are_not_shared():
    for method, result in found("not_averaged").items():
        assert method in CHAOTIC or result["apart"] < 1e-12, (method, result)


def test_sharded_states_of_other_methods_load_as_whole_ones_do():
    for method, result in found("loaded_sharded").items():
        assert max(result.values()) < 1e-12, (method, result)


def test_tensor_parallel_layers():
    for method, result in found("tensor_parallel").items():
        assert bool(result["refused"]) == (method in PROXIED), (method, result)
        if result["refused"]:
            assert "a method that keeps the weight itself" in result["refused"]
        else:
            assert result["ranks"] == 0, (method, result)
            assert method in CHAOTIC or result["apart"] < 2e-12, (method, result)


def test_data_parallel_and_zero():
    for method, result in found("data_parallel").items():
        for name in ("ddp", "zero"):
            assert result[f"{name} ranks"] == 0, (method, result)
            assert method in CHAOTIC or result[name] < 2e-12, (method, result)
            assert result[f"{name} steps"] == [10, 10, 10, 10], (method, result)


def test_a_start_moves_on_all_processes_as_on_one():
    results = {m: r for m, r in found("moving_start").items() if r}
    assert results
    for method, result in results.items():
        sharded, resumed, parallel = result["sharded"], result["resumed"], result["parallel"]
        assert all(sharded[f"{name} ranks"] == 0 and sharded[name] < 2e-12 for name in ("momentum", "adamw")), method
        assert resumed == {"at once": 0, "async": 0}, (method, resumed)
        assert all(parallel[f"{name} ranks"] == 0 and parallel[name] < 2e-12 for name in ("ddp", "zero")), method


def test_a_model_that_data_parallel_holds_already_is_refused_where_it_would_not_be_averaged():
    for method, result in found("wrapped_first").items():
        for name in ("", "unused", "static"):
            if method in PROXIED:
                assert "'0.weight' is held by DistributedDataParallel" in result[name], (method, result)
            else:
                assert method in CHAOTIC or result[name] < 2e-12, (method, result)


def test_the_documents_table_is_current():
    table = documented()
    for name, row in in_several(found).items():
        assert row == {m: table[name][m] for m in row}, name  # make compatibility
