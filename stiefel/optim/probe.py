"""Trial steps on small parameters, which tell what an optimizer class does. Imports torch, ``bases`` and the errors.

What a class does is found out, not looked up: a list of names would lack the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from stiefel.errors import OptimizerError
from stiefel.optim.bases import decays, own_class

FIRST, MORE = 3, 12
"""Steps before and after one of two equal parameters is moved: more than the period of any averaging in use."""
SMALL = 1e-3
"""The trials' learning rate: with a huge one a move would be lost in rounding."""
KEPT = 0.9
"""What must be left of a move at the end: 1 in an optimizer that steps from where the parameter is."""


def make(cls: type[torch.optim.Optimizer], params: Any, hyper: dict[str, Any]) -> torch.optim.Optimizer:
    """Make an optimizer of a class, plain or lifted, and try it out on small parameters if the class is torch's.

    Raises:
        OptimizerError: the class refuses its options or the parameters, now or at its first step.
    """
    name = own_class(cls).__name__
    try:
        made = cls(params, **hyper)
        if own_class(cls).__module__.startswith("torch.optim"):  # a user's own may count or log its steps
            try_out(own_class(cls), made, hyper)
        if own_class(cls) is not cls and not getattr(cls, "holds", False):
            refuse_other_iterates(own_class(cls), made, hyper)
    # A TypeError too, which the next clause would wrap a second time.
    except OptimizerError:
        raise
    except Exception as error:  # whatever a class of somebody else's may raise
        if "2D" in str(error):  # Muon: "only supports 2D parameters"
            raise OptimizerError(
                f"{name} takes matrices only, and one optimizer serves the whole model: {error}; use it where all "
                "parameters of the model are 2-D"
            ) from error
        options = ", ".join(f"{option}={value!r}" for option, value in hyper.items())
        raise OptimizerError(
            f"{name} cannot train this model with the options {options or 'given'}: {error}"
        ) from error
    return made


def try_out(cls: type[torch.optim.Optimizer], made: torch.optim.Optimizer, hyper: dict[str, Any]) -> None:
    """Step a small parameter per group, dtype and device: options that fail only at a step then fail now."""
    for group in made.param_groups:
        for dtype, device in {(p.dtype, p.device) for p in group["params"]}:
            if (dtype.is_floating_point or dtype.is_complex) and device.type != "meta":
                _step(*_trial(cls, group, hyper, dtype, device), lambda: 0.0)  # some classes require a closure


def refuse_other_iterates(cls: type[torch.optim.Optimizer], made: torch.optim.Optimizer, hyper: dict[str, Any]) -> None:
    """Refuse a class whose weight is not where its steps begin and end.

    Averaging optimizers (ScheduleFree) exchange the parameter for an average in ``eval()``, where models are validated
    and saved; others (Lookahead, dual averaging) compute it from an iterate in their state. A method moves the
    parameter alone: the other iterate is a point of the flat space around the set, and so is what becomes of the
    weight. Two equal parameters are stepped; one of them is moved between steps; what is left of that at the end tells
    where the steps begin.

    Raises:
        OptimizerError: ``cls`` is such a class, or cannot step with gradients alone.
    """
    known = [
        (group, p)
        for group in made.param_groups
        for p in group["params"]
        if (p.dtype.is_floating_point or p.dtype.is_complex) and p.device.type != "meta"
    ]
    if not known:
        return
    group, like = known[0]
    try:
        small = {**group, "lr": SMALL}
        dtype = like.dtype.to_real() if like.dtype.is_complex else like.dtype
        trials = [_trial(cls, small, {**hyper, "lr": SMALL}, dtype, like.device) for _ in range(2)]
        left, change = _left_of_a_move(trials), _changed_by_eval(*trials[0])
    except Exception as error:
        raise OptimizerError(
            f"{cls.__name__} cannot serve a method that acts on the step: it failed in a trial step of a 2×2 weight "
            f"with nothing but its gradient ({type(error).__name__}: {error}); use SGD or Adam, or a reparameterization"
        ) from error
    if change > 0:
        what = "exchanges the weight for an average in eval()"
    elif left < KEPT:
        what = f"computes the weight from an iterate in its state (of a move, {left:.0%} is left after {MORE} steps)"
    else:
        return
    raise OptimizerError(
        f"{cls.__name__} {what}, and that other point leaves the constraint's set, for no method moves it; use a "
        "reparameterization, which takes any optimizer, or an optimizer that steps from the weight itself"
    )


def _left_of_a_move(trials: list[tuple[torch.optim.Optimizer, nn.Parameter]]) -> float:
    (_, first), (_, second) = trials
    for _ in range(FIRST):
        for trial in trials:
            _step(*trial)
    move = 0.01
    with torch.no_grad():
        second.add_(move)
    for _ in range(MORE):
        for trial in trials:
            _step(*trial)
    left = float((second - first).detach().double().mean()) / move
    return left if left == left else 1.0  # NaN, with some learning rates, tells nothing


def _changed_by_eval(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> float:
    if not callable(getattr(optimizer, "eval", None)):
        return 0.0
    before = parameter.detach().clone()
    optimizer.eval()  # type: ignore[attr-defined]
    return float((parameter.detach() - before).abs().max())


def _trial(
    cls: type[torch.optim.Optimizer], group: dict[str, Any], hyper: dict[str, Any], dtype: torch.dtype, device: Any
) -> tuple[torch.optim.Optimizer, nn.Parameter]:
    """An optimizer of its own, so that the user's keeps no state of the trial; a matrix, for Muon."""
    options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    parameter = nn.Parameter(torch.tensor([[1.0, 0.3], [-0.2, 0.7]], dtype=dtype, device=device))
    trial = cls([{"params": [parameter], **options}], **hyper)
    for each in trial.param_groups:
        each.update(dict.fromkeys(decays(each), 0))  # decay shortens a move too
    if callable(getattr(trial, "train", None)):
        trial.train()  # type: ignore[attr-defined]
    return trial, parameter


def _step(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, *closure: Callable[[], float]) -> None:
    parameter.grad = torch.tensor([[0.1, -0.2], [0.3, 0.05]], dtype=parameter.dtype, device=parameter.device)
    optimizer.step(*closure)
