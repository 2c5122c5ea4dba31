"""The parts of which sentences about a verdict are made: differences, designs, costs. Imports ``verdict``."""

from __future__ import annotations

import math

from stiefel.compare.analyse.candidates import Candidate
from stiefel.compare.analyse.statistics.scores import decimals
from stiefel.compare.analyse.verdict import Comparison, Verdict


def amount(comparison: Comparison, *, signed: bool = True, plus: bool = False) -> str:
    """A difference with its interval: ``1.2 points [0.6, 1.8]``, or ``a factor of 1.3 [1.1, 1.6]``.

    Args:
        comparison: what is told.
        signed: whether a negative difference, or a ratio below 1, stays so; else it is turned round.
        plus: whether a positive difference has a sign.
    """
    d = comparison.difference
    if not signed and d.value < (1.0 if comparison.is_ratio else 0.0):
        d = d.turned
    if comparison.is_ratio:
        return f"a factor of {d.value:.3g}" + (f" [{d.low:.3g}, {d.high:.3g}]" if math.isfinite(d.low) else "")
    factor, unit = _unit(comparison.first)
    value, low, high = (factor * end for end in (d.value, d.low, d.high))
    form = decimals(value, (high - low) / 2 if math.isfinite(low) else abs(value) / 10)
    shown = f"{'+' if plus and value > 0 else ''}{_minus(value, form)}{unit}"
    return shown + (f" [{_minus(low, form)}, {_minus(high, form)}]" if math.isfinite(low) else "")


def moved(comparison: Comparison) -> str:
    """A difference with its direction: ``1.2 points [0.6, 1.8] higher``."""
    neutral = 1.0 if comparison.is_ratio else 0.0
    return f"{amount(comparison, signed=False)} {'lower' if comparison.difference.value < neutral else 'higher'}"


def found(comparison: Comparison) -> str:
    """The smallest difference that would have been found about 4 times in 5; empty where n is too small."""
    smallest = comparison.difference.detectable
    if not math.isfinite(smallest):
        return ""
    if comparison.is_ratio:
        return f"a factor of {smallest:.2g}"
    factor, unit = _unit(comparison.first)
    return f"{factor * smallest:.2g}{unit}"


def design(verdict: Verdict, comparison: Comparison | None = None) -> str:
    """How many replicates, and of what kind: ``n = 10 studies``."""
    n = verdict.n if comparison is None else comparison.difference.n
    return f"n = {n} {'studies' if verdict.summary.studies else 'runs'}"


def step_cost(candidate: Candidate) -> str:
    """What a step costs: ``1.9×``; empty where no credible cost is known."""
    return f"{candidate.step.value:.2g}×" if candidate.step is not None else ""


def step_time(candidate: Candidate) -> str:
    """The time of a step beside that without a constraint."""
    ratio = candidate.step.value if candidate.step else math.nan
    return "about as long as without a constraint" if 0.95 < ratio < 1.05 else f"{ratio:.2g} times as long as without"


def where(verdict: Verdict) -> str:
    """What the verdict is about, as the beginning of a sentence."""
    count = len({setting.point for setting in verdict.summary.settings})
    place = "On this problem" if count == 1 else f"Over the {count} settings of this problem"
    return place if verdict.summary.studies else f"{place}, at the rates that one tuning chose,"


def missed(comparison: Comparison) -> str:
    """What the design would have found, of a comparison that tells nothing apart."""
    limit = found(comparison)
    return f"a difference above {limit} would have been found about 4 times in 5" if limit else "n is too small"


def subject(candidate: Candidate) -> str:
    """A candidate as the subject of a sentence."""
    return "no constraint" if candidate.control else f"`{candidate.name}`"


def names_of(found: list[Candidate] | tuple[Candidate, ...], most: int = 4) -> str:
    """Names in a row, not more than can be read."""
    names = [f"`{c.name}`" for c in found[:most]]
    if len(found) > most:
        return ", ".join(names) + f" and {len(found) - most} more"
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def improves(verdict: Verdict) -> str:
    """What a better method does to the metric."""
    return "raises" if verdict.summary.higher_is_better else "lowers"


def _unit(candidate: Candidate) -> tuple[float, str]:
    """Fractions are told in points, which are hundredths; other metrics in their own unit."""
    fraction = candidate.metric.resolution > 0 or candidate.metric.name == "accuracy"
    return (100.0, " points") if fraction else (1.0, "")


def _minus(value: float, form: str) -> str:
    shown = f"{value:z{form}}"  # z: what rounds to zero has no sign
    return shown.replace("-", "−")
