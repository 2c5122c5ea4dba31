"""The verdicts as JSON, for programs. Imports ``sentences`` and ``analyse``."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from stiefel import __version__
from stiefel.compare.analyse import frames
from stiefel.compare.analyse.requirements import Answer
from stiefel.compare.analyse.requirements import answers as answers_of
from stiefel.compare.analyse.statistics.scores import Interval
from stiefel.compare.analyse.summary import Summary
from stiefel.compare.analyse.verdict import Verdict
from stiefel.compare.present.sentences import sentences

SCHEMA = 1
"""Of the document; it rises where a key is renamed, removed or gets another meaning."""


def document(problems: Iterable[Summary]) -> dict[str, Any]:
    """The verdict on each problem as plain data; what is not known or infinite is None."""
    return _strict({"schema": SCHEMA, "stiefel": __version__, "problems": [_problem(summary) for summary in problems]})


def _problem(summary: Summary) -> dict[str, Any]:
    verdict = Verdict(summary)
    return {
        "problem": summary.problem,
        "device": summary.device,
        "dtype": summary.dtype,
        "metric": summary.metric,
        "higher_is_better": summary.higher_is_better,
        "log_scale": summary.measure.log_scale,
        "settings": [setting.title for setting in summary.settings],
        "design": {
            "replicates": "studies" if summary.studies else "seeds",
            "n": verdict.n,
            "methods": [candidate.name for candidate in verdict.candidates],
            "detectable": verdict.detectable,
        },
        "sentences": sentences(verdict),
        "answers": [_answer(answer) for answer in answers_of(verdict)],
        "comparisons": _comparisons(summary),
    }


def _answer(answer: Answer) -> dict[str, Any]:
    best = answer.best
    return {
        "requirement": answer.requirement,
        "method": best and best.name,
        "choice": best and best.choice,
        "score": best and _interval(best.score),
        "error": best and best.error,
        "step_ratio": best and _interval(best.step),
        "rivals": [rival.name for rival in answer.rivals],
        "evidence": answer.evidence or None,
        "reason": answer.reason or None,
    }


def _interval(interval: Interval | None) -> dict[str, Any] | None:
    if interval is None:
        return None
    return {name: getattr(interval, name) for name in ("value", "low", "high", "n", "kind")}


def _comparisons(summary: Summary) -> list[dict[str, Any]]:
    frame = frames.verdict([summary])[list(frames.COMPARED)]
    # As objects, in which pandas has Python's own numbers, and None for what is missing.
    rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return [{str(name): value for name, value in row.items()} for row in rows]


def _strict(value: Any) -> Any:
    """Data that strict JSON can hold."""
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
