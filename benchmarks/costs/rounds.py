"""Timing in rounds: all candidates in turn, slow ones in fewer rounds, too slow ones not at all. Imports ``cases``."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from costs.cases import Work
from stiefel.measure.cost.accelerator import is_accelerator, memory, synchronize
from stiefel.measure.cost.clock import Spread, StepClock
from stiefel.measure.cost.step import gpu_cost

LEAST = 3
"""Fewest rounds that a candidate is timed in."""
QUICK = 0.05
"""A call shorter than this many seconds is slowed by what ran before it."""
WARMUP = 20
"""Untimed calls at first; fewer where they would take over a quarter of the candidate's time."""


@dataclass(frozen=True)
class Effort:
    """How much time a candidate gets in one case.

    Args:
        rounds: most rounds that it is timed in.
        seconds: its time for them; a slow one gets fewer, at least ``LEAST``.
        longest: seconds that a call, or setting it up, may take; a candidate beyond it is not timed.
        energy: seconds over which a GPU's energy is read for each candidate; 0 leaves it out.
    """

    rounds: int
    seconds: float
    longest: float
    energy: float = 0.0


class TooSlowError(Exception):
    """A candidate exceeds its time limit."""


@dataclass(frozen=True)
class Rounds(Spread):
    """Seconds of the rounds, with the least: what a call takes where nothing disturbs it."""

    least: float

    @classmethod
    def of(cls, sample: list[float]) -> Rounds:
        """Summarize a sample of at least one number."""
        return cls(**asdict(Spread.of(sample)), least=min(sample))


def in_rounds(works: Mapping[str, Work], device: torch.device, effort: Effort) -> dict[str, Rounds | str]:
    """Seconds of each candidate, or the reason why it was not timed.

    Each round times one call of every candidate whose turn it is, in a random order, so that what disturbs the machine
    disturbs all alike, and none always follows the same other. A quick call is made once before, untimed: in training
    a step follows one of its own kind, not a catalogue of others that have emptied the caches.
    """
    turns: dict[str, int] = {}
    quick: set[str] = set()
    found: dict[str, Rounds | str] = {}
    for name, work in works.items():
        try:
            took = _warm(work, device, effort)
            turns[name] = min(effort.rounds, max(LEAST, int(effort.seconds / took)))
            if took < QUICK:
                quick.add(name)
        except Exception as error:  # a peer that fails at one shape must not cost the others
            found[name] = reason_of(error)
    clocks = {name: StepClock(device) for name in turns}
    order, rounds = list(turns), max(turns.values(), default=0)
    shuffle = random.Random(0).shuffle
    for i in range(rounds):
        shuffle(order)
        for name in order:
            if (i + 1) * turns[name] // rounds > i * turns[name] // rounds:  # its turns lie evenly among the rounds
                if name in quick:
                    works[name].call()
                with clocks[name]:
                    works[name].call()
    return found | {name: Rounds.of(clock.seconds()) for name, clock in clocks.items()}


def reason_of(error: Exception) -> str:
    """Why there is no number."""
    if isinstance(error, TooSlowError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def wall(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds until a call has ended on the device too."""
    start = time.perf_counter()
    call()
    if is_accelerator(device):
        synchronize(device)
    return time.perf_counter() - start


def _warm(work: Work, device: torch.device, effort: Effort) -> float:
    """Call until warm; the seconds of a call."""
    took, spent = wall(work.call, device), 0.0
    if took > effort.longest:
        raise TooSlowError(f"one call took {took:.2g} s, and may take {effort.longest:g} s")
    for _ in range(WARMUP):
        if spent + took > effort.seconds / 4:
            break
        took = wall(work.call, device)
        spent += took
    return took


def gpu_fields(work: Work, device: torch.device, effort: Effort) -> dict[str, Any]:
    """Memory that a call takes on a GPU beyond what was there, and its energy; nulls with the reason."""
    before = memory(device, "memory_allocated") or 0
    fields = gpu_cost(device, work.call, seconds=effort.energy)
    peak = fields.pop("gpu_peak_bytes")
    if fields["gpu_reason"] is None and not effort.energy:
        fields["gpu_reason"] = "energy is read in the full form only"
    return {"gpu_call_bytes": None if peak is None else peak - before, **fields}
