"""Weights of known spectra and single steps, for the tests of traps."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest
import torch
from common import forms
from torch import Tensor, nn

import stiefel

EPS = torch.finfo(torch.float64).eps


VARIANTS = [m for name in stiefel.available() for m in forms(name, **stiefel.get(name).comparison)]
"""Every method, uncentred so that all have one set, and every form of it that has a name."""


HELD = [m for m in VARIANTS if m.claim is not None]


FORWARD = [m for m in VARIANTS if m.place == "forward"]


HELD_FORWARD = [m for m in FORWARD if m.claim is not None]


IN_PLACE = [m for m in VARIANTS if m.place != "forward"]


STEPPED = [m for m in VARIANTS if m.place == "step"]


LIFTED = [m for m in STEPPED if m.lifts]


MANIFOLD = [m for m in STEPPED if isinstance(m, stiefel.ManifoldMethod)]


PENALTIES = [m for m in VARIANTS if m.place == "loss"]


SHAPES = {"wide": (3, 5), "square": (4, 4), "tall": (5, 3)}
"""Of weights: orthonormal rows, both, orthonormal columns."""


def over(name: str, methods: list[stiefel.Constraint]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(name, methods, ids=str)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def orthonormal(out: int, inputs: int, seed: int = 0) -> Tensor:
    """A random weight with orthonormal rows or columns, whichever are fewer."""
    u, _, vh = torch.linalg.svd(gaussian(out, inputs, seed=seed), full_matrices=False)
    return u @ vh


def with_singular_values(out: int, inputs: int, low: float, high: float, seed: int = 0) -> Tensor:
    u, _, vh = torch.linalg.svd(gaussian(out, inputs, seed=seed), full_matrices=False)
    return (u * torch.linspace(low, high, min(out, inputs), dtype=u.dtype)) @ vh


def linear(
    weight: Tensor, method: stiefel.Constraint, dtype: torch.dtype = torch.float64, scale: float | None = None
) -> nn.Linear:
    """A Linear layer without a bias whose weight was ``weight`` before it was constrained."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return stiefel.constrain(layer, method if scale is None else replace(method, scale=scale))


def trained_tensor(layer: nn.Module) -> Tensor:
    """What the optimizer steps in the place of the weight: itself, or its proxy."""
    return layer.parametrizations.weight.original if hasattr(layer, "parametrizations") else layer.weight


def residual(weight: Tensor, scale: float = 1.0) -> float:
    """‖XXᵀ − I‖_F/√p on the smaller side, the worst of a batch, by definition."""
    x = weight.detach().double() / scale
    x = x if x.shape[-2] <= x.shape[-1] else x.mT
    gram = x @ x.mT - torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    return (torch.linalg.matrix_norm(gram).max() / x.shape[-2] ** 0.5).item()


def holds(method: stiefel.Constraint, weight: Tensor, scale: float = 1.0) -> bool:
    """Whether a weight is as orthogonal as its method claims."""
    return method.claim.allows(residual(weight, scale), weight.dtype, min(weight.shape[-2:]))


def sym(a: Tensor) -> Tensor:
    return (a + a.mT) / 2


def skew(a: Tensor) -> Tensor:
    return (a - a.mT) / 2


def step_once(layer: nn.Module, cls: type[torch.optim.Optimizer], gradient: Tensor, **hyper: Any) -> Tensor:
    """The weight after one step of a new optimizer on an in-place constrained weight."""
    optimizer = stiefel.optimizer(layer, cls, **hyper)
    layer.weight.grad = gradient.clone()
    torch.manual_seed(0)  # a method may draw
    optimizer.step()
    return layer.weight.detach().clone()


def adam_with_decay(method: stiefel.Constraint) -> type[torch.optim.Optimizer]:
    """AdamW where the method takes it; geoopt's Adam has no decoupled decay."""
    return torch.optim.Adam if isinstance(method, stiefel.ManifoldMethod) else torch.optim.AdamW


def tangent(x: Tensor, seed: int) -> Tensor:
    u = gaussian(*x.shape, seed=seed)
    u = u - sym(u @ x.mT) @ x
    return u / u.norm()


def bfloat16() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def pogo_optimizer(*weights: nn.Parameter, momentum: float = 0.0, lr: float = 0.1) -> torch.optim.Optimizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pogo import base, pogo
    return pogo.POGO(list(weights), base.SGD(momentum=momentum), lr=lr)
