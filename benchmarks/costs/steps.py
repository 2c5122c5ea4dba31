"""The catalogue of optimizer steps, gradients given. Imports ``cases``, stiefel."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import stiefel
from costs.cases import Candidate, Case, Layers, Work
from costs.maps import PRODUCT, product

LR = 1e-3
"""At gradients with rows of length 1, so that a hundred steps at one gradient stay near the start."""

OURS: dict[str, dict[str, Any]] = {
    "unconstrained": {},
    "riemannian": {},
    "riemannian canonical Cayley": {"metric": "canonical", "retraction": "cayley"},
    "retraction": {},
    "projection": {},
    "landing": {},
    "pogo": {},
    "cayley_sgd": {},
    "momentum_stiefel": {},
    "spel": {},
    "manifold_muon": {},
    "soft": {},
}
"""By name, the first word of which is the method's, with its options."""
STACKED = ("landing", "pogo")
LIFTED = ("retraction", "projection", "landing", "pogo", "spel")
"""Measured with momentum too: a base optimizer with a memory is handed tangent gradients."""


def steps() -> list[Candidate]:
    """All steps; first the unit."""
    found = [Candidate(PRODUCT, "unit", product)]
    found += [Candidate(name, "ours", partial(separate, name=name, **options)) for name, options in OURS.items()]
    found += [Candidate(f"{name}, stacked", "ours", partial(stacked, name=name)) for name in STACKED]
    with_momentum = {"momentum": 0.9}
    found += [Candidate(f"{n}, momentum", "ours", partial(separate, name=n, hyper=with_momentum)) for n in LIFTED]
    for name, canonical in (("geoopt Stiefel", False), ("geoopt CanonicalStiefel", True)):
        found.append(Candidate(name, "geoopt", partial(geoopt_loop, canonical=canonical), "geoopt", True))
    found.append(Candidate("pogo-torch, stacked", "pogo-torch", partial(pogo_torch, one=True), "pogo"))
    return [*found, Candidate("pogo-torch", "pogo-torch", partial(pogo_torch, one=False), "pogo", True)]


class Stacked(nn.Module):
    """All matrices as one parameter."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(x)


def separate(case: Case, name: str, hyper: dict[str, Any] | None = None, **options: Any) -> Work:
    """Ours on one parameter per matrix; ``hyper``: more of SGD's options."""
    model = Layers(case)
    stiefel.constrain(model, name.split()[0], **options)
    return _work(model, list(model.parameters()), list(case.gradients()), **(hyper or {}))


def stacked(case: Case, name: str) -> Work:
    """Ours on one parameter of all matrices."""
    model = Stacked(case.points())
    stiefel.constrain(model, name, layers=["weight"])
    return _work(model, [model.weight], [case.gradients()])


def _work(model: nn.Module, parameters: list[nn.Parameter], gradients: list[Tensor], **hyper: Any) -> Work:
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=LR, **hyper)
    if stiefel.penalty(model).grad_fn is None:
        return _given(optimizer, parameters, gradients)

    def step() -> None:
        """A penalty's gradient is its own; that of the loss would be added to it at the price of one addition."""
        optimizer.zero_grad()
        stiefel.penalty(model).backward()
        optimizer.step()

    return Work(step, partial(_matrices, parameters))


def geoopt_loop(case: Case, canonical: bool) -> Work:
    """geoopt's own optimizer on its own manifold, whose matrices have orthonormal columns."""
    from stiefel.compat.geoopt import geoopt

    manifold = geoopt.Stiefel(canonical=canonical)
    parameters = [geoopt.ManifoldParameter(x.mT.contiguous(), manifold=manifold) for x in case.points()]
    optimizer = geoopt.optim.RiemannianSGD(parameters, lr=LR)
    return _given(optimizer, parameters, [g.mT.contiguous() for g in case.gradients()], columns=True)


def pogo_torch(case: Case, one: bool) -> Work:
    """pogo-torch with plain SGD, on one stacked tensor or on one of 1×p×n per matrix."""
    import pogo
    from pogo.base import SGD

    x, g = case.points(), case.gradients()
    parameters = [nn.Parameter(x)] if one else [nn.Parameter(w[None].clone()) for w in x]
    optimizer = pogo.POGO(parameters, SGD(), lr=LR)
    return _given(optimizer, parameters, [g] if one else [d[None] for d in g])


def _given(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    gradients: list[Tensor],
    *,
    columns: bool = False,
) -> Work:
    """Steps at gradients that stay the same."""
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g.clone()
    return Work(optimizer.step, partial(_matrices, parameters, columns=columns))


def _matrices(parameters: Sequence[Tensor], *, columns: bool = False) -> list[Tensor]:
    x = torch.cat([p.detach().as_subclass(Tensor).reshape(-1, *p.shape[-2:]) for p in parameters])
    return [x.mT if columns else x]
