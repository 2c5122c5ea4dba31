"""Records and summaries as pandas frames. Imports ``record``, the rest of ``analyse``, pandas."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from stiefel.compare.analyse.recommend import in_setting, overall
from stiefel.compare.analyse.rows import TOLERANCES, Row, powers
from stiefel.compare.analyse.scores import Interval
from stiefel.compare.analyse.summary import Setting, Summary
from stiefel.compare.record.measurements import lines_of, parsed
from stiefel.compare.record.records import Record

WHERE = ("commit", "cpu", "cores", "threads", "gpu", "torch")
"""What of a run's environment a frame has."""


def runs(records: Iterable[Record]) -> pd.DataFrame:
    """A row per run: spec, status, summary, with the problem's factors and the scale as columns.

    Where a factor has the name of something in the summary, as ``steps``, that is ``run_steps``.
    """
    rows = []
    for record in records:
        spec = record.spec
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
    for record in (r for r in records if r.spec.kind == "quality"):
        for m in parsed(lines_of(record)):
            parts = {f"{part}_{key}": v for part in ("validation", "test") for key, v in m.get(part, {}).items()}
            told = {key: m[key] for key in ("epoch", "step", "seconds", "train_loss")}
            rows.append({"hash": record.spec.hash, **told, **parts, "error": m["orthogonality"]["worst"]})
    return pd.DataFrame(rows)


def recommendations(problems: Iterable[Summary]) -> pd.DataFrame:
    """A row per problem, setting (or all of them) and requirement: the method, its evidence, its rivals."""
    rows = []
    for summary in problems:
        parts = [("all settings", overall(summary)), *((s.title, in_setting(summary, s)) for s in summary.settings)]
        for title, found in parts:
            for r in found:
                best, score = r.best, r.best.score if r.best else None
                rows.append(
                    {
                        **_identity(summary),
                        "setting": title,
                        "requirement": r.requirement,
                        "method": best.name if best else None,
                        "choice": best.choice if best else None,
                        **_interval(f"test_{summary.metric}", score),
                        "n": score.n if score else 0,
                        "failed": best.failures if best else None,
                        "runs": best.runs if best else None,
                        "error_worst": best.error if best else None,
                        "step_ratio": best.step.value if best and best.step else None,
                        "not_told_apart": ", ".join(other.name for other in r.rivals),
                        "evidence": r.evidence or r.reason,
                        "hardware": summary.hardware,
                    }
                )
    return pd.DataFrame(rows)


def table(summary: Summary) -> pd.DataFrame:
    """The rows of one problem as a frame."""
    return pd.DataFrame([_row(summary, setting, row) for setting in summary.settings for row in setting.rows])


def _row(summary: Summary, setting: Setting, row: Row) -> dict[str, Any]:
    environment: dict[str, Any] = next((r.environment for r in (*row.final, *row.tuning) if r.environment), {})
    cost = row.cost
    return {
        **_identity(summary),
        "setting": setting.title,
        "method": row.label,
        "faults": row.faults or None,
        "lr": row.choice.lr if row.choice else None,
        "knobs": ", ".join(f"{k}={v}" for k, v in row.choice.knobs) if row.choice else None,
        "lr_on_edge": row.edge,
        "state": row.state or "scored",
        **_interval(f"test_{summary.metric}", row.test),
        "n": row.runs,
        "failed": sum(row.failures.values()),
        "runs": row.runs,
        "rank": setting.rank(row),
        **{f"rank_at_{powers(tolerance)}": setting.rank(row, tolerance) for tolerance in TOLERANCES},
        "error_worst": row.error_worst,
        "error_final": row.error_final,
        "feasible_at": row.feasible,
        **_interval("steps_to_target", row.steps_to_target, "steps_"),
        **_interval("seconds_to_target", row.seconds_to_target, "seconds_"),
        "redundancy": row.redundancy,
        "step_ratio": cost.ratio if cost else None,
        "step_seconds": cost.step["median"] if cost else None,
        "constraint_share": cost.share if cost else None,
        "memory_bytes": cost.memory if cost else None,
        **(cost.counts if cost else {}),
        **{k: v for k, v in (cost.gpu if cost else {}).items() if k != "gpu_reason"},
        "cost_hardware": cost.hardware if cost else None,
        "default_validation": row.default.validation if row.default else None,
        "default_lr": row.default.choice.lr if row.default else None,
        "tuned_validation": row.tuned.validation if row.tuned else None,
        "tuning_runs": len(row.tuning),
        "tuning_failures": row.tuning_failures,
        **{name: environment.get(name) for name in WHERE},
    }


def _identity(summary: Summary) -> dict[str, Any]:
    return {name: getattr(summary, name) for name in ("problem", "digest", "device", "dtype")}


def _interval(name: str, interval: Interval | None, prefix: str = "") -> dict[str, Any]:
    known = (interval.value, interval.low, interval.high) if interval else (None, None, None)
    return dict(zip((name, f"{prefix}low", f"{prefix}high"), known, strict=True))
