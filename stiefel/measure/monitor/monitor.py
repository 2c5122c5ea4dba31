"""What happens in a user's own training loop, as it happens. Imports the rest of ``measure``, ``attach`` and below."""

from __future__ import annotations

import math
import time
import weakref
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from stiefel.attach import constrained_weights
from stiefel.errors import OptionError
from stiefel.measure.cost.clock import Spread, StepClock
from stiefel.measure.cost.energy import EnergyMeter
from stiefel.measure.cost.memory import peak_allocated_bytes, peak_reserved_bytes, peak_resident_bytes
from stiefel.measure.model.orthogonality import errors
from stiefel.measure.model.signal import Probe
from stiefel.measure.monitor.cadence import SHARE, Budget, Opening
from stiefel.measure.monitor.display import LiveLine, figure, live_text, table
from stiefel.measure.monitor.history import History, Thinned, Transfer, check, taken
from stiefel.measure.monitor.sinks import Row, flat, sink_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

REFRESH = 0.05
"""Seconds between two looks at what the device has told, and between two states of the live line."""

MOST_WAITING = 1_000
"""Steps after which durations are taken from the clock, and numbers from a device, though no row is due."""

FLUSH = 1.0
"""Seconds of rows, at most, that a process that is killed takes with it; measured rows are out of its reach at once."""


@dataclass
class _Pending:
    """Numbers on their way from the device, and the row, if any, that waits for them."""

    transfers: list[Transfer]
    row: Row | None = None
    marked: bool = False
    names: tuple[str, ...] = ()


