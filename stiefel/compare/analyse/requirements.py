"""Which method to take under which requirement. Imports ``verdict``, ``candidates`` and ``statistics``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from stiefel.compare.analyse.candidates import SLACK, Candidate, tolerated
from stiefel.compare.analyse.rows import TOLERANCES, powers
from stiefel.compare.analyse.statistics.differences import Sample, family
from stiefel.compare.analyse.verdict import Verdict


@dataclass(frozen=True)
class Answer:
    """The candidate to take under a requirement.

    Args:
        requirement: in words.
        best: the candidate; None where nothing meets it.
        rivals: others that cannot be told from it in what was compared, nearest first.
        evidence: the best's value of what was compared, where that is not the score.
        reason: why there is no candidate, and what came nearest.
        relation: what the rivals are to the best.
    """

    requirement: str
    best: Candidate | None
    rivals: tuple[Candidate, ...] = ()
    evidence: str = ""
    reason: str = ""
    relation: str = "cannot be told from it"


def answers(verdict: Verdict) -> list[Answer]:
    """The candidate under each requirement, those that nothing meets included."""
    found = [_best(verdict), *_feasible(verdict), _cheapest(verdict), _tolerant(verdict)]
    if any(setting.target is not None for setting in verdict.summary.settings):
        found.append(_fastest(verdict))
    return found


def _best(verdict: Verdict) -> Answer:
    if not verdict.candidates:
        return Answer("best metric", None, reason="no method has a score")
    best, *others = verdict.candidates
    return Answer("best metric", best, verdict.rivals(best, others))


def _feasible(verdict: Verdict) -> Iterable[Answer]:
    for words, tolerance in zip(("exactly feasible", "feasible"), TOLERANCES, strict=True):
        requirement = f"{words} (error ≤ {powers(tolerance)})"
        within = [c for c in verdict.candidates if c.error <= tolerance]
        if within:
            yield Answer(requirement, within[0], verdict.rivals(within[0], within))
        else:
            nearest = min(verdict.candidates, key=lambda c: c.error, default=None)
            came = f"; {nearest.name} comes nearest, with {nearest.error:.0e}" if nearest else ""
            yield Answer(requirement, None, reason=f"no method keeps the error there in every run{came}")


def _cheapest(verdict: Verdict) -> Answer:
    requirement = "cheapest step among the best"
    known = [c for c in _as_good(verdict) if c.step is not None]
    if not known:
        doubted = any(row.cost and not row.cost.credible for c in verdict.candidates for row in c.rows)
        reason = "no cost is credible: the machine was busy" if doubted else "no cost was measured"
        return Answer(requirement, None, reason=reason)

    def evidence(c: Candidate) -> str:
        if len(known) == 1:
            return "no other that cannot be told from it has a known cost"
        return f"{c.step.value:.2g}× the time of a step without a constraint" if c.step else ""

    return _least(requirement, known, lambda c: c.step.value if c.step else math.inf, _steps_overlap, evidence)


def _as_good(verdict: Verdict) -> list[Candidate]:
    """The best, and what cannot be told from it; where it beats every control, only what does so too.

    A loud method cannot be told from anything: that alone is no reason to take it.
    """
    if not verdict.candidates:
        return []
    best, *others = verdict.candidates
    same = [best, *verdict.rivals(best, others)]
    beats = [
        c for c in same if all(verdict.between(c, control).better for control in verdict.controls if control is not c)
    ]
    return beats if best in beats else same


def _tolerant(verdict: Verdict) -> Answer:
    requirement = "most tolerant of the learning rate"
    widths = {id(c): tolerated(c, verdict.summary) for c in verdict.candidates if all(row.rates for row in c.rows)}
    known = [c for c in verdict.candidates if widths.get(id(c), -1.0) > 0]
    if verdict.n < 2:
        return Answer(requirement, None, reason="the spread of a run is not known from one")
    if not known:
        return Answer(requirement, None, reason="no method is near the best at two neighbouring rates of those tried")

    def evidence(c: Candidate) -> str:
        width = widths[id(c)]
        return f"near the best (within {SLACK:g} sd of a run) over a factor {10**width:.2g} of rates"

    found = _least(requirement, known, lambda c: -widths[id(c)], lambda a, b: widths[id(a)] == widths[id(b)], evidence)
    return replace(found, relation="as tolerant")


def _fastest(verdict: Verdict) -> Answer:
    requirement = "fewest seconds to the target"
    known = [c for c in verdict.candidates if c.reached and c.seconds_to_target and c.seconds_to_target.finite]
    if not known:
        reason = _short(verdict)
        return Answer(requirement, None, reason=reason)

    def evidence(c: Candidate) -> str:
        return f"{c.seconds_to_target.format('.2g', 'not reached')} s to the target" if c.seconds_to_target else ""

    times = [c for c in known if all(0 < t < math.inf for t in c.seconds.values())]
    pairs = list(itertools.combinations(times, 2))
    logs = {id(c): Sample(tuple(map(math.log, c.seconds.values())), higher_is_better=False) for c in times}
    tested = family([(logs[id(a)], logs[id(b)]) for a, b in pairs])
    apart = {frozenset((id(a), id(b))) for (a, b), d in zip(pairs, tested, strict=True) if d.apart}

    def same(a: Candidate, b: Candidate) -> bool:
        return frozenset((id(a), id(b))) not in apart

    def key(c: Candidate) -> float:
        return c.seconds_to_target.value if c.seconds_to_target else math.inf

    return _least(requirement, known, key, same, evidence)


def _short(verdict: Verdict) -> str:
    """Why no method counts as reaching the target."""
    if any(row.at_start for c in verdict.candidates for row in c.rows):
        return "the target was met before the first step, so that the time to it says nothing"
    near = [(row.nearest, c) for c in verdict.candidates for row in c.rows if row.nearest is not None]
    if not near:
        return "no method has a score"
    value, nearest = max(near, key=lambda entry: entry[1].metric.better(entry[0]))
    targets = " or ".join(
        f"{t:g}" for t in sorted({s.target for s in verdict.summary.settings if s.target is not None})
    )
    return f"no method's median run reaches {targets}; {nearest.name}'s comes nearest, with {value:.3g}"


def _least(
    requirement: str,
    found: list[Candidate],
    value: Callable[[Candidate], float],
    same: Callable[[Candidate, Candidate], bool],
    evidence: Callable[[Candidate], str],
) -> Answer:
    # Ties: fewer failures, then the cheaper step, then the name, so that the order is reproducible.
    ranked = sorted(found, key=lambda c: (value(c), c.failures, c.step.value if c.step else math.inf, c.name))
    best, *others = ranked
    return Answer(requirement, best, tuple(other for other in others if same(best, other)), evidence(best))


def _steps_overlap(best: Candidate, other: Candidate) -> bool:
    """Whether the quartiles of two step times overlap."""
    return best.step is None or other.step is None or not _apart(best.step, other.step)


def _apart(a: Any, b: Any) -> bool:
    """Whether two intervals have no point in common."""
    return a.high < b.low or b.high < a.low
