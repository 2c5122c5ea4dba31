"""Which runs a comparison consists of: tuning, its winners with fresh seeds, a cost pass.

Imports ``record``, ``variants`` and ``constraint``.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from stiefel.compare.plan.variants import Variant, label_of
from stiefel.compare.record.choice import Choice, Tuned, cell_key
from stiefel.compare.record.records import Record
from stiefel.compare.record.spec import RunSpec
from stiefel.constraint import get, is_number
from stiefel.errors import OptionError, ProblemError

FRESH = 1000  # first seed of reported runs, far from any tuning seed


REACH = 1e3  # how far beyond its ends a grid may be continued


# Halves first: they split the gaps to both neighbours evenly.
_BETWEEN = (0.5, -0.5, 0.25, -0.25, 0.75, -0.75, 0.125, -0.125)  # steps of the grid away from the best rate


@dataclass(frozen=True)
class Plan:
    """The axes of a comparison.

    Args:
        problem, digest: the problem's name, and the digest of its source.
        settings: one dictionary of the problem's factors per setting.
        variants: methods with options.
        scales: values of the option ``scale``.
        rates: the learning-rate grid, the same for every method.
        seeds: how many fresh seeds each winner is run with.
        tuning_seeds: how many seeds each trial is made with.
        trials: tuning budget of each method in each setting: the grid, then what is left goes to its own knobs, one at
            a time at its best rate, and to rates between those of the grid. None is the grid alone.
        device, dtype: of every run.
        higher_is_better: of the problem's metric.
    """

    problem: str
    digest: str
    settings: tuple[dict[str, Any], ...]
    variants: tuple[Variant, ...]
    scales: tuple[Any, ...]
    rates: tuple[float, ...]
    seeds: int
    tuning_seeds: int = 1
    trials: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        for axis in ("settings", "variants", "scales", "rates"):
            if not getattr(self, axis):
                raise ProblemError(f"the comparison has no {axis}, so there is nothing to run; give at least one")
        if self.trials is not None and self.trials < len(self.rates):
            raise OptionError(
                f"--trials {self.trials} is less than the {len(self.rates)} learning rates of the grid, all of which "
                "every method is tried at; raise --trials, or give fewer rates with --lr"
            )

    @property
    def step(self) -> float:
        """The ratio of neighbouring rates of the grid."""
        span = max(self.rates) / min(self.rates)
        # A single rate has no neighbours: half a decade.
        return span ** (1 / (len(self.rates) - 1)) if span > 1 else 10**0.5

    def tuning(self) -> list[RunSpec]:
        """Every setting × scale × method × learning rate × tuning seed."""
        return [run for cell in self.cells() for lr in self.rates for run in self._seeded(Choice(lr).apply(cell))]

    def tuned(self, records: Iterable[Record] = ()) -> Tuned:
        """Tuning runs of this plan that have ended, with their winners."""
        return Tuned(tuple(records), self.higher_is_better)

    def extension(self, tuned: Tuned) -> list[RunSpec]:
        """One more rate beyond each edge of a setting's grid on which a winner lies; none beyond three decades.

        It is tried with every method of the setting, so that their budgets stay equal.
        """
        # The driver repeats this until no winner lies on an edge.
        best = tuned.winners
        tried: dict[tuple[Any, ...], set[float]] = defaultdict(set)
        for record in tuned.records:
            tried[_setting_key(record.spec)].add(record.spec.lr)
        beyond: dict[tuple[Any, ...], set[float]] = defaultdict(set)
        for cell in self.cells():
            rates, choice = tried[_setting_key(cell)], best.get(cell_key(cell))
            if choice is None:  # every run failed
                continue
            # self.rates, not `rates`: the limit is a distance from the grid as it was given.
            if choice.lr == max(rates) and choice.lr < max(self.rates) * REACH:
                beyond[_setting_key(cell)].add(_rounded(max(rates) * self.step))
            if choice.lr == min(rates) and choice.lr > min(self.rates) / REACH:
                beyond[_setting_key(cell)].add(_rounded(min(rates) / self.step))
        return [
            run
            for cell in self.cells()
            for lr in sorted(beyond[_setting_key(cell)])
            for run in self._seeded(Choice(lr).apply(cell))
        ]

    def refinement(self, tuned: Tuned) -> list[RunSpec]:
        """The rest of each method's trials, around its best rate; a method whose every run failed has no such rate."""
        best = tuned.winners
        tried = defaultdict(set)
        for record in tuned.records:
            tried[cell_key(record.spec)].add(record.spec.lr)
        # Rates that `extension` added are not part of the budget: every method of the setting has tried them.
        left = (self.trials or len(self.rates)) - len(self.rates)
        return [
            run
            for cell in self.cells()
            if (key := cell_key(cell)) in best
            for choice in itertools.islice(self._around(cell, best[key], tried[key]), left)
            for run in self._seeded(choice.apply(cell))
        ]

    def _around(self, cell: RunSpec, best: Choice, tried: set[float]) -> Iterator[Choice]:
        """Trials near a choice: other values of the method's knobs in turn, nearest first, then rates in between."""
        for knob, value in _other_values(cell):
            yield Choice(best.lr, ((knob, value),))
        # Rounding may make a rate equal to another or to one already tried: a run twice would waste a trial.
        seen = set(tried)
        for exponent in _BETWEEN:
            lr = _rounded(best.lr * self.step**exponent)
            if lr not in seen:
                seen.add(lr)
                yield Choice(lr)

    def final(self, tuned: Tuned) -> list[RunSpec]:
        """The winner of each cell again, with fresh seeds; a cell whose every tuning run failed has none."""
        best = tuned.winners
        return [
            best[cell_key(cell)].apply(cell, seed=FRESH + seed, phase="final")
            for cell in self.cells()
            if cell_key(cell) in best
            for seed in range(self.seeds)
        ]

    def cost(self, tuned: Tuned) -> list[RunSpec]:
        """One cost run for each setting and method, at the last scale and the smallest rate: neither changes the cost.

        It has the winner's knobs, which may cost. A step costs the same at any rate; at a large one the timed steps,
        which go on beyond the training, may diverge.
        """
        # A method whose tuning failed has no winner, and is timed with its default knobs.
        best, lowest = tuned.winners, min(self.rates)
        chosen = [(cell, best.get(cell_key(cell), Choice(lowest))) for cell in self.timed()]
        return [
            Choice(lowest, choice.knobs).apply(cell, seed=FRESH, phase="final", kind="cost") for cell, choice in chosen
        ]

    def timed(self) -> list[RunSpec]:
        """The cells whose cost is measured: the last scale of each setting and method."""
        # Later cells replace earlier ones of the same key, and the scale is the innermost loop of `cells`.
        return list({(repr(cell.fields), label_of(cell)): cell for cell in self.cells()}.values())

    def cells(self) -> Iterator[RunSpec]:
        """Every setting × method × scale, as a tuning run without its rate and seed."""
        for setting, variant in itertools.product(self.settings, self.variants):
            own = dict(variant.options)
            # A scale that is written with the method is its only one.
            for scale in (own["scale"],) if "scale" in own else self.scales:
                yield RunSpec(
                    kind="quality",
                    phase="tuning",
                    problem=self.problem,
                    digest=self.digest,
                    fields=setting,
                    method=variant.method,
                    options={**own, "scale": scale},
                    lr=0.0,
                    seed=0,
                    device=self.device,
                    dtype=self.dtype,
                )

    def _seeded(self, spec: RunSpec) -> list[RunSpec]:
        return [replace(spec, seed=seed) for seed in range(self.tuning_seeds)]


