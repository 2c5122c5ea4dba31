"""Facts about single optimizer classes. Imports torch and the errors.

Nothing else in the library names one: what a class can serve, what it keeps of a gradient, and what its weight decay
does. A class that is not named here is taken to be dense and first-order, to keep state from gradients, and to
mix decay into that state.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from stiefel.errors import OptimizerError

REFUSED = {
    torch.optim.LBFGS: "a subclass of it, or it beside a penalty on the step, evaluates the loss off the set",
    torch.optim.Rprop: "its step sizes depend on the signs of single entries, which a projection changes",
    torch.optim.SparseAdam: "it steps some rows only, and a row alone cannot stay orthogonal to the others",
}
"""Classes that cannot serve a method that acts on the step, and why."""


IGNORED_BY_GEOOPT = ("maximize", "fused", "capturable", "differentiable", "decoupled_weight_decay")
"""Options of torch's SGD and Adam that geoopt's Riemannian forms would take and ignore."""


def _of_torch(*names: str) -> tuple[type[torch.optim.Optimizer], ...]:
    """The classes of these names that this version of torch has: Muon is not in every one."""
    return tuple(getattr(torch.optim, name) for name in names if hasattr(torch.optim, name))


LINEAR_DECAY = _of_torch("SGD", "AdamW", "Adafactor", "Muon")
"""Classes whose decay multiplies a parameter of zero gradient by a number, or a sum of such steps (SGD's momentum).

ASGD's does too, but is left out: the shorter a proxy, the higher the effective rate of its weight, until training is
unstable. SGD's stays, since the papers set that rate by it.
"""

ADDITIVE = _of_torch("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "Muon")
"""Classes whose step, apart from decay, does not depend on the parameter's value; a subclass may differ."""

MOMENTUM = "momentum_buffer"
"""The name under which SGD, RMSprop and Muon, and classes made after them, keep the direction of their next step.

Adam's mean of gradients is none: it is divided, entry by entry, by what the gradients of that entry were. A mean that
was turned since makes steps of up to 60 times the rate in some entries, where Adam's are about as long as the rate.
"""


def refuse(cls: type[torch.optim.Optimizer]) -> None:
    """Raise :class:`OptimizerError` for a class that cannot be lifted."""
    for refused, why in REFUSED.items():
        if issubclass(cls, refused):
            raise OptimizerError(f"{cls.__name__} cannot serve a method that acts on the step: {why}; use SGD or Adam")


def refuse_late_start(optimizer: torch.optim.Optimizer) -> None:
    """Raise :class:`OptimizerError` where fused SGD would start a parameter's momentum after others have theirs.

    torch 2.13 fails there with a TypeError that names neither.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        if group["fused"] and group["momentum"]:
            # A buffer is there from a parameter's first gradient on; only some being there is the case that fails.
            buffers = [optimizer.state[p].get("momentum_buffer") for p in group["params"] if p.grad is not None]
            if 0 < sum(b is None for b in buffers) < len(buffers):
                raise OptimizerError(
                    "SGD with fused=True cannot start the momentum of a parameter whose first gradient comes after "
                    "others' (torch's kernel takes all or none); leave fused out, or give every parameter a gradient "
                    "at the first step"
                )


def keeps_nothing(cls: type[torch.optim.Optimizer], group: dict[str, Any]) -> bool:
    """Whether the optimizer's displacement is −lr times the gradient it gets, whatever came before."""
    return cls is torch.optim.SGD and not group["momentum"] and not group["weight_decay"]


def is_additive(cls: type[torch.optim.Optimizer], group: dict[str, Any]) -> bool:
    """Whether the optimizer's displacement does not depend on where a parameter is."""
    return cls in ADDITIVE and not decays(group)


def momentum_of(state: Mapping[str, Any], parameter: torch.Tensor) -> torch.Tensor | None:
    """The direction of the next step in an optimizer's state of a parameter; None where it keeps none."""
    kept = state.get(MOMENTUM)
    return kept if isinstance(kept, torch.Tensor) and kept.shape == parameter.shape else None


def decays(group: dict[str, Any]) -> list[str]:
    """Names of the options by which a parameter group decays its parameters: ``weight_decay``, and ASGD's ``lambd``."""
    return [name for name in ("weight_decay", "lambd") if group.get(name)]


def decay_only_rescales(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether decay leaves a parameter of zero gradient on its ray from the origin.

    Decoupled decay does (Loshchilov and Hutter, ICLR 2019), and so does SGD's. The L2 term of Adam and its relatives
    does not: it is divided entry by entry. With momentum μ and a decay λ so large that lr·λ ≥ (1 − √μ)², the parameter
    swings through zero (a heavy ball beyond critical damping), and then points the other way.
    """
    if not isinstance(optimizer, LINEAR_DECAY) and not group.get("decoupled_weight_decay"):
        return False
    momentum = group["momentum"] if isinstance(optimizer, torch.optim.SGD) else 0.0
    return float(group["lr"]) * sum(float(group[name]) for name in decays(group)) < (1 - momentum**0.5) ** 2


INNER = "optimizer_class"
"""The option by which an optimizer takes the class of another one, which does its steps."""


def inner_class(cls: type[torch.optim.Optimizer], hyper: dict[str, Any]) -> type[torch.optim.Optimizer] | None:
    """The class that does the steps of an optimizer around another one; None for any other."""
    inner = hyper.get(INNER)
    takes = INNER in inspect.signature(cls.__init__).parameters
    return inner if takes and isinstance(inner, type) and issubclass(inner, torch.optim.Optimizer) else None


def options_of_inner(cls: type[torch.optim.Optimizer], hyper: dict[str, Any]) -> dict[str, Any]:
    """The options that an optimizer around another one passes on: those that it does not name itself."""
    return {name: value for name, value in hyper.items() if name not in inspect.signature(cls.__init__).parameters}


def acting(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that does the steps: that inside of another one, or the optimizer itself."""
    inner = getattr(optimizer, "optim", None)
    return inner if isinstance(inner, torch.optim.Optimizer) else optimizer


def forget_curvature(optimizer: torch.optim.Optimizer) -> None:
    """Let L-BFGS begin anew with the gradient: its pairs are of coordinates that its parameters have no longer."""
    if isinstance(optimizer, torch.optim.LBFGS):
        state = optimizer.state[optimizer.param_groups[0]["params"][0]]  # torch keeps all of it with the first one
        if "n_iter" in state:
            state["n_iter"] = 0


def own_class(cls: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The class that a lifted class was made from; any other class itself."""
    return getattr(cls, "base", cls)
