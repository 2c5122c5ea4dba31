"""The fields of a measured row. Imports ``measure.model``, ``measure.cost`` and ``attach``."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from stiefel.attach import ConstrainedWeight, constrained_weights, gradient_norm
from stiefel.measure.cost.energy import EnergyMeter
from stiefel.measure.cost.memory import peak_allocated_bytes, peak_reserved_bytes, peak_resident_bytes
from stiefel.measure.model.orthogonality import errors
from stiefel.measure.model.signal import Probe
from stiefel.measure.monitor.sinks import Row


class Gauge:
    """Measures a model, which it does not keep alive, and what its training has taken of the machine.

    Args:
        model: whose constrained weights are measured.
        device: where it runs.
        energy: whether to read the GPU's energy counter.
        loss: whose gradient's norm is measured; None for none.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        *,
        energy: bool,
        loss: Callable[[], Tensor | Iterable[Tensor]] | None = None,
    ) -> None:
        self.weights: dict[str, dict[str, Any]] = {}  # by name, the measurements of each so far
        self._model, self._device = weakref.ref(model), device
        self._meter = EnergyMeter(device) if energy else None
        self._joules = 0.0  # until the last measured row
        self._loss = loss
        self.gradient_norm: float | None = None  # of the last measured row

    @property
    def model(self) -> nn.Module | None:
        """The model, while it lives."""
        return self._model()

    @property
    def worst(self) -> float | None:
        """The largest residual of the last measurement."""
        return _worst(weight["last"] for weight in self.weights.values())

    def measure(self, row: Row, probe: Probe | None) -> None:
        """Add the current measurements to a row, and the signals that a probe saw in the step."""
        model = self.model
        if model is not None:
            layers = errors(model)
            row |= {"worst": _worst(layers.values()), "orthogonality": layers, "shortened": {}}
            for weight in constrained_weights(model):
                found = self._note(weight, layers[weight.name], row["step"])
                if found["shortened"] is not None:
                    row["shortened"][weight.name] = found["shortened"]
            if self._loss is not None:
                row["gradient_norm"] = self.gradient_norm = gradient_norm(model, self._loss)
        if probe is not None:
            seen = probe.layers().items()
            row["signal"] = {name: {"forward": s.forward, "backward": s.backward} for name, s in seen}
        row |= self.costs()
        # The meter counts from the start, a row from the last measured one.
        joules = row["gpu_energy_joules"]
        if joules is not None:
            row["gpu_energy_joules"], self._joules = joules - self._joules, joules

    def _note(self, weight: ConstrainedWeight, last: float, step: int) -> dict[str, Any]:
        tally, before = weight.binding.tally, self.weights.get(weight.name)
        worst = last if before is None else _worst((last, before["worst"]))
        # The first step with that error; of a NaN, which is equal to nothing, the first of all.
        kept = before is not None and (worst == before["worst"] or before["worst"] != before["worst"])
        self.weights[weight.name] = {
            "method": weight.binding.constraint.name,
            "last": last,
            "last_step": step,
            "worst": worst,
            "worst_step": before["worst_step"] if before is not None and kept else step,
            "measured": (before["measured"] if before is not None else 0) + 1,
            "steps": tally.steps,
            "shortened": None if tally.shortened is None else int(tally.shortened),
        }
        return self.weights[weight.name]

    def costs(self) -> Row:
        """Memory and energy since the start."""
        return {
            "peak_resident_bytes": peak_resident_bytes(),
            "gpu_peak_bytes": peak_allocated_bytes(self._device),
            "gpu_reserved_bytes": peak_reserved_bytes(self._device),
            "gpu_energy_joules": self._meter.joules() if self._meter else None,
            "gpu_reason": self._meter.reason if self._meter else "energy was not asked for: energy=False",
        }


def _worst(values: Iterable[float]) -> float | None:
    """The largest, NaN where there is one; None of none."""
    found = list(values)
    # max() alone would pass over a NaN that is not the first.
    return float("nan") if any(v != v for v in found) else max(found, default=None)
