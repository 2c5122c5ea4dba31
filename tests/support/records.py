"""Folders of records as runs write them, made up: for the tests of the reporting side.

python tests/support/records.py FOLDER [METHODS [DEPTHS]]     a folder to look at, with failures of every kind
"""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

import stiefel
from stiefel.compare.plan.plan import FRESH
from stiefel.compare.record.run_folder import RunFolder
from stiefel.compare.record.spec import RunSpec

CPU = {"commit": "abc", "cpu": "a processor", "cores": 2, "threads": 1, "gpu": None, "gpu_reason": "no CUDA device"}
GPU = {"commit": "abc", "cpu": "a processor", "cores": 2, "threads": 1, "gpu": "a GPU", "gpu_reason": None}
RATES = (0.01, 0.1, 1.0, 10.0)


def spec(**changes) -> RunSpec:
    base = {"kind": "quality", "phase": "tuning", "problem": "toy", "digest": "d", "fields": {"depth": 4}}
    base |= {"method": "own", "options": {"scale": 1.0}, "lr": 0.1, "seed": 0}
    return RunSpec(**(base | changes))


def write(root: Path, run: RunSpec, status="done", reason=None, rows=(), environment=CPU, **summary) -> Path:
    """A record with this summary."""
    folder = RunFolder(root, run)
    folder.start()
    for row in rows:
        folder.append(row)
    trace = ["Traceback (most recent call last):", f"  ... {reason}"] if status == "error" else []
    outcome = {"status": status, "reason": reason, "summary": summary, "wall_seconds": 1.0, "traceback": trace}
    folder.finish(outcome, dict(environment))
    return folder.path


def edit(path: Path, drop: Iterable[str] = (), **changes) -> None:
    """Change entries of a record that is on disk, as another version may have written them."""
    raw = json.loads((path / "run.json").read_text()) | changes
    (path / "run.json").write_text(json.dumps({key: value for key, value in raw.items() if key not in drop}))


def trained(root: Path, run: RunSpec, value: float, error=1e-8, steps=20, status=None, environment=CPU, **changes):
    """The record of a quality run: the same value in validation and test; without steps it misses the target."""
    metric = changes.pop("metric", "accuracy")
    known = {"metric": metric, "target": 0.5, "higher_is_better": True, "default_rate": 0.1}
    known |= {"best_validation": value, "test_at_best": value, "peak_resident_bytes": 1e8}
    known |= {"orthogonality_worst": error, "orthogonality_final": error}
    known |= {"steps_to_target": steps, "seconds_to_target": None if steps is None else steps / 100}
    status = status or ("target missed" if steps is None else "done")
    rows = changes.pop("rows", None)
    if rows is None:
        rows = [measured(epoch, value * epoch / 2, error, metric=metric) for epoch in (0, 1, 2)]
    return write(root, run, status, rows=rows, environment=environment, **(known | changes))


def measured(epoch: int, value: float, error: float, *, metric="accuracy", layers=2, **signals) -> dict:
    """A row of measurements."""
    return {
        "step": 10 * epoch,
        "epoch": epoch,
        "seconds": 0.1 * epoch,
        "train_loss": None if epoch == 0 else 1 / epoch,
        "validation": {metric: value, "loss": 1.0},
        "test": {metric: value, "loss": 1.0},
        "orthogonality": {"worst": error, "layers": {f"hidden{i}.weight": error / (i + 1) for i in range(layers)}},
        **signals,
    }


def diagnosed(layers: int, level: float) -> dict:
    """What a row says of the layers of a network: each by its depth, dependence by distance and level."""
    names = [f"l{k}" for k in range(layers)]
    turn = [[(1 + level) * 0.5 ** abs(n - m) for m in range(layers)] for n in range(layers)]
    return {
        "energy": {name: {"forward": 0.9**k, "backward": 1.1**k} for k, name in enumerate(names)},
        "variance": {name: 0.5**k for k, name in enumerate(names)},
        "redundancy": dict.fromkeys(names, level),
        "effective_rate": dict.fromkeys(names, 1 - level / 4),
        "dependence": {"layers": names, "turn": turn, "gradient": [0.1] * layers, "length": 0.01},
    }


def conditioned(layers: int, level: float) -> dict:
    """Conditions and norms of layers, which the records of earlier versions do not have."""
    names = [f"l{k}" for k in range(layers)]
    return {
        "conditioning": {
            name: {
                "input_condition": 10.0 ** (k + 1),
                "input_rank": 5 - k,
                "block_condition": None if k else 100 + level,
            }
            for k, name in enumerate(names)
        },
        "operator": {names[0]: {"operator_largest": 2 + level, "operator_smallest": None}},
    }


