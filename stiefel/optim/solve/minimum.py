"""What a minimization found. Imports nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Minimum:
    """Where a minimization is, or has ended.

    Args:
        loss: its value there.
        gradient_norm: ``‖P_X(∂L/∂W)‖_F`` over all parameters, 0 at a stationary point.
        steps: steps taken.
        evaluations: how often the loss and its gradient were computed.
        converged: whether the gradient's norm is at most the tolerance.
        message: why it ended; empty while it runs.
    """

    loss: float
    gradient_norm: float
    steps: int
    evaluations: int
    converged: bool
    message: str = ""