class Monitor:
    """Records a training loop: loss, orthogonality of each weight, step time, peak memory, energy.

    monitor = stiefel.Monitor(model, sinks=["log.jsonl"])
    for batch in loader:
        with monitor:
            loss = train_step(batch)
        monitor.log(loss=loss)
    print(monitor)

    A *row* has the ``step``, its ``seconds``, the ``time`` in seconds since the monitor was made, and what was logged.
    A measured row has besides: ``orthogonality``, ‖XXᵀ − I‖_F/√p of each constrained weight, and the ``worst`` of them;
    ``shortened``, how many steps a method has shortened so far; ``signal`` if asked for; ``peak_resident_bytes``;
    ``gpu_peak_bytes``, ``gpu_reserved_bytes``, ``gpu_energy_joules`` since the last measured row, and ``gpu_reason``,
    None or why they are null.

    By default the cadence adapts: measured at least 20 times in the first second of training, the denser the earlier,
    then as often as 1 % of the time in steps allows, half of it for measured rows and half for the others. The first
    step, the last (by ``close``, ``summary`` and ``plot``), and a name that the step before did not have are always
    written, so that a metric of every epoch is. Every number that is logged is kept, written or not: the figure and
    ``history`` have them.

    Args:
        model: whose constrained weights are measured; it is left as it is, and not kept alive.
        every: measure and write each so many steps instead, whatever that costs.
        sinks: where rows go: paths that end in ``.jsonl`` or ``.csv``, which are appended to and flushed every second;
            objects with ``add_scalar(tag, value, step)``, as TensorBoard's SummaryWriter; functions of a row.
        live: whether to keep a line on the standard error; by default where that is a terminal.
        device: where the model runs; by default where its first parameter is.
        energy: whether to read the GPU's energy counter.
        signal: whether to measure how each layer changes the norm of signals and gradients, in the steps whose row is
            measured; those steps are not timed. It needs the ``with``.
        step: steps taken before, where a training is resumed.

    Raises:
        OptionError: a sink is not one, or ``every`` is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int | None = None,
        sinks: Iterable[Any] = (),
        live: bool | None = None,
        device: torch.device | str | None = None,
        energy: bool = True,
        signal: bool = False,
        step: int = 0,
    ) -> None:
        if every is not None and every < 1:
            raise OptionError(f"every={every} is not a number of steps; use 1 or more, or None for what 1 % pays")
        if isinstance(sinks, str) or not isinstance(sinks, Iterable):
            raise OptionError(f"sinks={sinks!r} has to be a list of sinks")
        self.step, self.every, self.signal = step, every, signal
        first = next(model.parameters(), None)
        self.device = torch.device(device) if device else first.device if first is not None else torch.device("cpu")
        self._model = weakref.ref(model)
        self._sinks = [sink_of(target) for target in sinks]
        line = LiveLine()
        self._live = line if (line.stream.isatty() if live is None else live) else None
        self._clock, self._start = StepClock(self.device), time.perf_counter()
        self._meter = EnergyMeter(self.device) if energy else None
        self._joules = 0.0
        self._measuring, self._writing = Budget(SHARE / 2), Budget(SHARE / 2)
        self._opening = Opening() if every is None else None  # until it is over
        self._trained = 0.0  # seconds in steps, as far as the device has told
        self._settled = step  # the last step whose duration it has told
        self._told: dict[int, float] = {}  # durations that a row may still ask for
        self._durations = Thinned(5_000)
        self._rows, self._marked, self._history = Thinned(10_000), Thinned(10_000), History()
        self._pending: deque[_Pending] = deque()
        self._weights: dict[str, dict[str, Any]] = {}
        self._latest: Row = {}
        self._measured_at: int | None = None
        # A step at which nothing is due costs no more than these comparisons.
        self._names: frozenset[str] = frozenset()  # that the last call of log had
        self._names_step = step
        self._names_at: dict[str, int] = {}  # the step at which each name was logged last, those of _names left out
        self._due_trained = self._due_step = self._due_clock = 0.0
        self._probe: Probe | None = None
        self._probed: set[int] = set()
        self._on_host = self.device.type != "cuda"  # durations are known at once
        self._inside = self._used = self._unlogged = False
        self._kept: dict[str, Any] = {}
        self._left = self._start  # when the last call of log ended
        self._shown = self._flushed = 0.0

    # --- one step ---

    def __enter__(self) -> Monitor:
        start = time.perf_counter()
        if self._inside:
            raise OptionError("a monitor times one step at a time, and was entered inside its own `with`")
        if self._unlogged:
            self.log()
            start = time.perf_counter()
        if self.signal and self._look_now() and (model := self._model()) is not None:
            self._probe = Probe(model)
            self._probe.__enter__()
        self._inside = self._used = True
        self._writing.spent += time.perf_counter() - start
        self._clock.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._clock.__exit__()
        start = time.perf_counter()
        self._inside = False
        if self._probe is not None:
            self._probe.__exit__()
        if kind is not None:  # a step that failed is none
            self._clock.discard()
            self._probe, self._kept = None, {}
            return
        self.step += 1
        self._unlogged = True
        if self._probe is not None:
            self._probed.add(self.step)
        elif self._on_host:
            self._trained += self._clock.last()
        self._writing.spent += time.perf_counter() - start
        if self._kept:
            kept, self._kept = self._kept, {}
            self.log(**kept)

    def log(self, **values: Any) -> None:
        """Record numbers of the step just taken, and whatever is due.

        Numbers on a GPU are copied as they are now and read once they have arrived, without waiting. Inside the
        ``with`` they are kept until the step has ended. Without any ``with`` each call is a step, which is not timed.

        Args:
            values: numbers, or tensors of one element, by name.

        Raises:
            OptionError: a value is not a single number, or its name is one of the monitor's own.
        """
        start = time.perf_counter()
        if (
            self._trained < self._due_trained
            and self.step < self._due_step
            and start < self._due_clock
            and values.keys() == self._names
            and self._unlogged
        ):
            self._history.add(self.step, taken(values))
            self._unlogged, self._names_step = False, self.step
            self._writing.spent += time.perf_counter() - start
            return
        spent = self._spent
        check(values)
        values = taken(values)
        if self._inside:
            self._kept |= values
            return
        if not self._used:
            self.step += 1
            self._trained += start - self._left
        self._log(values, start)
        self._left = time.perf_counter()
        self._writing.spent += self._left - start - (self._spent - spent)

    def _log(self, values: dict[str, Any], now: float) -> None:
        self._unlogged = False
        self._history.add(self.step, values)
        self._settle()
        measure = self._probe is not None or self._measure_now(self.step)
        if self.signal and self._used and self.every is None:  # the step that is looked at was chosen before it began
            measure = self._probe is not None
        self._names_at |= dict.fromkeys(self._names, self._names_step)
        new = any(self._names_at.get(name, -1) < self.step - 1 for name in values)
        self._names, self._names_step = frozenset(values), self.step
        if measure or new or (self.every is None and self._writing.allows(self._trained)):
            self._record(values, measure=measure, marked=measure or new)
        elif self._history.waiting >= MOST_WAITING:
            self._pending.append(_Pending(self._history.send()))
        if (
            self._live is not None
            and now >= self._shown + REFRESH
            and (self.every or self._writing.allows(self._trained))
        ):
            self._shown = now
            self._live.show(self._line())
        self._plan(now)

    def _plan(self, now: float) -> None:
        """Until when nothing is due."""
        if self._opening is not None and self._trained >= Opening.SECONDS:
            self._opening = None
            self._measuring.restart(self._trained)
            self._writing.restart(self._trained)
        self._due_step = self.step + MOST_WAITING
        if self.every is None:
            self._due_trained = min(self._measuring.next, self._writing.next)
        else:
            self._due_trained = math.inf
            self._due_step = min(self._due_step, (self.step // self.every + 1) * self.every)
        self._due_clock = now + REFRESH if self._live is not None or not self._on_host else math.inf
        if self._opening is not None:
            self._due_clock = now

    @property
    def _spent(self) -> float:
        return self._measuring.total + self._writing.total

    def _measure_now(self, step: int) -> bool:
        if self._measured_at is None:
            return True
        if step == self._measured_at:
            return False
        if self.every:
            return step % self.every == 0
        dense = self._opening is not None and self._opening.allows(self._trained, step)
        return dense or self._measuring.allows(self._trained)

    def _look_now(self) -> bool:
        """Whether the next step is to be looked at, and so not timed: never two in a row, unless that is asked for."""
        return self._measure_now(self.step + 1) and (self.every is not None or self._measured_at != self.step)

    def _record(self, names: Collection[str], *, measure: bool, marked: bool) -> None:
        start = time.perf_counter()
        row: Row = {"step": self.step, "seconds": None, "time": start - self._start, **dict.fromkeys(names)}
        pending = _Pending(self._history.send(), row, marked, tuple(names))
        row |= self._history.numbers(self.step, names)
        if measure:
            self._measure(row)
            if self._opening is not None:
                self._opening.take(self._trained, self.step)
        self._pending.append(pending)
        self._settle()
        (self._measuring if measure else self._writing).spend(time.perf_counter() - start)

    # --- what is due ---

    def _measure(self, row: Row) -> None:
        model = self._model()
        layers = errors(model) if model is not None else {}
        if model is not None:
            row |= {"worst": _worst(layers.values()), "orthogonality": layers, "shortened": {}}
        for weight in constrained_weights(model) if model is not None else ():
            name, tally, last = weight.name, weight.binding.tally, layers[weight.name]
            shortened = None if tally.shortened is None else int(tally.shortened)
            if shortened is not None:
                row["shortened"][name] = shortened
            before = self._weights.get(name, {"worst": last, "measured": 0})
            self._weights[name] = {
                "method": weight.binding.constraint.name,
                "last": last,
                "worst": _worst((last, before["worst"])),
                "measured": before["measured"] + 1,
                "steps": tally.steps,
                "shortened": shortened,
            }
        if self._probe is not None:
            layers_seen = self._probe.layers().items()
            row["signal"] = {name: {"forward": s.forward, "backward": s.backward} for name, s in layers_seen}
            self._probe = None
        row |= self._costs()
        joules = row["gpu_energy_joules"]
        if joules is not None:
            row["gpu_energy_joules"], self._joules = joules - self._joules, joules
        self._measured_at = self.step

    def _costs(self) -> Row:
        """Memory and energy since the start."""
        return {
            "peak_resident_bytes": peak_resident_bytes(),
            "gpu_peak_bytes": peak_allocated_bytes(self.device),
            "gpu_reserved_bytes": peak_reserved_bytes(self.device),
            "gpu_energy_joules": self._meter.joules() if self._meter else None,
            "gpu_reason": self._meter.reason if self._meter else "energy was not asked for: energy=False",
        }

    def _settle(self, *, wait: bool = False) -> None:
        """Take what the device has told by now: durations of steps, and the numbers that rows wait for."""
        if not self._pending:
            self._told = {step: seconds for step, seconds in self._told.items() if step == self.step}
        for seconds in self._clock.drain(wait=wait):
            self._settled += 1
            self._timed(self._settled, seconds)
        while self._pending:
            pending = self._pending[0]
            row, arrived = pending.row, wait or all(transfer.arrived for transfer in pending.transfers)
            if not arrived or (row is not None and self._used and self._settled < row["step"]):
                return
            self._pending.popleft()
            self._history.receive(pending.transfers)
            if row is not None:
                row["seconds"] = self._told.get(row["step"])
                row |= self._history.numbers(row["step"], pending.names)
                self._emit(row, pending.marked)

    def _timed(self, step: int, seconds: float) -> None:
        if step not in self._probed:
            if not self._on_host:
                self._trained += seconds
            self._told[step] = seconds
            self._durations.add((step, seconds))
            return
        self._probed.remove(step)
        usual = self._usual()
        if usual is not None:  # what looking took, as far as it can be told
            self._measuring.spend(max(0.0, seconds - usual))
            self._trained += min(seconds, usual)

    def _usual(self) -> float | None:
        recent = sorted(seconds for _, seconds in self._durations.entries[-50:])
        return recent[len(recent) // 2] if recent else None

    def _emit(self, row: Row, marked: bool) -> None:
        self._latest = row
        (self._marked if marked else self._rows).add((self._rows.seen + self._marked.seen, row))
        for sink in self._sinks:
            sink.write(row)
        now = time.perf_counter()
        if marked or now > self._flushed + FLUSH:  # a flush costs more than the row
            self._flushed = now
            for sink in self._sinks:
                sink.flush()

    def _line(self) -> str:
        worst = _worst(weight["last"] for weight in self._weights.values())
        return live_text(self._latest, worst, self.step, self._usual())

    # --- what was recorded ---

    @property
    def overhead(self) -> float:
        """Time that the monitor has taken, as a share of the time in steps; 0 before the first."""
        return self._spent / self._trained if self._trained else 0.0

    @property
    def rows(self) -> list[Row]:
        """The rows so far, in order; of more than 10 000 of a kind (measured ones, others) an evenly spread part."""
        return [row for _, row in sorted(self._rows.entries + self._marked.entries, key=lambda entry: entry[0])]

    @property
    def history(self) -> dict[str, list[tuple[int, float]]]:
        """Steps and values of all that was logged, by name; of more than a million of a name an evenly spread part.

        It waits for numbers that a device still has.
        """
        self._pending.append(_Pending(self._history.send()))
        self._settle(wait=True)
        return self._history.series()

    def frame(self) -> pd.DataFrame:
        """The rows as a pandas frame, inner entries as columns ``orthogonality/<weight>``."""
        import pandas as pd

        return pd.DataFrame([dict(flat(row)) for row in self.rows])

    def summary(self) -> dict[str, Any]:
        """All rows in one, for JSON; it measures once more where the last step was not measured.

        Returns:
            ``steps``, ``seconds`` in them, ``seconds_per_step`` (median, q1, q3, n; None before the first),
            ``overhead``, and ``later_overhead``, that after the first second (None in it, and with ``every``), the
            memory fields, ``gpu_energy_joules`` of the whole time, ``gpu_reason``, and ``weights``: by name ``method``,
            ``last`` and ``worst`` ‖XXᵀ − I‖_F/√p of the times it was ``measured``, optimizer ``steps``, how many were
            ``shortened``.
        """
        self._catch_up()
        self._settle()
        durations = [seconds for _, seconds in self._durations.entries]
        return {
            "steps": self.step,
            "seconds": self._trained,
            "seconds_per_step": asdict(Spread.of(durations)) if durations else None,
            "overhead": self.overhead,
            "later_overhead": self._later_overhead,
            **self._costs(),
            "weights": self._weights,
        }

    @property
    def _later_overhead(self) -> float | None:
        start = self._measuring.start
        later = self._trained - start
        return (self._measuring.spent + self._writing.spent) / later if start and later else None

    def __str__(self) -> str:
        return table(self.summary(), opening=self._opening is not None)

    def plot(self) -> Figure:
        """A matplotlib figure against steps: what was logged, orthogonality of each weight, step time."""
        self._catch_up()
        return figure(self.history, self.rows, self._durations.entries)

    def _catch_up(self) -> None:
        """Measure the last step, if it is not, unless one is under way."""
        if not self._inside and self._measured_at != self.step and (self._unlogged or self._measured_at is not None):
            self._record(self._history.names(self.step), measure=True, marked=True)

    def close(self) -> None:
        """Measure once more, write what is left, and close the files.

        It waits for the device. It may be called twice, and the monitor used again: files are reopened and appended to.
        """
        if self._unlogged:
            self.log()
        self._catch_up()
        self._settle(wait=True)
        for sink in self._sinks:
            sink.close()
        if self._live is not None and self._latest:
            self._live.show(self._line())
            self._live.close()


def _worst(values: Iterable[float]) -> float | None:
    """The largest, NaN where there is one; None of none."""
    found = list(values)
    return float("nan") if any(v != v for v in found) else max(found, default=None)
