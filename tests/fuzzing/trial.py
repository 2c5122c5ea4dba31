"""One training run of a configuration, looked at after every step."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

import stiefel
from fuzzing.configuration import Configuration
from fuzzing.events import EVENTS, MOVES, SPOILT
from fuzzing.faults import Fault, is_named
from fuzzing.models import BORN, LOSSES, STARTS, Net, make
from fuzzing.optimizers import OPTIMIZERS
from stiefel.attach.weights import ConstrainedWeight, constrained_weights
from stiefel.constraint import Claim, Penalized, Penalty, Reparameterization

EXTREME = 1e15
"""Sizes of steps from which a sum or a square overflows in float32 somewhere: what diverges there may say so."""
CUBED = 1e12
"""The same, in units of the scale, of a proxy whose weight is a polynomial of the third degree."""


class Trial:
    """One run.

    Attributes:
        beyond: whether training has left what the methods' claims speak of.
        longest: the largest norm so far of a gradient, a parameter, or a step.
        overflowed: whether torch's own arithmetic has made a parameter infinite, which the next step has to tell.
    """

    def __init__(self, c: Configuration) -> None:
        self.c, self.dtype = c, getattr(torch, c.dtype)
        self.beyond, self.longest, self.overflowed = False, 0.0, False

    def run(self) -> None:
        """Build, then train."""
        c = self.c
        self.model, self.optimizer = self.pair(c.method, c.options)
        self.start_over()
        self.check_weights(moved={})
        for step in range(c.steps + 1):
            for when, event in c.events:
                if when == step:
                    self.happen(event, step)
            if step < c.steps or self.overflowed:
                self.step(step, math.prod(factor for event, factor in SPOILT.items() if (step, event) in c.events))

    # --- building ---

    def pair(self, method: str, options: dict[str, Any], net: Net | None = None) -> tuple[Net, torch.optim.Optimizer]:
        """A constrained model and its optimizer."""
        c = self.c
        if net is None and c.model in BORN:
            torch.manual_seed(c.seed)
            net = BORN[c.model](c.bias, constraint=method, dtype=self.dtype, **options)
        else:
            net = self.plain() if net is None else net
            stiefel.constrain(net, method, layers=list(net.names), **options)
        hyper = dict(c.hyper)
        if c.tensor_rate and isinstance(hyper["lr"], float):
            hyper["lr"] = torch.tensor(hyper["lr"])
        return net, stiefel.optimizer(net, OPTIMIZERS[c.optimizer], self.groups(net), **hyper)

    def plain(self) -> Net:
        """The model before it is constrained, at the configuration's start."""
        net = make(self.c.model, self.c.bias, self.c.seed).to(self.dtype)
        with torch.no_grad():
            for k, name in enumerate(net.names):
                p = net.get_parameter(name)
                p.copy_(STARTS[self.c.start](p, self.c.seed + k))
        return net

    def groups(self, net: Net) -> Any:
        """What the optimizer gets as its parameters."""
        found = [w.parameter for w in constrained_weights(net)]
        others = [p for p in net.parameters() if not any(p is q for q in found)]
        rate = self.c.hyper["lr"] if isinstance(self.c.hyper["lr"], float) else 0.1
        return {
            "whole": None,
            "list": list(net.parameters()),
            "named": list(net.named_parameters()),
            "two": [{"params": found[:1], "lr": rate / 10}, {"params": [*found[1:], *others]}],
            "constrained only": found,
            "bad": [{"params": found, "lr": -1.0}, {"params": others}],
        }[self.c.groups]

    def start_over(self) -> None:
        """What belongs to a pair of model and optimizer: schedule and scaler."""
        self.starts = [w.detach().clone() for w in self.model.weights()]
        self.schedule_from(0)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=self.c.style.startswith("scaler"))

    def schedule_from(self, step: int) -> None:
        """A schedule for the optimizer, from a step on."""
        factor, last = partial(scheduled, steps=self.c.steps), step - 1 if step else -1
        on = self.c.schedule
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor, last_epoch=last) if on else None

    # --- steps ---

    def loss(self, step: int, model: Net | None = None) -> Tensor:
        """What pulls the weights at a step, those of a copy of the model where one is given."""
        model = model or self.model
        pull, chosen = LOSSES[self.c.loss], torch.Generator().manual_seed(step)
        if pull is None:
            with torch.autocast("cpu", dtype=torch.bfloat16) if self.c.style == "autocast" else nullcontext():
                total = model(self.c.seed)
        else:
            share = self.c.active if all(p.requires_grad for p in model.parameters()) else 1.0  # some may be frozen
            terms = [
                pull(w, start, self.c.seed + k)
                for k, (w, start) in enumerate(zip(model.weights(), self.starts, strict=True))
                if torch.rand((), generator=chosen) < share or k == step % len(self.starts)
            ]
            total = torch.stack(terms).sum()
        return self.c.size * total + stiefel.penalty(model)

    def step(self, number: int, factor: float = 1.0) -> None:
        """One step, and all checks of it; a spoilt one has a loss that is NaN or infinite."""
        spoilt = not math.isfinite(factor)
        before = [p.detach().clone() for p in self.model.parameters()]
        try:
            self.take(number, factor)
        except stiefel.DivergenceError as error:
            self.check_divergence(before, error, spoilt)
            self.optimizer.zero_grad()
            return
        skips = self.scaler.is_enabled()
        seen = [w.parameter.grad for w in constrained_weights(self.model) if w.parameter.grad is not None]
        if spoilt and not skips and not all(g.isfinite().all() for g in seen):
            raise Fault("a gradient that is NaN or infinite is stepped without a word", self.c.method)
        if self.overflowed and not skips:
            raise Fault("trains on from a parameter that is NaN or infinite")
        kept = all(map(same, self.gradients, self.user_gradients()))
        if type(self.optimizer) not in OPTIMIZERS.values() and not kept:  # torch's own do so, with nesterov and foreach
            raise Fault("step() changes the user's gradient")
        if spoilt and skips and not all(map(torch.equal, before, self.model.parameters())):
            raise Fault("a step that the scaler skips moves a weight", self.c.method)
        if self.schedule is not None:
            self.schedule.step()
        self.check_weights({id(p): p.detach() - old for p, old in zip(self.model.parameters(), before, strict=True)})

    def take(self, number: int, factor: float) -> None:
        """The step as the configuration's style has it."""
        style = self.c.style

        def closure() -> Tensor:
            self.optimizer.zero_grad(set_to_none=not self.c.keep)
            parts = 2 if style == "accumulate" else 1
            for _ in range(parts):
                loss = self.loss(number) * (factor / parts)
                self.scaler.scale(loss).backward()
            if "clip" in style:
                self.scaler.unscale_(self.optimizer)
                # torch's foreach functions take no gradient that is a conjugate yet to be taken
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=False)
            self.gradients = self.user_gradients()
            self.longest = max([self.longest, *(size(p.grad) for p in self.model.parameters() if p.grad is not None)])
            return loss

        if style == "closure":
            self.optimizer.step(closure)
            return
        closure()
        self.scaler.step(self.optimizer)
        if self.scaler.is_enabled():
            self.scaler.update()

    def user_gradients(self) -> list[Tensor | None]:
        """Copies of the constrained weights' gradients; none where torch's scaler is to unscale them in place."""
        if self.c.style == "scaler":
            return []
        found = [w.parameter.grad for w in constrained_weights(self.model)]
        return [None if g is None else g.detach().clone() for g in found]

    def happen(self, event: str, step: int) -> None:
        """Something between two steps, none of which may change a weight but as it says."""
        name, *arguments = event.split()
        kept = [w.detach().clone() for w in self.model.weights()]
        EVENTS[name](self, step, *arguments)
        if name in MOVES:
            return
        for old, new in zip(kept, self.model.weights(), strict=True):
            moved = name == "load" and self.beyond  # to the nearest point of the set, as a warning tells
            if name == "project":
                moved = not self.feasible() or torch.allclose(old, new, rtol=1e-5, atol=1e-5)
            if not (moved or same(old, new)):
                raise Fault(f"{name} changes a weight", f"by {(old - new).abs().max():.1e}")

    # --- what is looked at ---

    def feasible(self) -> bool:
        """Whether all weights have stayed where their method promises to hold them to rounding."""
        return not self.beyond and all(w.binding.constraint.feasible for w in constrained_weights(self.model))

    def check_weights(self, moved: dict[int, Tensor]) -> None:
        """Every weight is finite, and where its method promises."""
        for found in constrained_weights(self.model):
            method, claim, p = found.binding.constraint, found.binding.constraint.claim, found.parameter
            within = claim is not None and self.is_within(claim, found, moved.get(id(p)))
            self.beyond = self.beyond or not within
            trained = [p] if found.parametrization is None else [p, *found.parametrization.parameters()]
            self.longest = max(self.longest, *map(size, trained))
            broken = not all(t.isfinite().all() for t in [*trained, found.value])
            cubed = isinstance(method, Penalized) and found.parametrization is not None
            if broken and method.place != "step" and self.longest >= (CUBED * method.fixed_scale if cubed else EXTREME):
                self.overflowed = True
                continue
            if broken:
                where = "within" if within else "beyond" if claim is not None else "without"
                raise Fault(f"NaN: {method.name}, {where} a claim", f"{found.name} of {method}")
            if within and not self.beyond and not found.allows(found.residual()):
                raise Fault(f"off its claim: {method.name}", f"{found.name} of {method} by {found.residual():.1e}")

    def is_within(self, claim: Claim, found: ConstrainedWeight, moved: Tensor | None) -> bool:
        """Whether a step was one that the claim speaks of: its rate, in units of X, at gradients of unit norm."""
        groups = [g for g in self.optimizer.param_groups if any(found.parameter is p for p in g["params"])]
        if not groups or (claim.optimizers and self.c.optimizer not in claim.optimizers):
            return not groups
        g, rate, scale = found.parameter.grad, float(groups[0]["lr"]), min(1.0, found.binding.constraint.fixed_scale)
        length = rate * max(1.0, 0.0 if g is None else size(g))
        self.longest = max(self.longest, length)
        if moved is not None and isinstance(found.binding.constraint, Reparameterization):
            # ten times a unit gradient by momentum, or a unit step in every entry by normalization
            length = max(length, size(moved) / max(10.0, found.parameter.numel() ** 0.5) / 1.01)
        return claim.rates[0] <= rate and length / scale <= claim.rates[1]

    def check_divergence(self, before: list[Tensor], error: stiefel.StiefelError, spoilt: bool) -> None:
        """A divergence is told before a weight changes, by a weight's name, and only where there is one."""
        if not is_named(error, (), self.c.optimizer, self.c.names):
            raise Fault("a DivergenceError that names nothing", str(error))
        if "max_eval" in self.optimizer.defaults:  # it calls its closure several times, between which it moves weights
            raise error
        held = {id(w.parameter) for w in constrained_weights(self.model)}  # where a step overflows, the free ones step
        pairs = [(old, p) for old, p in zip(before, self.model.parameters(), strict=True) if id(p) in held]
        if not self.overflowed and not all(torch.equal(old, p) for old, p in pairs):
            raise Fault("a divergence is told after a weight has changed", str(error))
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        methods = [found.binding.constraint for found in constrained_weights(self.model)]
        pulled = any(isinstance(m, Penalty) and m.lifts for m in methods)  # stable for lr · strength < ¼ alone
        if not (spoilt or pulled or self.longest >= EXTREME or not all(g.isfinite().all() for g in gradients)):
            raise Fault("a divergence is told where there is none", f"{error} (largest step {self.longest:.1e})")
        if not spoilt:
            raise error


def scheduled(step: int, steps: int) -> float:
    """A rate's factor, from 1 to 0."""
    return max(0.0, 1 - step / steps)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are equal bit by bit, where NaN equals itself."""
    if a is None or b is None:
        return a is b
    return torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def size(a: Tensor) -> float:
    """The norm, also where squares overflow."""
    wide = a.detach().to(torch.complex128 if a.is_complex() else torch.float64)
    return torch.linalg.vector_norm(wide).item()
