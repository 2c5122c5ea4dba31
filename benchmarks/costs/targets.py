"""The targets of the library on two CPU cores in float32, and their measured values. Imports ``sections``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from costs.nets import RECOMMENDED
from costs.sections import SHAPES, Record


@dataclass(frozen=True)
class Target:
    """A bound on one measured number.

    Args:
        what: the number, in words.
        value: the number, of all results; None where it was not measured.
        bound: at least this, or at most this where ``lower`` is better.
        goal: what would be better still.
        lower: whether less is better.
        unit: written after the number.
    """

    what: str
    value: Callable[[Results], float | None]
    bound: float
    goal: float | None = None
    lower: bool = False
    unit: str = "×"

    def met(self, value: float, bound: float) -> bool:
        """Whether a number is within a bound."""
        return value <= bound if self.lower else value >= bound


class Results:
    """Finds records by section, case, condition number and candidate.

    Args:
        records: of one run.
        statistic: of a candidate's rounds: ``"median"``, or ``"least"``, which other programs on the machine move less.
    """

    def __init__(self, records: Iterable[Record], statistic: str = "median") -> None:
        self.statistic = statistic
        self._found = {(r["section"], r["case"], r.get("condition"), r["candidate"]): r for r in records}

    def get(self, section: str, case: str, candidate: str, key: str, condition: float | None = None) -> Any:
        """One field of one record; None where there is none."""
        return self._found.get((section, case, condition, candidate), {}).get(key)

    def seconds(self, section: str, case: str, candidate: str, condition: float | None = None) -> float | None:
        """What a call of a candidate takes; None where it was not timed."""
        found: float | None = self.get(section, case, candidate, f"seconds_{self.statistic}", condition)
        return found

    def ratio(self, section: str, case: str, over: str, under: str, condition: float | None = None) -> float | None:
        """How many times as long one candidate takes as another in one run."""
        a, b = (self.seconds(section, case, name, condition) for name in (over, under))
        return a / b if a and b else None


def faster(section: str, case: str, ours: str, than: str, least: float, goal: float | None = None) -> Target:
    """Ours is so many times faster than another's."""
    return Target(f"{section}, {case}: speed of {ours} over {than}", _ratio(section, case, than, ours), least, goal)


def within(section: str, case: str, ours: str, of: str, most: float, goal: float | None = None) -> Target:
    """Ours takes at most so many times as long as another."""
    what = f"{section}, {case}: time of {ours} over that of {of}"
    return Target(what, _ratio(section, case, ours, of), most, goal, lower=True)


def _ratio(section: str, case: str, over: str, under: str) -> Callable[[Results], float | None]:
    condition = 2.0 if section == "maps" else None
    return lambda results: results.ratio(section, case, over, under, condition)


def targets() -> Iterator[Target]:
    """All targets, section by section."""
    # Bound and goal of each shape.
    for shape, (least, goal) in zip(
        SHAPES, ((1.3, 3), (1.3, 3), (1.3, 3), (3, 6), (1.3, 3), (3, 10), (2, 6)), strict=True
    ):
        yield faster("maps", _case(shape), "own", "SVD loop", least, goal)
    for shape in SHAPES:
        yield within("maps", _case(shape), "own", "floor: 5 products, eigh", 2)
    yield faster("maps", "16×64×576", "own", "torch matrix_exp", 200)
    for condition in (2.0, 100.0):
        yield Target(
            f"maps, all shapes, condition number {condition:g}: largest ‖XXᵀ−I‖_F/√p of own",
            lambda results, condition=condition: _worst(results, condition),  # type: ignore[misc]
            2e-6,
            lower=True,
            unit="",
        )
    for shape in SHAPES:
        yield faster("steps", _case(shape), "riemannian", "geoopt Stiefel", 2)
    yield faster("steps", "16×64×576", "riemannian canonical Cayley", "geoopt CanonicalStiefel", 10)
    for ours in ("pogo", "landing"):
        for shape in SHAPES:
            yield faster("steps", _case(shape), f"{ours}, stacked", "pogo-torch, stacked", 1)
        for shape in ((64, 16, 144), (1000, 32, 64)):
            yield faster("steps", _case(shape), ours, "pogo-torch", 3)
    for width, name, most, wanted in (
        # Width, method, bound and goal.
        (128, "own", 2.0, 1.4),
        (128, "riemannian", 1.6, 1.25),
        (128, "soft", 1.2, 1.1),
        (512, "own", 4.0, 2.5),
        (512, "riemannian", 2.2, 1.8),
        (512, "soft", 1.6, 1.45),
    ):
        yield within("training", f"MLP 784-{width}×7-10, batch 1024", name, "unconstrained", most, wanted)
    for name in RECOMMENDED:
        yield within("training", "VGG-style, batch 128", name, "unconstrained", 1.15)
    for batch in (128, 1024):
        yield within("rest", f"layer 512×512, batch {batch}", "own", "plain", 1.02)
    yield Target(
        "rest: an access of own's weight",
        lambda results: _times(results.seconds("rest", "access of a weight", "own"), 1e6),
        6,
        lower=True,
        unit=" µs",
    )


def _case(shape: tuple[int, int, int]) -> str:
    return "×".join(map(str, shape))


def _worst(results: Results, condition: float) -> float | None:
    errors = [results.get("maps", _case(shape), "own", "error", condition) for shape in SHAPES]
    return max((e for e in errors if e is not None), default=None)


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
