"""The control: the same orthogonal start as every method, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from stiefel.constraint import Control, register


@register
@dataclass(frozen=True, kw_only=True)
class Unconstrained(Control):
    """Start at the nearest orthonormal weight, then train freely (orthogonal initialization: Saxe et al., 2014)."""

    name = "unconstrained"
    summary = "orthogonal start, no constraint: the control"
    reference = "Saxe et al., ICLR 2014"
