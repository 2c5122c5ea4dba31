"""What a step of each method costs, from its cost run and its training runs. Imports ``record`` and numpy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from stiefel.compare.record.records import ENDED, Record
from stiefel.compare.record.spec import RunSpec

STEADY = 0.15
"""Widest quartiles of a credible step time, relative to its median."""


@dataclass(frozen=True)
class CostRow:
    """What a step of one method costs at one point of the grid, beside the control in the same process.

    Args:
        step, control: seconds per step: ``median``, ``q1``, ``q3``, ``n``.
        ratio: of their medians.
        share: of the step that the constraint takes.
        memory: peak resident bytes of its training runs, less the control's.
        counts: ``matmul_flops``, ``factorization_flops`` and ``operators`` per step; None where not recorded.
        gpu: the ``gpu_*`` fields, null with ``gpu_reason``.
        hardware: what it was measured on.
        doubt: why the times are not credible; empty where they are.
    """

    label: str
    setting: str
    fields: dict[str, Any]
    step: dict[str, float]
    control: dict[str, float]
    ratio: float
    share: float
    memory: float | None
    counts: dict[str, float | None]
    gpu: dict[str, Any]
    hardware: str
    doubt: str = ""

    @property
    def credible(self) -> bool:
        """Whether the machine was quiet enough for its times to be shown."""
        return not self.doubt


def costs_of(records: list[Record], factors: list[str]) -> dict[tuple[str, str], CostRow]:
    """The newest cost run of each method and point of the grid."""
    measured: dict[tuple[str, str], Record] = {}
    for record in sorted(records, key=lambda r: r.written):
        if record.spec.kind == "cost" and record.status == "done":
            measured[record.label, point_key(record.spec)] = record
    # Peak memory comes from training runs; the label "" collects the control's.
    peaks = defaultdict(list)
    for record in records:
        peak = record.summary.get("peak_resident_bytes")
        if record.spec.kind == "quality" and record.status in ENDED and peak is not None:
            peaks[record.label, point_key(record.spec)].append(peak)
            if record.control:
                peaks["", point_key(record.spec)].append(peak)
    rows = {}
    for (label, at), record in measured.items():
        summary, own, others = record.summary, peaks[label, at], peaks["", at]
        rows[label, at] = CostRow(
            label=label,
            setting=point_of(record.spec, factors) or "all",
            fields=record.spec.fields,
            step=summary["step_seconds"]["method"],
            control=summary["step_seconds"]["control"],
            ratio=summary["step_ratio"],
            share=summary["constraint_share"],
            memory=float(np.median(own) - np.median(others)) if own and others else None,
            counts={key: summary.get(key) for key in ("matmul_flops", "factorization_flops", "operators")},
            gpu={key: value for key, value in summary.items() if key.startswith("gpu_")},
            hardware=hardware([record]),
            doubt=_doubt(summary),
        )
    return rows


def _doubt(summary: dict[str, Any]) -> str:
    """Why a cost run's times are not credible: as the run says, or by its quartiles where it does not."""
    if "cost_doubt" in summary:
        return summary["cost_doubt"] or ""
    widths = [(step["q3"] - step["q1"]) / step["median"] for step in summary["step_seconds"].values()]
    return f"the machine was busy: quartiles {max(widths):.0%} wide" if max(widths) > STEADY else ""


def point_of(spec: RunSpec, factors: list[str]) -> str:
    """A point of the grid in words: the factors that vary, with their values."""
    return ", ".join(f"{name} {spec.fields.get(name)}" for name in factors)


def point_key(spec: RunSpec) -> str:
    """What the runs of one point share."""
    return repr(sorted(spec.fields.items()))


def hardware(records: Iterable[Record]) -> str:
    """The processors or GPUs that records come from, with the threads of each run."""
    found = []
    for environment in (r.environment for r in records if r.environment):
        threads = environment.get("threads")
        count = "" if not threads else f", {threads} thread{'s' * (threads != 1)}"
        found.append(environment.get("gpu") or f"{environment.get('cpu') or 'unknown processor'}{count}")
    return " and ".join(dict.fromkeys(found)) or "unknown hardware"
