"""Effective rates: is OWN's strength its map, or the schedule that the growth of its proxy amounts to?"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from claims.outcome import COLOURS, Claim, Outcome, Rows, best_rate, figure, mean, spread
from claims.training import SHOWN, TINY, Run, Size
from stiefel.attach import constrained_weights

EI_QR: dict[str, Any] = {"metric": "euclidean", "retraction": "qr"}


class Lengths:
    """The proxies' mean lengths relative to the start, step by step; and what holds them there.

    Args:
        held: whether each proxy is given its first length again after every step, which leaves the weight as it is.
    """

    def __init__(self, run: Run, held: bool) -> None:
        self.held, self.squares = held, [1.0]
        self.first = [torch.linalg.vector_norm(w.parameter.detach()) for w in constrained_weights(run.model)]

    @torch.no_grad()
    def __call__(self, run: Run, loss: Tensor) -> None:
        """Look, and hold."""
        weights = list(constrained_weights(run.model))
        ratios = [torch.linalg.vector_norm(w.parameter) / n for w, n in zip(weights, self.first, strict=True)]
        self.squares.append(float(torch.stack(ratios).square().mean()))
        if self.held:
            for weight, ratio in zip(weights, ratios, strict=True):
                weight.parameter.div_(ratio)


def run(size: Size) -> Outcome:
    """Test accuracy over learning rates: ``own``; own with ‖V‖ held; EI+QR; EI+QR at own's effective rate."""
    rows: Rows = []
    problem = size.problem(bias=False)
    for lr in size.rates:
        for seed in size.seeded():
            lengths: dict[bool, Lengths] = {}
            for held in (False, True):
                one = Run(problem, "own", lr, seed, {"center": False})
                lengths[held] = Lengths(one, held)
                _row(rows, one, "own, ‖V‖ held" if held else "own", lengths[held])
            _row(rows, Run(problem, "riemannian", lr, seed, EI_QR), "EI+QR")
            scheduled = Run(problem, "riemannian", lr, seed, EI_QR)
            _row(rows, scheduled, "EI+QR, own's schedule", _Follow(scheduled, lengths[False].squares))
    names = list(dict.fromkeys(r["name"] for r in rows))
    made, axes = figure()
    for name, colour in zip(names, COLOURS, strict=False):
        values = [mean(rows, "accuracy", name=name, lr=lr) for lr in size.rates]
        axes[0, 0].plot(size.rates, values, "o-", color=colour, label=name)
    axes[0, 0].set(xscale="log", xlabel="learning rate", ylabel="test accuracy")
    axes[0, 0].legend(frameon=False)
    best = {name: best_rate(rows, size.rates, name=name) for name in names}
    listed = "; ".join(f"{n} {spread(rows, 'accuracy', name=n, lr=best[n])} at {best[n]:g}" for n in names)
    grown = mean(rows, "grown", name="own", lr=best["own"])
    return Outcome(
        rows, f"At the rate that validation chose: {listed}. ‖V‖² of own grew {grown:.3g}-fold over training.", made
    )


class _Follow:
    """The problem's schedule, the constrained weights' rate divided by what a proxy's squared length has grown by."""

    def __init__(self, run: Run, squares: list[float]) -> None:
        self.squares, self.first = squares, run.lr
        run.schedule = self
        held = {id(w.parameter) for w in constrained_weights(run.model)}
        (group,) = run.optimizer.param_groups
        free = [p for p in group["params"] if id(p) not in held]
        group["params"] = [p for p in group["params"] if id(p) in held]
        run.optimizer.param_groups.append({**group, "params": free})
        self.halves_at = len(run.train[1]) // run.problem.batch_size * math.ceil(run.problem.epochs / 2)

    def step(self) -> None:
        """Nothing: rates are set step by step."""

    def __call__(self, run: Run, loss: Tensor) -> None:
        """Set the rates of the next step."""
        rate = self.first * (0.5 if run.steps >= self.halves_at else 1.0)
        constrained, free = run.optimizer.param_groups
        constrained["lr"], free["lr"] = rate / self.squares[min(run.steps, len(self.squares) - 1)], rate


def _row(rows: Rows, one: Run, name: str, each: Any = None) -> None:
    one.go(each)
    scores = {"accuracy": one.accuracy(), "validation": one.accuracy(one.validation)}
    grown = each.squares[-1] if isinstance(each, Lengths) else float("nan")
    rows.append({"name": name, "lr": one.lr, "seed": one.seed, **scores, "grown": grown})


CLAIM = Claim(
    "OWN's rate decays by itself, as its proxy grows: is that what makes it bear large rates?", run, SHOWN, TINY
)
