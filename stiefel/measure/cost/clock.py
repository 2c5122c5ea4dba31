"""How long steps take, on the CPU and on a GPU. Imports ``accelerator``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch

from stiefel.measure.cost.accelerator import is_accelerator, recorded, synchronize


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample, in the sample's unit, and its size."""

    median: float
    q1: float
    q3: float
    n: int

    @classmethod
    def of(cls, sample: list[float]) -> Spread:
        """Summarize a sample of at least one number."""
        q = torch.tensor(sample, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
        return cls(median=q[1].item(), q1=q[0].item(), q3=q[2].item(), n=len(sample))


class StepClock:
    """Times steps on a device: two events per step on an accelerator, read at the end; ``perf_counter`` on the CPU.

    with clock:
        one_step()
    seconds = clock.seconds()
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cpu: list[float] = []
        self._there = is_accelerator(device)
        self._events: list[list[torch.Event]] = []

    def __enter__(self) -> StepClock:
        if self._there:
            # The stream records the time when it gets there, so the host need not wait for the step to end.
            self._events.append([recorded(self.device, timing=True)])
        else:
            self._cpu.append(-time.perf_counter())  # __exit__ adds the end
        return self

    def __exit__(self, *error: object) -> None:
        if self._there:
            self._events[-1].append(recorded(self.device, timing=True))
        else:
            self._cpu[-1] += time.perf_counter()

    def seconds(self) -> list[float]:
        """Duration of each step so far."""
        if not self._there:
            return list(self._cpu)
        synchronize(self.device)
        return [_elapsed(pair) for pair in self._events]

    def total(self) -> float:
        """Seconds over all steps so far; synchronizes an accelerator."""
        return sum(self.seconds())

    def drain(self, *, wait: bool = False) -> list[float]:
        """Durations of the steps that have ended on the device, oldest first, which the clock then forgets.

        Args:
            wait: whether to wait for the device, so that no step is left.
        """
        if not self._there:
            ended, self._cpu = self._cpu, []
            return ended
        if wait:
            synchronize(self.device)
        ready = 0  # events are reached in their order
        while ready < len(self._events) and self._events[ready][1].query():
            ready += 1
        ended, self._events = [_elapsed(pair) for pair in self._events[:ready]], self._events[ready:]
        return ended

    def last(self) -> float:
        """Duration of the last step, on the CPU."""
        return self._cpu[-1]

    def discard(self) -> None:
        """Forget the last step."""
        (self._events if self._there else self._cpu).pop()


def _elapsed(pair: list[torch.Event]) -> float:
    return pair[0].elapsed_time(pair[1]) / 1e3  # milliseconds


def interleaved(
    steps: Mapping[str, Callable[[], object]], device: torch.device, *, warmup: int, repeats: int
) -> dict[str, Spread]:
    """Time several kinds of step in turn, so that what disturbs the machine disturbs all alike.

    Args:
        steps: what to time, by name.
        device: where they run.
        warmup: untimed rounds.
        repeats: timed rounds.

    Returns:
        Seconds of each, by name.
    """
    clocks = {name: StepClock(device) for name in steps}
    for _ in range(warmup):
        for step in steps.values():
            step()
    for _ in range(repeats):
        for name, step in steps.items():
            with clocks[name]:
                step()
    return {name: Spread.of(clock.seconds()) for name, clock in clocks.items()}


def as_dict(spreads: dict[str, Spread]) -> dict[str, dict[str, float]]:
    """Spreads as plain data, for a record."""
    return {name: asdict(spread) for name, spread in spreads.items()}