def _other_values(cell: RunSpec) -> Iterator[tuple[str, Any]]:
    """Other values of a method's knobs, each valid alone: one of each knob in turn, nearest numbers first."""
    method = get(cell.method, **cell.options)
    columns = []
    for knob, values in method.tuning.items():
        now = getattr(method, knob)
        others = [v for v in values if knob not in cell.options and v != now and _valid(cell, knob, v)]
        # Numbers by their ratio to the current value, as knobs such as penalty weights span decades.
        if all(is_number(v) and v > 0 for v in (now, *others)):
            others = [v for _, v in sorted((abs(math.log(v / now)), v) for v in others)]
        columns.append([(knob, value) for value in others])
    for row in itertools.zip_longest(*columns):
        yield from filter(None, row)  # without the None that fills up shorter columns


def _valid(cell: RunSpec, knob: str, value: Any) -> bool:
    try:
        get(cell.method, **{**cell.options, knob: value})
    except OptionError:
        return False
    return True


def _rounded(rate: float) -> float:
    """Two significant digits: rates that people can write, equal on every machine."""
    return float(f"{rate:.2g}")


def _setting_key(spec: RunSpec) -> tuple[Any, ...]:
    """What the runs of one setting share: a cell's key without the method and its options, but with the scale."""
    return (tuple(sorted(spec.fields.items())), str(spec.options.get("scale")), spec.device, spec.dtype)
