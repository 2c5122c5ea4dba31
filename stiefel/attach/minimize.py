"""``minimize`` and ``gradient_norm``. Imports ``constrain``, ``unknowns`` and ``optim.solve``."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from stiefel.attach.constrain import project
from stiefel.attach.unknowns import Unknowns
from stiefel.constraint import is_count
from stiefel.errors import ObjectiveError, OptionError
from stiefel.optim.solve.blocks import add, norm
from stiefel.optim.solve.minimum import Minimum
from stiefel.optim.solve.objective import Objective, Point, number
from stiefel.optim.solve.quasi_newton import quasi_newton
from stiefel.optim.solve.trust_region import trust_region

QUIET, EVERY = 5.0, 2.0
"""Seconds before the first line of progress, and between two."""
PATIENCE = 100
"""Steps in which neither the loss nor the gradient's norm has to fall: then both are at their rounding."""
FAR = 1e9
"""A fall of so many times the loss's size at the start suggests that it has no lower bound."""


def minimize(
    module: nn.Module,
    loss: Callable[[], Tensor],
    *,
    tol: float = 1e-8,
    max_evaluations: int = 10_000,
    history: int = 20,
    second_order: bool = False,
    callback: Callable[[Minimum], Any] | None = None,
) -> Minimum:
    """Minimize a loss over all parameters of a module that require a gradient, until the gradient's norm is small.

        rotation = nn.ParameterDict({"R": torch.eye(8, dtype=torch.float64)})
        stiefel.constrain(rotation, "retraction", layers=["R"])
        found = stiefel.minimize(rotation, lambda: (a @ rotation["R"]).pow(4).sum())

    Constrained weights move on their sets, by whichever exact method they are held; others freely. There is no rate to
    choose. For a loss that differs from call to call use :func:`stiefel.optimizer`.

    Args:
        module: the model; its parameters are changed in place, and no ``.grad`` is.
        loss: a function without arguments that computes one real number from them; no backward pass, no optimizer.
        tol: where ‖P_X(∂L/∂W)‖_F over all parameters is at most this, it ends.
        max_evaluations: after so many evaluations of the loss it ends.
        history: pairs of steps and gradients that model the curvature.
        second_order: use Hessian-vector products, for losses so ill-conditioned that L-BFGS takes thousands of steps.
        callback: called with the :class:`Minimum` so far after each step, with the module there; True ends it.

    Returns:
        Where it ended, and why. An interrupt (Ctrl-C) is raised again, with the best point kept.

    Raises:
        ObjectiveError: ``loss`` returns no real number, depends on no parameter, or differs at the same point.
        DivergenceError: the loss is NaN or infinite at the start.
        OptionError: a weight is held by a penalty or a control, which keeps it on no set.

    Source: Nocedal and Wright, Numerical Optimization (2006), chapters 4 and 7; Hager and Zhang (2005).
    """
    _check(tol, max_evaluations, history)
    unknowns = Unknowns(project(module))
    objective = Objective(loss, unknowns.sets, unknowns.place, unknowns.gradients, max_evaluations)
    watch = _Watch(objective, tol, callback, unknowns)
    try:
        with unknowns.in_place():
            start = objective.first(unknowns.read())
            if second_order:
                return watch.minimum(*trust_region(objective, unknowns, start, watch))
            return watch.minimum(*quasi_newton(objective, start, history, watch))
    finally:
        watch.leave()


def _check(tol: float, max_evaluations: int, history: int) -> None:
    if not tol >= 0:
        raise OptionError(f"tol={tol!r}: expected a number of at least 0")
    for name, value in (("max_evaluations", max_evaluations), ("history", history)):
        if not is_count(value):
            raise OptionError(f"{name}={value!r}: expected a positive whole number")


