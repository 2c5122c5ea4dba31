"""The controls: an orthogonal start and nothing else, or the network as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stiefel.constraint import Control, register


@register
@dataclass(frozen=True, kw_only=True)
class Unconstrained(Control):
    """Start at the nearest orthonormal weight, then train freely (orthogonal initialization: Saxe et al., 2014).

    Args:
        start: ``"orthogonal"``, or ``"given"`` to leave the weight as its author made it, whatever the scale: what a
            network is without this library. Comparisons call that ``default``.
    """

    start: Literal["orthogonal", "given"] = "orthogonal"

    name = "unconstrained"
    summary = "orthogonal start, no constraint: the control"
    reference = "Saxe et al., ICLR 2014"
    aliases = {"default": {"start": "given"}}  # noqa: RUF012

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_one_of("start", ("orthogonal", "given"))

    @property
    def orthogonal_start(self) -> bool:
        """Whether training starts from an orthogonal weight."""
        return self.start == "orthogonal"