def timed(root: Path, run: RunSpec, ratio: float, spread=0.05, environment=CPU, **changes):
    """The record of a cost run."""
    control = {"median": 0.01, "q1": 0.0099, "q3": 0.0102, "n": 60}
    ends = {"median": ratio, "q1": ratio * (1 - spread), "q3": ratio * (1 + spread)}
    step = {name: 0.01 * value for name, value in ends.items()} | {"n": 60}
    summary = {"step_seconds": {"method": step, "control": control}, "step_ratio": ratio}
    summary |= {"constraint_share": 1 - 1 / ratio, "gpu_peak_bytes": None, "gpu_energy_joules": None}
    return write(root, run, environment=environment, **(summary | {"gpu_reason": "no CUDA device"} | changes))


def comparison(
    root: Path,
    methods: Mapping[str, tuple[float, float]],
    *,
    fields=({"depth": 4},),
    scales=(1.0,),
    rates=RATES,
    seeds=5,
    epochs=2,
    environment=CPU,
    problem="toy",
    device="cpu",
    signals=False,
    faults=False,
    wrong: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """A whole comparison: each method's (accuracy, error), best at rate 1, with noise that the methods share.

    With ``faults``, the largest rate diverges, one run in nine fails, and the last method is skipped.
    ``wrong`` says which methods have which known faults.
    """
    rng = np.random.default_rng(0)
    noise = {seed: rng.normal(scale=0.01) for seed in range(FRESH + seeds)}
    for point in fields:
        layers = point.get("depth", 2)
        for scale in scales:
            for i, (method, (level, error)) in enumerate(methods.items()):
                cell = {"problem": problem, "fields": point, "method": method, "options": {"scale": scale}}
                cell |= {"device": device}
                runs = [(lr, 0, "tuning") for lr in rates] + [(1.0, FRESH + s, "final") for s in range(seeds)]
                for j, (lr, seed, phase) in enumerate(runs):
                    run = spec(**cell, lr=lr, seed=seed, phase=phase)
                    value = level - 0.1 * abs(np.log10(lr)) + noise[seed] - (0.1 if scale == 1.0 else 0.0)
                    if faults and i == len(methods) - 1:
                        write(root, run, "skipped", f"{method!r} cannot hold a weight of that layout")
                    elif faults and lr == max(rates):
                        write(root, run, "diverged", f"loss non-finite in epoch {i}", environment=environment)
                    elif faults and (i + j) % 9 == 8:
                        kind = ("error", "crashed", "out of memory", "timeout")[i % 4]
                        write(root, run, kind, f"RuntimeError: made up {i % 3}", environment=environment)
                    else:
                        rows = []
                        for epoch in range(epochs + 1):
                            now = value * (1 - np.exp(-3 * epoch / epochs)) + rng.normal(scale=0.004)
                            rows.append(measured(epoch, now, error * (1 + epoch / 9), layers=layers))
                            rows[-1]["train_loss"] = None if epoch == 0 else float(2 * np.exp(-4 * epoch / epochs))
                        if signals:
                            for row in rows[:: max(1, epochs // 5)]:
                                row["effective_rate"] = {f"l{k}": 0.99 ** (i * row["epoch"]) for k in range(layers)}
                            rows[0] |= diagnosed(layers, 0.0)
                            rows[-1] |= diagnosed(layers, 0.1 * (i + 1))
                        steps = None if value < 0.5 else int(200 * (1.2 - level) + 5 * i)
                        known = {"faults": wrong[method]} if method in wrong else {}
                        trained(root, run, float(value), error, steps, environment=environment, rows=rows, **known)
                if scale == scales[-1] and not (faults and i == len(methods) - 1):
                    counts = {"matmul_flops": 1e6 * (i + 1), "factorization_flops": 3e5 * i, "operators": 90 + i}
                    run = spec(**cell, lr=min(rates), seed=FRESH, phase="final", kind="cost")
                    timed(root, run, 1.0 + 0.5 * i, environment=environment, **counts)


if __name__ == "__main__":
    count, depths = (int(text) for text in (*sys.argv[2:], "20", "2")[:2])
    names = ["unconstrained", *(name for name in stiefel.available() if name != "unconstrained")]
    levels = {name: (0.97 - 0.02 * i, 10.0 ** -(i % 9) if i else 1.0) for i, name in enumerate(names[:count])}
    comparison(
        Path(sys.argv[1]), levels, fields=[{"depth": 4 * (d + 1)} for d in range(depths)], scales=(1.0, "relu"),
        epochs=35, rates=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0), signals=True, faults=True,
    )  # fmt: skip
