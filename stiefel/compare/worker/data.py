"""A problem's data on a run's device. Imports ``problem``."""

from __future__ import annotations

import torch

from stiefel.compare.problem.batches import Batches, mover
from stiefel.compare.problem.load import load_data
from stiefel.compare.problem.problem import Problem
from stiefel.compare.record.spec import RunSpec


def parts(problem: Problem, spec: RunSpec, device: torch.device) -> dict[str, Batches]:
    """The parts of a problem's data by name, on the run's device and in its dtype, ordered by its seed."""
    data, prepare = load_data(problem), mover(device, getattr(torch, spec.dtype))
    found = {"train": data.train, "validation": data.validation, "test": data.test}
    # Tensors move once, here; the batches of an iterable one by one.
    moved = {name: prepare(part) if isinstance(part, tuple) else part for name, part in found.items()}
    limit = problem.steps_per_epoch  # of training: evaluation goes through the whole of its part
    return {
        name: Batches(part, problem.batch_size, spec.seed, prepare, limit if name == "train" else None)
        for name, part in moved.items()
    }
