"""How much energy a GPU has used. Imports ``environment``, and pynvml where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

from stiefel.measure.cost.environment import no_gpu_reason


class EnergyMeter:
    """Energy that a GPU has used since the meter was made, from the counter of the whole board (NVML, in mJ).

    It counts what the board uses idle, and for other processes: the device must be exclusive, and the window several
    seconds, for the counter advances in steps of some 0.1 s.

    ``reason`` is None, or why there is no reading.
    """

    def __init__(self, device: torch.device) -> None:
        self.reason: str | None = no_gpu_reason(device) if device.type != "cuda" else None
        self._read: Callable[[], int] | None = None
        if self.reason is None:
            try:
                self._read = _energy_counter(device)
                self._start = self._read()
            except Exception as error:  # NVML fails in many ways, and a missing energy must not cost the run
                self._fail(error)

    def joules(self) -> float | None:
        """Joules since the start; None where there is no reading. On a GPU, of the work that has ended."""
        if self._read is None:
            return None
        try:
            return (self._read() - self._start) / 1e3  # mJ to J
        except Exception as error:
            self._fail(error)
            return None

    def _fail(self, error: Exception) -> None:
        self._read, self.reason = None, f"no energy reading: {type(error).__name__}: {error}"


def _energy_counter(device: torch.device) -> Callable[[], int]:
    import pynvml

    pynvml.nvmlInit()
    # By UUID: NVML numbers all GPUs of the machine, torch only those in CUDA_VISIBLE_DEVICES.
    handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
