"""What happens in a user's own training loop, as it happens. Imports the rest of ``measure``."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stiefel.errors import OptionError
from stiefel.measure.cost.accelerator import is_accelerator
from stiefel.measure.cost.clock import Spread, StepClock
from stiefel.measure.model.signal import Probe
from stiefel.measure.monitor.cadence import Cadence, Due
from stiefel.measure.monitor.display import LiveLine, figure, live_text, table
from stiefel.measure.monitor.gauge import Gauge
from stiefel.measure.monitor.history import check, taken
from stiefel.measure.monitor.rows import Rows
from stiefel.measure.monitor.sinks import Row, flat, sink_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


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
    ``gradient_norm`` where a ``loss`` was given; ``gpu_peak_bytes``, ``gpu_reserved_bytes``, ``gpu_energy_joules``
    since the last measured row, and ``gpu_reason``, None or why they are null.

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
        loss: a function without arguments that returns the loss, or yields those of several batches: how stationary the
            model is by it (:func:`stiefel.gradient_norm`) is measured too.
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
        loss: Callable[[], Tensor | Iterable[Tensor]] | None = None,
        step: int = 0,
    ) -> None:
        if every is not None and every < 1:
            raise OptionError(
                f"every={every}: expected at least 1 step, or None to measure within 1 % of training time"
            )
        if isinstance(sinks, str) or not isinstance(sinks, Iterable):
            raise OptionError(f"sinks={sinks!r} has to be a list of sinks, for example ['log.jsonl']")
        first = next(model.parameters(), None)
        self.step, self.signal = step, signal
        self.device = torch.device(device) if device else first.device if first is not None else torch.device("cpu")
        self._rows = Rows([sink_of(target) for target in sinks], step)
        line = LiveLine()
        self._live = line if (line.stream.isatty() if live is None else live) else None
        self._clock, self._start = StepClock(self.device), time.perf_counter()
        self._on_host = not is_accelerator(self.device)  # durations are known at once
        self._cadence = Cadence(every, step, by_clock=self._live is not None or not self._on_host)
        self._gauge = Gauge(model, self.device, energy=energy, loss=loss)
        self._probe: Probe | None = None
        self._inside = self._used = self._unlogged = False
        self._kept: dict[str, Any] = {}  # logged inside the `with`
        self._left = self._start  # when the last call of log ended

    # --- one step ---

    def __enter__(self) -> Monitor:
        start = time.perf_counter()
        if self._inside:
            raise OptionError("a monitor times one step at a time: it cannot be entered again inside its own `with`")
        if self._unlogged:
            self.log()
            start = time.perf_counter()  # log has accounted for its own time
        if self.signal and self._cadence.looks(self.step) and (model := self._gauge.model) is not None:
            self._probe = Probe(model)
            self._probe.__enter__()
        if not self._used:  # what was logged before the first `with` is an untimed step
            self._rows.durations.told = self.step
        self._inside = self._used = True
        self._cadence.writing.spent += time.perf_counter() - start
        self._clock.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._clock.__exit__()
        start = time.perf_counter()
        self._inside = False
        if self._probe is not None:
            self._probe.__exit__()
        if kind is not None:  # a failed step does not count
            self._clock.discard()
            self._probe, self._kept = None, {}
            return
        self.step += 1
        self._unlogged = True
        if self._probe is not None:
            self._rows.durations.looked.add(self.step)
        elif self._on_host:
            self._cadence.trained += self._clock.last()
        self._cadence.writing.spent += time.perf_counter() - start
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
        start, cadence = time.perf_counter(), self._cadence
        # The fast path of most steps: nothing is due.
        if self._unlogged and cadence.idle(self.step, start, values.keys()):
            self._rows.history.add(self.step, taken(values))
            self._unlogged = False
            cadence.idled(self.step, time.perf_counter() - start)
            return
        spent = cadence.spent
        check(values)
        values = taken(values)
        if self._inside:
            self._kept |= values
            return
        if not self._used:
            self.step += 1
            cadence.trained += start - self._left
        self._log(values, start)
        self._left = time.perf_counter()
        cadence.writing.spent += self._left - start - (cadence.spent - spent)  # rows account for their own

    def _log(self, values: dict[str, Any], now: float) -> None:
        self._unlogged = False
        self._rows.history.add(self.step, values)
        self._settle()
        due = self._cadence.due(self.step, values, looked=self._probe is not None, ahead=self.signal and self._used)
        if due is not Due.NOTHING:
            self._record(values, due)
        elif self._cadence.sends(self._rows.history.waiting):
            self._rows.send()
        if self._live is not None and self._cadence.shows(now):
            self._cadence.shown = now
            self._live.show(self._line())
        self._cadence.plan(self.step, now)

    def _record(self, names: Collection[str], due: Due) -> None:
        start = time.perf_counter()
        row: Row = {"step": self.step, "seconds": None, "time": start - self._start}
        # Before measuring, which waits for the device: meanwhile the numbers are transferred.
        pending = self._rows.begin(row, names, marked=due is not Due.ROW)
        if due is Due.MEASURED:
            self._gauge.measure(row, self._probe)
            self._probe = None
            self._cadence.measured(self.step)
        self._rows.add(pending)
        self._settle()
        self._cadence.spend(due, time.perf_counter() - start)

    def _settle(self, *, wait: bool = False) -> None:
        """Take what has arrived from the device: durations of steps, and the numbers that rows wait for."""
        durations = self._rows.durations
        for seconds in self._clock.drain(wait=wait):
            timed = durations.add(seconds)
            if timed and not self._on_host:  # on the host __exit__ has added it
                self._cadence.trained += seconds
            elif not timed and (usual := durations.usual) is not None:
                self._cadence.looked(seconds, usual)
        self._rows.deliver(self.step, timed=self._used, wait=wait)

    def _line(self) -> str:
        return live_text(self._rows.latest, self._gauge.worst, self.step, self._rows.durations.usual)

    # --- what was recorded ---

    @property
    def every(self) -> int | None:
        """How many steps lie between two measured ones, where that was asked for."""
        return self._cadence.every

    @property
    def overhead(self) -> float:
        """Time that the monitor has taken, as a share of the time in steps; 0 before the first."""
        return self._cadence.overhead

    @property
    def rows(self) -> list[Row]:
        """The rows so far, in order; of more than 10 000 of a kind (measured ones, others) an evenly spread part."""
        return self._rows.kept

    @property
    def history(self) -> dict[str, list[tuple[int, float]]]:
        """Steps and values of all that was logged, by name; of more than a million of a name an evenly spread part.

        It waits for numbers that a device still has.
        """
        self._rows.send()
        self._settle(wait=True)
        return self._rows.history.series()

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
            ``last`` and ``worst`` ‖XXᵀ − I‖_F/√p of the times it was ``measured``, the steps at which they were taken
            (``last_step``, ``worst_step``), optimizer ``steps``, how many were ``shortened``; the last
            ``gradient_norm``, None without a ``loss``.
        """
        self._catch_up()
        self._settle()
        durations = [seconds for _, seconds in self._rows.durations.entries]
        return {
            "steps": self.step,
            "seconds": self._cadence.trained,
            "seconds_per_step": asdict(Spread.of(durations)) if durations else None,
            "overhead": self.overhead,
            "later_overhead": self._cadence.later_overhead,
            **self._gauge.costs(),
            "weights": self._gauge.weights,
            "gradient_norm": self._gauge.gradient_norm,
        }

    def __str__(self) -> str:
        return table(self.summary(), opening=self._cadence.opening is not None)

    def plot(self) -> Figure:
        """A matplotlib figure against steps: what was logged, orthogonality of each weight, step time."""
        self._catch_up()
        return figure(self.history, self.rows, self._rows.durations.entries)

    def _catch_up(self) -> None:
        """Measure the last step if it was not measured, unless a step is under way."""
        at = self._cadence.measured_at
        if not self._inside and at != self.step and (self._unlogged or at is not None):
            self._record(self._rows.history.names(self.step), Due.MEASURED)

    def close(self) -> None:
        """Measure once more, write what is left, and close the files.

        It waits for the device. It may be called twice, and the monitor used again: files are reopened and appended to.
        """
        if self._unlogged:
            self.log()
        self._catch_up()
        self._settle(wait=True)
        self._rows.close()
        if self._live is not None and self._rows.latest:
            self._live.show(self._line())
            self._live.close()
