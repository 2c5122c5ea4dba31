"""Records and summaries as pandas frames. Imports ``record``, the rest of ``analyse``, pandas."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from stiefel.compare.analyse.requirements import answers as answers_of
from stiefel.compare.analyse.statistics.scores import Interval
from stiefel.compare.analyse.summary import Summary
from stiefel.compare.analyse.values import WHERE, Line, values
from stiefel.compare.analyse.verdict import Verdict
from stiefel.compare.record.measurements import lines_of, parsed
from stiefel.compare.record.records import Record


def runs(records: Iterable[Record]) -> pd.DataFrame:
    """A row per run: spec, status, summary, with the problem's factors and the scale as columns.

    An entry of the summary that shares its name with a factor, such as ``steps``, becomes ``run_steps``.
    """
    rows = []
    for record in records:
        spec = record.spec
        # Left out: the dictionaries, whose entries become columns below, and the version of the schema.
        flat = {k: v for k, v in spec.to_dict().items() if k not in ("fields", "options", "knobs", "schema")}
        scale = spec.options.get("scale", 1.0)
        rows.append(
            {
                **flat,
                **spec.fields,
                **{f"knob_{k}": v for k, v in spec.knobs.items()},
                "scale": scale,
                "label": record.label,
                "hash": spec.hash,
                "status": record.status,
            }
            | {"reason": record.reason}
            | {f"run_{k}" if k in spec.fields else k: v for k, v in record.summary.items()}
        )
    return pd.DataFrame(rows)


def where(records: Iterable[Record]) -> pd.DataFrame:
    """A row per run: how long it took, and what it ran on."""
    known = [{"wall_seconds": r.wall_seconds} | {key: r.environment.get(key) for key in WHERE} for r in records]
    return pd.DataFrame(known)


def epochs(records: Iterable[Record]) -> pd.DataFrame:
    """A row per training run and epoch: steps, seconds, loss, what was measured, worst orthogonality error."""
    rows = []
    for record in (r for r in records if r.spec.kind == "quality"):  # cost runs have no epochs
        for m in parsed(lines_of(record)):
            parts = {f"{part}_{key}": v for part in ("validation", "test") for key, v in m.get(part, {}).items()}
            told = {key: m.get(key) for key in ("epoch", "step", "seconds", "train_loss")}
            rows.append({"hash": record.spec.hash, **told, **parts, "error": m["orthogonality"]["worst"]})
    return pd.DataFrame(rows)


def verdict(problems: Iterable[Summary]) -> pd.DataFrame:
    """A row per comparison that a verdict rests on: what was compared, the difference, whether it is told apart."""
    rows: list[dict[str, Any]] = []
    for summary in problems:
        found = Verdict(summary)
        rows += [
            {
                "setting": found.title,
                "method": c.first.name,
                "against": c.second.name,
                "n": c.difference.n,
                "difference": c.difference.value,
                "low": c.difference.low,
                "high": c.difference.high,
                "told_apart": c.difference.apart,
                "ratio": c.is_ratio,
                "p": c.difference.p,
                "detectable": c.difference.detectable,
                "family": "control" if c.second.control else "pairs",
                "studies": summary.studies,
                **_identity(summary),
            }
            for c in found.comparisons
        ]
    frame = pd.DataFrame(rows, columns=[*COMPARED, "problem", "digest", "device", "dtype"])
    return frame.astype({"told_apart": "boolean"})


COMPARED = (
    "setting", "method", "against", "n", "difference", "low", "high", "told_apart", "ratio", "p", "detectable",
    "family", "studies",
)  # fmt: skip
"""Columns of :func:`verdict` that say what was compared."""


def recommendations(problems: Iterable[Summary]) -> pd.DataFrame:
    """A row per problem and requirement, over all settings: the method, its evidence, its rivals."""
    rows = []
    for summary in problems:
        found = Verdict(summary)
        for answer in answers_of(found):
            best, score = answer.best, answer.best.score if answer.best else None
            rows.append(
                {
                    **_identity(summary),
                    "setting": found.title,
                    "requirement": answer.requirement,
                    "method": best.name if best else None,
                    "choice": best.choice if best else None,
                    **_interval(f"test_{summary.metric}", score),
                    "n": score.n if score else 0,
                    "failed": best.failures if best else None,
                    "runs": best.runs if best else None,
                    "error_worst": best.error if best else None,
                    "step_ratio": best.step.value if best and best.step else None,
                    "not_told_apart": ", ".join(other.name for other in answer.rivals),
                    "evidence": answer.evidence or answer.reason,
                    "hardware": summary.hardware,
                }
            )
    return pd.DataFrame(rows)


def table(summary: Summary) -> pd.DataFrame:
    """The rows of one problem as a frame."""
    lines = [Line(summary, setting, row) for setting in summary.settings for row in setting.rows]
    return pd.DataFrame([_identity(summary) | values(line) for line in lines])


def _identity(summary: Summary) -> dict[str, Any]:
    return {name: getattr(summary, name) for name in ("problem", "digest", "device", "dtype")}


def _interval(name: str, interval: Interval | None) -> dict[str, Any]:
    known = (interval.value, interval.low, interval.high) if interval else (None, None, None)
    return dict(zip((name, "low", "high"), known, strict=True))
