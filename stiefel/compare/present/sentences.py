"""The verdict as a person would say it. Imports ``verdict`` and ``phrases``.

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
from stiefel.compare.analyse.statistics.scores import ENOUGH
from stiefel.compare.analyse.verdict import Verdict
from stiefel.compare.present.phrases import (
    amount,
    design,
    improves,
    missed,
    moved,
    names_of,
    step_cost,
    step_time,
    subject,
    where,
)

STUDIES = "--studies 10"


def sentences(verdict: Verdict) -> list[str]:
    """The verdict on one problem, the first sentence its core; never empty."""
    if not verdict.candidates:
        return ["No method has a score, so there is nothing to choose from."]
    return [*_core(verdict), *_given(verdict), *_doubts(verdict)]


def grouped(verdict: Verdict) -> tuple[list[tuple[list[str], Answer, list[str]]], list[str]]:
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
    groups = [
        ([a.requirement for a in answers], answers[0], [a.evidence for a in answers if a.evidence])
        for answers in found.values()
    ]
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


def _core(verdict: Verdict) -> Iterator[str]:
    control, best = verdict.control, verdict.candidates[0]
    if not verdict.decides:
        beside = "" if best.control or control is None else f"; without a constraint it is {control.score}"
        yield (
            f"n = {verdict.n} is too few to tell methods apart: a verdict needs {ENOUGH}, better 10 (`{STUDIES}`). The "
            f"best mean {verdict.summary.metric} is that of {subject(best)}, {best.score}{beside}."
        )
    elif control is None:
        yield from _without_control(verdict)
    elif not verdict.constrained:
        yield f"Only {names_of(verdict.controls)} has a score, and no constraint to compare it with."
    elif recommended(verdict) in verdict.constrained:
        yield from _gained(verdict, control)
    else:
        yield from _nothing_gained(verdict, control)


def _without_control(verdict: Verdict) -> Iterator[str]:
    best, *others = verdict.candidates
    rivals = verdict.rivals(best, others)
    same = f", from which {names_of(rivals)} cannot be told" if rivals else ", told apart from all others"
    yield (
        f"{where(verdict)} {subject(best)} has the best {verdict.summary.metric}, {best.score}, {design(verdict)}"
        f"{same if others else ''}; what a constraint gains is not known, because no network without one has a score "
        "(run `--methods … unconstrained default` too)."
    )


def _gained(verdict: Verdict, control: Candidate) -> Iterator[str]:
    """Some constraint beats none."""
    best = recommended(verdict)
    assert best is not None
    gain = verdict.between(best, control)
    price = f"; a step takes {step_time(best)}" if step_cost(best) else ""
    yield (
        f"{where(verdict)} `{best.name}` {improves(verdict)} {verdict.summary.metric} by "
        f"{amount(gain, signed=False)} over no constraint, {design(verdict, gain)}{price}."
    )
    # A loud method cannot be told from anything: named are those that beat no constraint themselves.
    rivals = [c for c in verdict.rivals(best, verdict.constrained) if verdict.between(c, control).better]
    cheaper = _cheaper(best, rivals)
    if cheaper is not None:
        yield (
            f"`{cheaper.name}` cannot be told from it ({missed(verdict.between(cheaper, best))}) and costs "
            f"{step_cost(cheaper)} instead of {step_cost(best)} a step."
        )
    elif rivals:
        yield f"{names_of(rivals)} cannot be told from it ({missed(verdict.between(rivals[0], best))})."


def _nothing_gained(verdict: Verdict, control: Candidate) -> Iterator[str]:
    """No constraint beats none."""
    best = verdict.constrained[0]
    against = [verdict.between(c, control) for c in verdict.constrained]
    loss = against[0]
    count = len(verdict.constrained)
    none = f"none of the {count} constraints beat" if count > 1 else f"`{best.name}` did not beat"
    which = f"the best, `{best.name}`," if count > 1 else "it"
    if loss.difference.apart is None:
        yield f"{where(verdict)} `{best.name}` is not compared with no constraint: n = {loss.difference.n} is too few."
    elif loss.difference.apart:
        every = all(c.difference.apart and not c.better for c in against)
        who = (
            f"every constraint costs {verdict.summary.metric}"
            if every and count > 1
            else f"{none} training without one"
        )
        yield (
            f"{where(verdict)} {who}: {which} is {amount(loss, signed=False)} worse than without, "
            f"{design(verdict, loss)}."
        )
    else:
        yield (
            f"{where(verdict)} {none} training without one: {which} is {moved(loss)}, "
            f"{design(verdict, loss)}; {missed(loss)}."
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
    choice = _cheaper(best, [c for c in answer.rivals if not c.control]) or best
    tied = "" if choice is best else f", which cannot be told from `{best.name}`, the best of those"
    price = f", and a step takes {step_time(choice)}" if step_cost(choice) else ""
    instead = f", not {step_cost(best)}" if price and choice is not best else ""
    differs = moved(verdict.between(choice, control))
    return (
        f"If the weights must be orthogonal, take `{choice.name}`{tied}: it is {differs} than without{price}{instead}."
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
    who = "An orthogonal start without a constraint" if choice.control else f"`{choice.name}`"
    if comparison.difference.apart:
        word = "better" if comparison.better else "worse"
        yield f"{who} is {amount(comparison, signed=False)} {word} than the network as its author made it."
    else:
        yield (
            f"{who} is {moved(comparison)} than the network as its author made it, which does not settle whether it "
            f"is better ({missed(comparison)})."
        )


def _doubts(verdict: Verdict) -> Iterator[str]:
    """What would change the answer."""
    bounds = [c for c in verdict.candidates if c.bound]
    if bounds:
        yield (
            f"Another rate may be better for {names_of(bounds)}: the best lies on the edge of those tried, and the "
            "score is marked as a bound."
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
        yield f"Another tuning may choose other rates: `{STUDIES}` tunes anew for each replicate."
    choice = recommended(verdict)
    if choice is not None and choice.step is None and any(row.cost for row in choice.rows):
        yield "What a step costs is not credible, because the machine was busy: measure again on a quiet one."


def _cheaper(best: Candidate, rivals: list[Candidate]) -> Candidate | None:
    """The cheapest rival whose step costs clearly less."""
    if best.step is None:
        return None
    known = [c for c in rivals if c.step is not None and c.step.value < 0.95 * best.step.value]
    return min(known, key=lambda c: c.step.value if c.step else math.inf, default=None)
