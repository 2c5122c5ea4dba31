"""Global optimizer hooks: refuse a step that would leave a set, and count steps for schedules.

Imports ``optim.lift``; geoopt only where it was imported already.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from stiefel.errors import OptimizerError
from stiefel.optim.lift import Lift, SteppedParameter


class Counter(Protocol):
    """Anything that counts optimizer steps."""

    steps: int


@cache
def install_guard() -> None:
    """From now on, raise where a plain optimizer is about to step a weight that a step method owns.

    geoopt's own Riemannian optimizers may step a manifold's weights: they stay on it.
    """
    register_optimizer_step_pre_hook(_refuse_plain_step)


def _refuse_plain_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    lifted = isinstance(optimizer, Lift)
    geoopt = sys.modules.get("geoopt")
    riemannian = geoopt is not None and isinstance(optimizer, geoopt.optim.mixin.OptimMixin)
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is None:
                continue  # it will not be stepped
            on_manifold = geoopt is not None and isinstance(p, geoopt.ManifoldTensor) and hasattr(p.manifold, "label")
            if (isinstance(p, SteppedParameter) and not lifted) or (on_manifold and not riemannian):
                label = p.ownership.label if isinstance(p, SteppedParameter) else p.manifold.label
                name = type(optimizer).__name__
                raise OptimizerError(
                    f"{name} is about to step weight '{label}' off its constraint's set; create the optimizer with "
                    f"stiefel.optimizer(model, torch.optim.{name}, ...), or stiefel.release(model) first"
                )


_counters = WeakIdKeyDictionary()


def watch_steps(parameter: Tensor, counter: Counter) -> None:
    """Advance ``counter.steps`` after every step of an optimizer that has ``parameter``."""
    _install_count()
    _counters[parameter] = counter


@cache
def _install_count() -> None:
    register_optimizer_step_post_hook(_count_step)


def _count_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if getattr(optimizer, "stepping", False):
        return  # the base step inside a lifted one
    for group in optimizer.param_groups:
        for p in group["params"]:
            counter = _counters.get(p)
            if counter is not None:
                counter.steps += 1
