"""All that is known of single optimizer classes. Imports torch and the errors.

Nothing else in the library names one: what a class can serve, what it keeps of a gradient, and what its weight decay
does. A class that is not known here is dense and first-order, remembers gradients, and mixes decay into what it
remembers.
"""

from __future__ import annotations

from typing import Any

import torch

from stiefel.errors import OptimizerError

REFUSED = {
    torch.optim.LBFGS: "it evaluates the loss several times per step, between which the weight must not leave its set",
    torch.optim.Rprop: "its step sizes depend on the signs of single entries, which a projection changes",
    torch.optim.SparseAdam: "it steps some rows only, and a row alone cannot stay orthogonal to the others",
}
"""Classes that cannot serve a method that acts on the step, and why."""

LINEAR_DECAY: tuple[type[torch.optim.Optimizer], ...] = tuple(
    getattr(torch.optim, name)
    for name in ("SGD", "ASGD", "AdamW", "Adafactor", "Muon")  # the last is not in every torch
    if hasattr(torch.optim, name)
)
"""Classes whose decay multiplies a parameter of zero gradient by a number, or a sum of such steps (SGD's momentum)."""


def refuse(cls: type[torch.optim.Optimizer]) -> None:
    """Raise :class:`OptimizerError` for a class that cannot be lifted."""
    for refused, why in REFUSED.items():
        if issubclass(cls, refused):
            raise OptimizerError(f"{cls.__name__} cannot serve a method that acts on the step: {why}; use SGD or Adam")


def keeps_nothing(cls: type[torch.optim.Optimizer], group: dict[str, Any]) -> bool:
    """Whether the optimizer's displacement is −lr times the gradient it gets, whatever came before."""
    return cls is torch.optim.SGD and not group["momentum"] and not group["weight_decay"]


def decays(group: dict[str, Any]) -> list[str]:
    """Names of the options by which a parameter group decays its parameters: ``weight_decay``, and ASGD's ``lambd``."""
    return [name for name in ("weight_decay", "lambd") if group.get(name)]


def decay_only_rescales(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether decay leaves a parameter of zero gradient on the ray on which it is.

    A decoupled one does (Loshchilov and Hutter, ICLR 2019), and SGD's. The L2 term of Adam and its relatives does not:
    it is divided entry by entry. Where a rate and a decay λ are so large that lr·λ ≥ (1 − √μ)², with momentum μ, the
    parameter swings through zero (a heavy ball beyond critical damping), and what is left of it points the other way.
    """
    if not isinstance(optimizer, LINEAR_DECAY) and not group.get("decoupled_weight_decay"):
        return False
    momentum = group["momentum"] if isinstance(optimizer, torch.optim.SGD) else 0.0
    return float(group["lr"]) * sum(float(group[name]) for name in decays(group)) < (1 - momentum**0.5) ** 2


def takes_matrices_only(error: ValueError) -> bool:
    """Whether an optimizer refused its parameters because some are not 2-D, as Muon does."""
    return "2D" in str(error)
