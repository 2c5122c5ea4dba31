"""Which runs a comparison consists of: studies, each a tuning and a fresh run at what it chose, and a cost pass.

A replicate is a study: two runs at one tuned rate share the luck of that tuning, which no interval over them shows. Ten
equal methods that are tuned once and run again with ten fresh seeds each are told apart by a perfect test in 29 to 48 %
of comparisons; with a tuning for each replicate in 4 %. The cheaper way, one tuning and ``seeds`` fresh runs, therefore
says less: what holds at the rates chosen.

Imports ``record``, ``trials`` and ``variants``.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from stiefel.compare.plan import trials
from stiefel.compare.plan.variants import Variant, label_of
from stiefel.compare.record.choice import Choice, Tuned, cell_key
from stiefel.compare.record.records import Record
from stiefel.compare.record.spec import RunSpec, fixed
from stiefel.errors import OptionError, ProblemError

FRESH = 1000  # first seed of reported runs, far from any tuning seed


RACED, RACE_SEEDS = 3, 4  # choices of a single tuning that are run again before one is chosen, and on how many seeds


@dataclass(frozen=True)
class Plan:
    """The axes of a comparison.

    Args:
        problem, digest: the problem's name, and the digest of its source.
        settings: one dictionary of the problem's factors per setting.
        variants: methods with options.
        scales: values of the option ``scale``.
        rates: the learning-rate grid, the same for every method.
        seeds: how many fresh seeds each winner of a single tuning is run with; used where there are no studies.
        studies: how many times each method is tuned and then run at what that tuning chose; 0: one tuning for all.
        tuning_seeds: how many seeds each trial is made with.
        trials: tuning budget of each method in each setting and study: the grid, then rates beyond its edge where the
            best lies there, and rates in between until the best is known to a factor of 2; what is left goes to the
            method's own knobs, one at a time at its best rate. None is the grid alone.
        device, dtype: of every run.
        higher_is_better: of the problem's metric.
    """

    problem: str
    digest: str
    settings: tuple[dict[str, Any], ...]
    variants: tuple[Variant, ...]
    scales: tuple[Any, ...]
    rates: tuple[float, ...]
    seeds: int = 0
    studies: int = 0
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

    def tuning(self) -> list[RunSpec]:
        """Every setting × scale × method × learning rate × tuning seed."""
        return [run for cell in self.cells() for lr in self.rates for run in self._seeded(Choice(lr).apply(cell))]

    def tuned(self, records: Iterable[Record] = ()) -> Tuned:
        """Tuning runs of this plan that have ended, with their winners."""
        return Tuned(tuple(records), self.higher_is_better)

    def following(self, tuned: Tuned, *, extend: bool = False) -> tuple[str, list[RunSpec]] | None:
        """What tuning does next, by name: to extend the grid, to refine it, to race the best; None when it has ended.

        Args:
            tuned: what has been tried.
            extend: whether grids on whose edge a winner lies are continued beyond the budget.
        """
        tried = {record.spec.hash for record in tuned.records}
        # Once choices have been raced nothing else is tried: on one seed it could not win against them.
        raced = not self.studies and any(record.spec.seed >= self.tuning_seeds for record in tuned.records)
        stages: dict[str, Callable[[], list[RunSpec]]] = {
            "extend": lambda: self.extension(tuned) if extend and not raced else [],
            "refine": lambda: self.refinement(tuned, free_edges=extend) if not raced else [],
            "race": lambda: [run for run in self.race(tuned) if run.hash not in tried],
        }
        return next(((name, runs) for name, stage in stages.items() if (runs := stage())), None)

    def extension(self, tuned: Tuned) -> list[RunSpec]:
        """One more rate beyond each edge of a point's grid on which a winner lies; none beyond three decades.

        It is tried with every method at every scale of the point, so that their budgets stay equal.
        """
        # The driver repeats this until no winner lies on an edge.
        best = tuned.winners
        tried: dict[tuple[Any, ...], set[float]] = defaultdict(set)
        for record in tuned.records:
            tried[_setting_key(record.spec)].add(record.spec.lr)
        beyond: dict[tuple[Any, ...], set[float]] = defaultdict(set)
        for cell in self.cells():
            key = _setting_key(cell)
            if choice := best.get(cell_key(cell)):
                beyond[key].update(trials.beyond(choice.lr, sorted(tried[key]), self.rates))
        return [
            run
            for cell in self.cells()
            for lr in sorted(beyond[_setting_key(cell)])
            for run in self._seeded(Choice(lr).apply(cell))
        ]

    def refinement(self, tuned: Tuned, *, free_edges: bool = False) -> list[RunSpec]:
        """The next trials of each method, around its best rate; to be asked again until there are none.

        A method whose every run failed has no best rate, and no trials.

        Args:
            tuned: what has been tried.
            free_edges: whether rates beyond the ends of the grid, as :meth:`extension` adds them, are free.
        """
        best = tuned.winners
        tried: dict[tuple[Any, ...], set[Choice]] = defaultdict(set)
        for record in tuned.records:
            tried[cell_key(record.spec)].add(Choice.of(record.spec))
        free = trials.continued(self.rates) if free_edges else frozenset()
        runs = []
        for cell in self.cells():
            key = cell_key(cell)
            if key not in best:
                continue
            counted = [choice for choice in tried[key] if choice.knobs or choice.lr not in free]
            left = max(0, (self.trials or len(self.rates)) - len(counted))
            for choice in itertools.islice(trials.following(cell, best[key], tried[key], self.rates), left):
                runs += self._seeded(choice.apply(cell))
        return runs

    def race(self, tuned: Tuned) -> list[RunSpec]:
        """The three best choices of a single tuning again on four more seeds, before one of them is chosen.

        With studies there is none: the luck of each tuning is then part of what is reported. Nor is there one where
        a method has a single choice.
        """
        cells = [] if self.studies else list(self.cells())
        return [
            replace(choice.apply(cell), seed=self.tuning_seeds + seed)
            for cell in cells
            if len(choices := tuned.ranked.get(cell_key(cell), [])) > 1
            for choice in choices[:RACED]
            for seed in range(RACE_SEEDS)
        ]

    def final(self, tuned: Tuned) -> list[RunSpec]:
        """The winner of each cell again, with fresh seeds; a cell whose every tuning run failed has none."""
        best = tuned.winners
        return [
            best[cell_key(cell)].apply(cell, seed=FRESH + seed, phase="final")
            for cell in self.cells()
            if cell_key(cell) in best
            for seed in ([cell.study] if cell.study is not None else range(self.seeds))
        ]

    def cost(self, tuned: Tuned) -> list[RunSpec]:
        """One cost run for each setting and method, at the last scale and the smallest rate: neither changes the cost.

        It has the winner's knobs, which may cost; of several studies those that most of them chose. A step costs the
        same at any rate; at a large one the timed steps, which go on beyond the training, may diverge.
        """
        chosen: dict[str, list[tuple[Any, ...]]] = defaultdict(list)
        for cell in self.cells():
            if choice := tuned.winners.get(cell_key(cell)):
                chosen[_without_study(cell).hash].append(choice.knobs)
        lowest = min(self.rates)
        return [
            Choice(lowest, _most_common(chosen[cell.hash])).apply(cell, seed=FRESH, phase="final", kind="cost")
            for cell in self.timed()
        ]

    def timed(self) -> list[RunSpec]:
        """The cells whose cost is measured: the last scale of each setting and method."""
        cells = map(_without_study, self.cells())
        return list({(repr(cell.fields), label_of(cell)): cell for cell in cells}.values())

    def cells(self) -> Iterator[RunSpec]:
        """Every setting × method × scale × study, as a tuning run without its rate and seed."""
        studies = range(self.studies) if self.studies else [None]
        for setting, variant in itertools.product(self.settings, self.variants):
            for options, study in itertools.product(variant.at(self.scales), studies):
                yield RunSpec(
                    kind="quality",
                    phase="tuning",
                    problem=self.problem,
                    digest=self.digest,
                    fields=setting,
                    method=variant.method,
                    options=options,
                    lr=0.0,
                    seed=0,
                    device=self.device,
                    dtype=self.dtype,
                    study=study,
                )

    def _seeded(self, spec: RunSpec) -> list[RunSpec]:
        """A trial on its seeds, which no other study uses."""
        first = (spec.study or 0) * self.tuning_seeds
        return [replace(spec, seed=first + seed) for seed in range(self.tuning_seeds)]


def _without_study(cell: RunSpec) -> RunSpec:
    return replace(cell, study=None)


def _most_common(found: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    return Counter(found).most_common(1)[0][0] if found else ()


def _setting_key(spec: RunSpec) -> tuple[Any, ...]:
    """What the runs of one point and study share, whatever their method, options and scale."""
    return (tuple(sorted(fixed(spec.fields).items())), spec.device, spec.dtype, spec.study)
