"""All that one kind of step costs, for a record. Imports the rest of ``cost``."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from stiefel.errors import UncountedOperatorError
from stiefel.measure.cost.accelerator import is_accelerator, reset_peaks, synchronize
from stiefel.measure.cost.clock import interleaved
from stiefel.measure.cost.energy import EnergyMeter
from stiefel.measure.cost.environment import no_gpu_reason
from stiefel.measure.cost.flops import count
from stiefel.measure.cost.memory import peak_allocated_bytes, peak_reserved_bytes, peak_resident_bytes


def gpu_cost(device: torch.device, step: Callable[[], object], *, seconds: float = 3.0) -> dict[str, Any]:
    """Peak memory and energy per step on a GPU; nulls with the reason where there is none.

    Args:
        device: where the step runs; no other process may use it.
        step: the training step.
        seconds: window over which the energy is read.

    Returns:
        ``gpu_peak_bytes`` (allocated), ``gpu_reserved_bytes``, ``gpu_energy_joules`` per step, and ``gpu_reason``, None
        or why a field is null.
    """
    fields: dict[str, Any] = {"gpu_peak_bytes": None, "gpu_reserved_bytes": None, "gpu_energy_joules": None}
    if not is_accelerator(device):
        return fields | {"gpu_reason": no_gpu_reason(device)}
    step()  # allocates the optimizer's state and workspaces
    synchronize(device)
    reset_peaks(device)  # so that the peak is that of a later step
    step()
    synchronize(device)
    fields["gpu_peak_bytes"] = peak_allocated_bytes(device)
    fields["gpu_reserved_bytes"] = peak_reserved_bytes(device)
    meter, steps, start = EnergyMeter(device), 0, time.perf_counter()
    while meter.reason is None and time.perf_counter() - start < seconds:
        step()
        # Otherwise the host would run ahead, and count steps whose energy is not yet spent.
        synchronize(device)
        steps += 1
    joules = meter.joules()
    return fields | {
        "gpu_energy_joules": joules / steps if joules is not None and steps else None,
        "gpu_reason": meter.reason or (no_gpu_reason(device) if fields["gpu_peak_bytes"] is None else None),
    }


def computed(step: Callable[[], object]) -> dict[str, Any]:
    """What a step computes, for a record; nulls with the reason where an operator cannot be counted.

    Returns:
        ``matmul_flops``, ``factorization_flops``, ``operators`` (:func:`stiefel.measure.cost.flops.count`), and
        ``flops_reason``, None or why the others are null.
    """
    try:
        found = count(step)
    except UncountedOperatorError as error:
        return {"matmul_flops": None, "factorization_flops": None, "operators": None, "flops_reason": str(error)}
    return {
        "matmul_flops": found.matmul_flops,
        "factorization_flops": found.factorization_flops,
        "operators": found.operators,
        "flops_reason": None,
    }


def step_cost(
    step: Callable[[], object], device: torch.device, *, warmup: int = 20, repeats: int = 20, seconds: float = 3.0
) -> dict[str, Any]:
    """All that one kind of step costs, as plain data for a record: time, memory, energy, FLOPs, operators.

    The step runs ``warmup + repeats`` times and once to be counted; on a GPU, ``seconds`` more for its energy. A ratio
    to another kind of step is better taken by :func:`interleaved`.

    Args:
        step: the training step.
        device: where it runs.
        warmup: untimed steps.
        repeats: timed steps; 0 leaves ``seconds_per_step`` out.
        seconds: window over which a GPU's energy is read.

    Returns:
        ``seconds_per_step`` (median, q1, q3, n), the fields of :func:`computed` and of :func:`gpu_cost`, and
        ``peak_resident_bytes`` of this process so far.
    """
    timed = interleaved({"step": step}, device, warmup=warmup, repeats=repeats) if repeats else {}
    return {
        **({"seconds_per_step": asdict(timed["step"])} if timed else {}),
        **computed(step),
        **gpu_cost(device, step, seconds=seconds),
        "peak_resident_bytes": peak_resident_bytes(),
    }
