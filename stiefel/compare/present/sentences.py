"""The verdict as a person would say it. Imports ``verdict`` and ``statistics``.

First what a constraint gains over none, then what is cheaper and no worse, what the network as it is has to do with it,
and what would change the answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from stiefel.compare.analyse.candidates import Candidate
from stiefel.compare.analyse.notes import few
from stiefel.compare.analyse.requirements import Answer
from stiefel.compare.analyse.requirements import answers as answers_of
from stiefel.compare.analyse.statistics.scores import ENOUGH, decimals
from stiefel.compare.analyse.verdict import Comparison, Verdict

STUDIES = "--studies 10"


def sentences(verdict: Verdict) -> list[str]:
    """The verdict on one problem, the first sentence its core; never empty."""
    if not verdict.candidates:
        return ["No method has a score, so there is nothing to choose from."]
    return [*_core(verdict), *_given(verdict), *_doubts(verdict)]


def grouped(verdict: Verdict) -> tuple[list[tuple[str, Answer, list[str]]], list[str]]:
    """What to use, each candidate once: the requirements that it meets best, the first answer, evidence of the others.

    And, in sentences, the requirements that nothing meets.
    """
    found: dict[str, list[Answer]] = {}
    missing = []
    for answer in answers_of(verdict):
        if answer.best is None:
            missing.append(f"{answer.requirement}: {answer.reason}")
        else:
            found.setdefault(answer.best.name, []).append(answer)
    groups = []
    for answers in found.values():
        words = ", ".join(answer.requirement for answer in answers)
        groups.append((words, answers[0], [answer.evidence for answer in answers if answer.evidence]))
    return groups, missing


def recommended(verdict: Verdict) -> Candidate | None:
    """What to take where nothing else is required: the best that beats no constraint, else no constraint itself."""
    if not verdict.candidates:
        return None
    control = verdict.control
    if control is None or not verdict.decides:
        return verdict.candidates[0]
    gains = [c for c in verdict.constrained if verdict.between(c, control).better]
    found = gains[0] if gains else control
    # The other control may be better than either.
    return next((c for c in verdict.controls if c is not found and verdict.between(c, found).better), found)


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


def _time(candidate: Candidate) -> str:
    """The time of a step beside that without a constraint."""
    ratio = candidate.step.value if candidate.step else math.nan
    return "about as long as without a constraint" if 0.95 < ratio < 1.05 else f"{ratio:.2g} times as long as without"


def where(verdict: Verdict) -> str:
    """What the verdict is about, as the beginning of a sentence."""
    count = len({setting.point for setting in verdict.summary.settings})
    place = "On this problem" if count == 1 else f"Over the {count} settings of this problem"
    return place if verdict.summary.studies else f"{place}, at the rates that one tuning chose,"


def _core(verdict: Verdict) -> Iterator[str]:
    control, best = verdict.control, verdict.candidates[0]
    if not verdict.decides:
        beside = "" if best.control or control is None else f"; without a constraint it is {control.score}"
        yield (
            f"n = {verdict.n} is too few to tell methods apart: a verdict needs {ENOUGH}, better 10 ({STUDIES}). The "
            f"best mean {verdict.summary.metric} is that of {_subject(best)}, {best.score}{beside}."
        )
    elif control is None:
        yield from _without_control(verdict)
    elif not verdict.constrained:
        yield f"Only {_names(verdict.controls)} has a score, and no constraint to compare it with."
    elif recommended(verdict) in verdict.constrained:
        yield from _gained(verdict, control)
    else:
        yield from _nothing_gained(verdict, control)


def _without_control(verdict: Verdict) -> Iterator[str]:
    best, *others = verdict.candidates
    rivals = verdict.rivals(best, others)
    same = f", from which {_names(rivals)} cannot be told" if rivals else ", told apart from all others"
    yield (
        f"{where(verdict)} {_subject(best)} has the best {verdict.summary.metric}, {best.score}, {design(verdict)}"
        f"{same if others else ''}; what a constraint gains is not known, because no network without one has a score "
        "(run unconstrained and default too)."
    )


def _gained(verdict: Verdict, control: Candidate) -> Iterator[str]:
    """Some constraint beats none."""
    best = recommended(verdict)
    assert best is not None
    gain = verdict.between(best, control)
    price = f"; a step takes {_time(best)}" if step_cost(best) else ""
    yield (
        f"{where(verdict)} `{best.name}` {_improves(verdict)} {verdict.summary.metric} by "
        f"{amount(gain, signed=False)} over no constraint, {design(verdict, gain)}{price}."
    )
    # A loud method cannot be told from anything: named are those that beat no constraint themselves.
    rivals = [c for c in verdict.rivals(best, verdict.constrained) if verdict.between(c, control).better]
    cheaper = _cheaper(best, rivals)
    if cheaper is not None:
        yield (
            f"`{cheaper.name}` cannot be told from it ({_missed(verdict.between(cheaper, best))}) and costs "
            f"{step_cost(cheaper)} instead of {step_cost(best)} a step."
        )
    elif rivals:
        yield f"{_names(rivals)} cannot be told from it ({_missed(verdict.between(rivals[0], best))})."


def _nothing_gained(verdict: Verdict, control: Candidate) -> Iterator[str]:
    """No constraint beats none."""
    best = verdict.constrained[0]
    against = [verdict.between(c, control) for c in verdict.constrained]
    loss = against[0]
    if loss.difference.apart is None:
        yield f"{where(verdict)} `{best.name}` is not compared with no constraint: n = {loss.difference.n} is too few."
    elif loss.difference.apart:
        every = all(c.difference.apart and not c.better for c in against)
        who = f"every constraint costs {verdict.summary.metric}" if every else "no constraint beat none"
        yield (
            f"{where(verdict)} {who}: the best, `{best.name}`, is {amount(loss, signed=False)} worse than without, "
            f"{design(verdict, loss)}."
        )
    else:
        yield (
            f"{where(verdict)} no constraint beat none: the best, `{best.name}`, differs by {amount(loss)}, "
            f"{design(verdict, loss)}; {_missed(loss)}."
        )
    choice = recommended(verdict)
    if choice is not None and choice is not control:
        yield f"`{choice.name}` is better still: by {amount(verdict.between(choice, control), signed=False)}."
    answer = next((a for a in answers_of(verdict) if a.requirement.startswith("exactly") and a.best), None)
    if answer is not None and answer.best is not None and not answer.best.control:
        yield _must(verdict, answer, control)


def _must(verdict: Verdict, answer: Answer, control: Candidate) -> str:
    best = answer.best
    assert best is not None
    cheapest = _cheaper(best, [c for c in answer.rivals if not c.control]) or best
    price = f", and a step takes {_time(cheapest)}" if step_cost(cheapest) else ""
    return (
        f"If the weights must be orthogonal, take `{cheapest.name}`: it differs from no constraint by "
        f"{amount(verdict.between(cheapest, control))}{price}."
    )


def _given(verdict: Verdict) -> Iterator[str]:
    """The network as its author made it, beside what is recommended."""
    choice = recommended(verdict)
    given = next((c for c in verdict.controls if not any(row.scaled for row in c.rows)), None)
    if given is None or choice is None or choice is given:
        return
    comparison = verdict.between(choice, given)
    if comparison.difference.apart is None:
        return
    subject = "An orthogonal start without a constraint" if choice.control else f"`{choice.name}`"
    if comparison.difference.apart:
        word = "better" if comparison.better else "worse"
        yield f"{subject} is {amount(comparison, signed=False)} {word} than the network as its author made it."
    else:
        yield (
            f"{subject} cannot be told from the network as its author made it: it differs by {amount(comparison)} "
            f"({_missed(comparison)})."
        )


def _doubts(verdict: Verdict) -> Iterator[str]:
    """What would change the answer."""
    bounds = [c for c in verdict.candidates if c.bound]
    if bounds:
        yield (
            f"Another rate may be better for {_names(bounds)}: the best lies on the edge of those tried, and the score "
            "is marked as a bound."
        )
    failed = [c for c in verdict.candidates if c.failures]
    if failed:
        counts = few((f"{c.failures} of {c.runs} of `{c.name}`" for c in failed), 4)
        yield f"Runs failed, and are in no mean: {counts}."
    if verdict.left_out:
        reasons = few((f"`{label}`: {reason}" for label, reason in verdict.left_out.items()), 4)
        yield f"Without a score, and not compared: {reasons}."
    control = verdict.control
    if control is not None and any(verdict.between(c, control).difference.apart is False for c in verdict.constrained):
        yield "Four times as many replicates would find differences half as large."
    if verdict.decides and not verdict.summary.studies:
        yield f"Another tuning may choose other rates: {STUDIES} tunes anew for each replicate."
    choice = recommended(verdict)
    if choice is not None and choice.step is None and any(row.cost for row in choice.rows):
        yield "What a step costs is not credible, because the machine was busy: measure again on a quiet one."


def _cheaper(best: Candidate, rivals: list[Candidate]) -> Candidate | None:
    """The cheapest rival whose step costs clearly less."""
    if best.step is None:
        return None
    known = [c for c in rivals if c.step is not None and c.step.value < 0.95 * best.step.value]
    return min(known, key=lambda c: c.step.value if c.step else math.inf, default=None)


def _missed(comparison: Comparison) -> str:
    limit = found(comparison)
    return f"a difference above {limit} would have been found about 4 times in 5" if limit else "n is too small"


def _subject(candidate: Candidate) -> str:
    return "no constraint" if candidate.control else f"`{candidate.name}`"


def _names(found: list[Candidate] | tuple[Candidate, ...], most: int = 4) -> str:
    names = [f"`{c.name}`" for c in found[:most]]
    if len(found) > most:
        return ", ".join(names) + f" and {len(found) - most} more"
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _improves(verdict: Verdict) -> str:
    return "raises" if verdict.summary.higher_is_better else "lowers"


def _unit(candidate: Candidate) -> tuple[float, str]:
    """Fractions are told in points, which are hundredths; other metrics in their own unit."""
    fraction = candidate.metric.resolution > 0 or candidate.metric.name == "accuracy"
    return (100.0, " points") if fraction else (1.0, "")


def _minus(value: float, form: str) -> str:
    shown = f"{value:z{form}}"  # z: what rounds to zero has no sign
    return shown.replace("-", "−")
