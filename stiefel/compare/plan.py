"""Which runs a comparison consists of: a tuning grid, its winners with fresh seeds, a cost pass.

Imports ``spec``, ``records`` and ``methods``.
"""

from __future__ import annotations

import ast
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from stiefel.compare.records import ENDED, Record
from stiefel.compare.spec import RunSpec
from stiefel.errors import OptionError, ProblemError
from stiefel.methods import available, get, method_class

FRESH = 1000  # first seed of reported runs, far from any tuning seed


@dataclass(frozen=True)
class Variant:
    """A method with options, as a comparison's axis has it."""

    method: str
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Read ``name`` or ``name:option=value,option=value``; a scale given here is this variant's only one.

        Raises:
            UnknownMethodError, OptionError: as :func:`stiefel.get` raises them, or where an option has no value.
        """
        name, _, rest = text.partition(":")
        options: dict[str, Any] = dict(method_class(name).comparison)
        for part in filter(None, rest.split(",")):
            key, equals, value = part.partition("=")
            if not equals:
                raise OptionError(f"{text!r}: expected name:option=value,option=value")
            options[key] = literal(value)
        method = get(name, **options)
        usual = {f.name: f.default for f in fields(method)}
        return cls(name, tuple(sorted((k, v) for k, v in options.items() if k == "scale" or v != usual[k])))


def literal(text: str) -> Any:
    """A Python literal, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


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
        tuning_seeds: how many seeds each learning rate is tried with.
        device, dtype: of every run.
    """

    problem: str
    digest: str
    settings: tuple[dict[str, Any], ...]
    variants: tuple[Variant, ...]
    scales: tuple[Any, ...]
    rates: tuple[float, ...]
    seeds: int
    tuning_seeds: int = 1
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for axis in ("settings", "variants", "scales", "rates"):
            if not getattr(self, axis):
                raise ProblemError(f"the comparison has no {axis}: the grid is empty")

    def tuning(self) -> list[RunSpec]:
        """Every setting × scale × method × learning rate × tuning seed."""
        return [
            replace(cell, lr=lr, seed=seed)
            for cell in self.cells()
            for lr in self.rates
            for seed in range(self.tuning_seeds)
        ]

    def final(self, tuned: Iterable[Record], higher_is_better: bool) -> list[RunSpec]:
        """The winner of each cell again, with fresh seeds; a cell whose every tuning run failed has none."""
        best = winners(tuned, higher_is_better)
        return [
            replace(cell, lr=best[cell_key(cell)], seed=FRESH + seed, phase="final")
            for cell in self.cells()
            if cell_key(cell) in best
            for seed in range(self.seeds)
        ]

    def cost(self) -> list[RunSpec]:
        """One cost run for each setting and method: at the last scale, which costs nothing, and at the smallest rate.

        A step costs the same at any rate; at a large one the timed steps, which go on beyond the training, may diverge.
        """
        return [replace(cell, lr=min(self.rates), seed=FRESH, phase="final", kind="cost") for cell in self.timed()]

    def timed(self) -> list[RunSpec]:
        """The cells whose cost is measured: the last scale of each setting and method."""
        return list({(repr(cell.fields), cell.label): cell for cell in self.cells()}.values())

    def cells(self) -> Iterator[RunSpec]:
        """Every setting × method × scale, as a tuning run without its rate and seed."""
        for setting, variant in itertools.product(self.settings, self.variants):
            own = dict(variant.options)
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


def cell_key(spec: RunSpec) -> tuple[Any, ...]:
    """What the runs of one method in one setting share: all but rate, seed, phase and kind."""
    return (
        spec.problem,
        spec.digest,
        tuple(sorted(spec.fields.items())),
        spec.method,
        tuple(sorted((k, str(v)) for k, v in spec.options.items())),
        spec.device,
        spec.dtype,
    )


def winners(tuned: Iterable[Record], higher_is_better: bool) -> dict[tuple[Any, ...], float]:
    """The learning rate of each cell whose best validation metric, averaged over tuning seeds, is best.

    A rate at which a run failed (diverged, timed out, crashed) wins only where every rate had failures; one at which
    every run failed never wins.
    """
    scores: dict[tuple[Any, ...], dict[float, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in tuned:
        if record.spec.kind == "quality" and record.spec.phase == "tuning":
            scores[cell_key(record.spec)][record.spec.lr].append(record)
    best = {}
    for key, rates in scores.items():
        ranked = []
        for lr, records in rates.items():
            good = [r for r in records if r.status in ENDED]
            if good:
                mean = sum(r.summary["best_validation"] for r in good) / len(good)
                ranked.append((len(good) / len(records), mean if higher_is_better else -mean, -lr))
        if ranked:
            best[key] = -max(ranked)[2]
    return best


def on_edge(lr: float, rates: Sequence[float]) -> bool:
    """Whether a winning rate is the smallest or largest of its grid, so that a better one may lie outside."""
    return len(rates) > 1 and lr in (min(rates), max(rates))


def parse_variants(texts: Sequence[str]) -> tuple[Variant, ...]:
    """Variants from the command line; ``all`` is the whole catalogue."""
    names = [name for text in texts for name in (available() if text == "all" else [text])]
    return tuple(dict.fromkeys(Variant.parse(name) for name in names))
