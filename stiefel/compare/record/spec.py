"""What identifies a run, and its hash. Imports the standard library."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

SCHEMA = 1  # version of run.json; it enters every hash


@dataclass(frozen=True)
class RunSpec:
    """One run: everything that determines its result, and nothing else.

    Args:
        kind: ``"quality"`` (train and measure) or ``"cost"`` (time steps beside the control).
        phase: ``"tuning"`` for runs that choose a learning rate, ``"final"`` for those that are reported.
        problem: the problem's name.
        digest: of the problem's source, comments apart, so that another problem of that name is another run.
        fields: the problem's factors, by name.
        method: the method's name.
        options: the scale, and the method's options that differ from its defaults.
        lr: learning rate.
        seed: of the start and the order of batches.
        knobs: options of the method's tuning space that the comparison chose, in place of its defaults.
        study: the replicate that it belongs to: a tuning of its own and a run at what that chose; None where one
            tuning serves all reported runs.
        device: ``"cpu"``, ``"cuda"`` or another kind of accelerator.
        dtype: of the weights.
    """

    kind: str
    phase: str
    problem: str
    digest: str
    fields: dict[str, Any]
    method: str
    options: dict[str, Any]
    lr: float
    seed: int
    device: str = "cpu"
    dtype: str = "float32"
    knobs: dict[str, Any] = field(default_factory=dict)
    study: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the schema's version; without what is at its default, so that hashes of before hold."""
        data = {"schema": SCHEMA, **{f.name: getattr(self, f.name) for f in fields(self)}}
        left_out = {"knobs": not self.knobs, "study": self.study is None}
        return {key: value for key, value in data.items() if not left_out.get(key)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RunSpec:
        """Inverse of :meth:`to_dict`, of its JSON too, where a sequence has become a list."""
        return cls(**{key: fixed(value) for key, value in data.items() if key != "schema"})

    @cached_property
    def hash(self) -> str:
        """16 hexadecimal digits of the SHA-256 of the canonical JSON."""
        text = json.dumps(canonical(self.to_dict()), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def method_options(self) -> dict[str, Any]:
        """The method's arguments: its options, overridden by its knobs."""
        return {**self.options, **self.knobs}

    @property
    def plain_label(self) -> str:
        """The method and its options without the scale and without ``center=False``: how 0.1.0 named it."""
        shown = {k: v for k, v in self.options.items() if k != "scale" and (k, v) != ("center", False)}
        return written(self.method, shown)


def written(method: str, options: dict[str, Any]) -> str:
    """A method with options, as a user would write it."""
    changed = ",".join(f"{key}={value}" for key, value in sorted(options.items()))
    return f"{method}:{changed}" if changed else method


def fixed(value: Any) -> Any:
    """Sequences as tuples: cells are told apart by what their runs share, which must be hashable."""
    if isinstance(value, dict):
        return {key: fixed(item) for key, item in value.items()}
    return tuple(map(fixed, value)) if isinstance(value, (list, tuple)) else value


def canonical(value: Any) -> Any:
    """Equal numbers in one form: 1.0 and 1 are the same run."""
    if isinstance(value, dict):
        return {key: canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