def gradient_norm(module: nn.Module, loss: Callable[[], Tensor | Iterable[Tensor]]) -> float:
    """``‖P_X(∂L/∂W)‖_F`` over all parameters of a module that require a gradient: 0 at a stationary point.

    Of a constrained weight it is the tangent part of the weight's own gradient, whatever method holds it, and not that
    of its proxy; of a weight that a method keeps on no set, all of the gradient. No ``.grad`` is changed.

    Args:
        module: the model.
        loss: a function without arguments that returns one real number, or yields several, of which the mean counts,
            as the losses of all batches; of these one graph is kept at a time.

    Raises:
        ObjectiveError: ``loss`` returns no real number, or depends on no parameter.
    """
    unknowns = Unknowns(module, strict=False)
    total, count = None, 0
    with unknowns.in_place(), torch.enable_grad():  # also while a generator computes the next loss
        found = loss()
        for value in found if isinstance(found, Iterable) and not isinstance(found, Tensor) else [found]:
            gradient = unknowns.gradients(number(value))
            total, count = gradient if total is None else add(total, gradient), count + 1
        if total is None:
            raise ObjectiveError("the loss function yielded no number")
        with torch.no_grad():
            return norm(unknowns.sets.project(unknowns.read(), total)) / count


class _Watch:
    """Decides whether to go on, keeps the best point, and tells of progress."""

    def __init__(
        self,
        objective: Objective,
        tol: float,
        callback: Callable[[Minimum], Any] | None,
        unknowns: Unknowns,
    ) -> None:
        self.objective, self.tol, self.callback = objective, tol, callback
        self.unknowns = unknowns
        self.best: Point | None = None
        self.steps, self.stopped, self.spoke = -1, "", False
        self.least, self.flattest, self.fell = math.inf, math.inf, 0  # loss, gradient, and when one of them last fell
        self.start, self.told = 0.0, time.monotonic() + QUIET - EVERY

    def __call__(self, point: Point) -> bool:
        self.steps += 1
        self.start = point.loss if self.steps == 0 else self.start
        if self.best is None or point.loss <= self.best.loss + self.best.rounding:
            self.best = point  # of equal losses the later: its gradient is smaller
        # What is remembered is the last value that counted as lower, so that slow falls add up.
        if point.loss < self.least - point.rounding:
            self.least, self.fell = point.loss, self.steps
        if point.gradient_norm < 0.9 * self.flattest:
            self.flattest, self.fell = point.gradient_norm, self.steps
        so_far = self.minimum(point, "")
        self._tell(so_far)
        if self.steps and self._called_back(point, so_far):
            self.stopped = "the callback returned True"
        elif so_far.converged:
            self.stopped = f"the gradient's norm is at most {self.tol:g}"
        elif point.gradient_norm <= point.noise:
            self.stopped = f"the gradient's norm, {point.gradient_norm:.1e}, is that of its rounding"
        elif self.steps - self.fell >= PATIENCE:
            self.stopped = (
                f"neither the loss nor the gradient's norm, {point.gradient_norm:.1e}, has fallen in {PATIENCE} steps: "
                "they are at their rounding"
            )
        return not (self.stopped or self.objective.spent)

    def _called_back(self, point: Point, so_far: Minimum) -> bool:
        if self.callback is None:
            return False
        self.unknowns.place(point.where)
        self.unknowns.keep()
        return bool(self.callback(so_far))

    def minimum(self, point: Point, why: str) -> Minimum:
        """The point as it is told."""
        converged, message = point.gradient_norm <= self.tol, self.stopped or why
        if not message and self.objective.spent:
            message = f"{self.objective.evaluations} evaluations have not been enough for a norm of {self.tol:g}"
        if message and not converged and point.loss < -FAR * max(1.0, abs(self.start)):
            message += f"; the loss has fallen to {point.loss:.1e}: is it bounded below?"
        return Minimum(point.loss, point.gradient_norm, self.steps, self.objective.evaluations, converged, message)

    def _tell(self, so_far: Minimum) -> None:
        now = time.monotonic()
        if now - self.told < EVERY:
            return
        self.told, self.spoke = now, True
        line = (
            f"minimize: step {so_far.steps}, loss {so_far.loss:.9g}, gradient {so_far.gradient_norm:.1e}, "
            f"{so_far.evaluations} evaluations"
        )
        print(f"\r{line:<78}", end="" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)

    def leave(self) -> None:
        """Leave the parameters at the best point, whatever has happened; without a step proxies stay as they were."""
        if self.spoke and sys.stderr.isatty():
            print(file=sys.stderr)  # end the line of progress
        if self.best is not None:
            self.unknowns.place(self.best.where)
        if self.steps > 0:
            self.unknowns.keep()
