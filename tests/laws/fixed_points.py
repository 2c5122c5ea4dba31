"""Problems whose solutions are known, every layout among them, and what a method does when it starts at one.

The law: a weight at a stationary point of the constrained problem, P_X(∂L/∂X) = 0, stays there under every optimizer;
and with a rate that decays to zero, training ends there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from common import on_common_set
from torch import Tensor, nn

import stiefel
from stiefel.attach.weights import constrained_weights
from stiefel.constraint import Constraint
from stiefel.layout import Layout

Weights = dict[str, Tensor]


# --- objectives, as functions of points (b, p, n) with their maximizers ---


def _random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pca(b: int, p: int, n: int, *, repeated: bool, dtype: torch.dtype, seed: int) -> tuple[Callable, Tensor]:
    """``½ tr(X C Xᴴ)``, largest at the eigenvectors of the p largest eigenvalues, in any basis of their space."""
    q = torch.linalg.qr(_random(b, n, n, seed=seed, dtype=dtype))[0]
    values = torch.linspace(1.0, 0.1, n, dtype=torch.float64)
    if repeated:  # in pairs, and none across the boundary between the p largest and the others
        values = values.clone()
        values[1:p:2] = values[0 : p - p % 2 : 2][: len(values[1:p:2])]
        values[p + 1 :: 2] = values[p : n - (n - p) % 2 : 2][: len(values[p + 1 :: 2])]
    c = (q * values) @ q.mH
    return lambda x: 0.5 * ((x @ c.to(x.device)) * x.conj()).real.sum((-2, -1)), q.mH[:, :p]


def procrustes(b: int, p: int, n: int, *, dtype: torch.dtype, seed: int) -> tuple[Callable, Tensor]:
    """``Re⟨X, T⟩`` with a noisy T, largest at its polar factor."""
    t = stiefel.manifold.geometry.random_stiefel(b, p, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    t = t + 0.3 * _random(b, p, n, seed=seed + 1, dtype=dtype) / n**0.5
    u, _, vh = torch.linalg.svd(t, full_matrices=False)
    return lambda x: (x * t.to(x.device).conj()).real.sum((-2, -1)), u @ vh


@cache
def ica(p: int, *, samples: int = 400, seed: int = 0) -> tuple[Callable, Tensor, Callable]:
    """``−E log cosh(X z)`` of whitened mixtures z of p heavy-tailed sources: a contrast of FastICA.

    Its maximizer has no closed form: it is FastICA's fixed point (Hyvärinen 1999, symmetric, one Newton step each),
    which is computed independently of this library to rounding; the last of what is returned does so from any point.
    """
    sources = _random(p, samples, seed=seed).sign() * _random(p, samples, seed=seed + 1).abs() ** 2
    z = _random(p, p, seed=seed + 2) @ sources
    z = z - z.mean(1, keepdim=True)
    vh = torch.linalg.svd(z, full_matrices=False).Vh
    z = vh * samples**0.5
    x = torch.linalg.qr(_random(1, p, p, seed=seed + 3))[0]

    def contrast(x: Tensor) -> Tensor:
        y = x @ z.to(x.device)
        return -(torch.logaddexp(y, -y).mean(-1).sum(-1))

    return contrast, fast_ica(x, z), lambda x: fast_ica(x, z)


def fast_ica(x: Tensor, z: Tensor, steps: int = 300) -> Tensor:
    """Symmetric FastICA with tanh from X."""
    for _ in range(steps):
        y = x @ z
        g = torch.tanh(y)
        u, _, vh = torch.linalg.svd(g @ z.mT / z.shape[-1] - (1 - g * g).mean(-1, keepdim=True) * x)
        new = u @ vh
        x = new * torch.sgn((new * x).sum(-1, keepdim=True))
    return x


def product(p: int, n: int, m: int, seed: int) -> tuple[Callable, Tensor, Tensor]:
    """``tr(X₂ X₁ M)``, M n×m: two manifolds, each of which moves the other's gradient. Largest at M's singular vectors.

    The last p − m rows of X₁ are free: the solutions are a manifold.
    """
    u, s, vh = torch.linalg.svd(_random(n, m, seed=seed), full_matrices=True)
    matrix = (u[:, :m] * s / s[0]) @ vh
    first, second = u.mT[None, :p], torch.cat([vh.mT, torch.zeros(m, p - m, dtype=u.dtype)], dim=1)[None]
    return lambda x1, x2: (x2 @ x1 @ matrix.to(x1.device)).diagonal(dim1=-2, dim2=-1).sum(-1), first, second


# --- a model of them ---


@dataclass(frozen=True)
class Objective:
    """What to maximize, as a function of the points of the weights named, and points at which it is largest.

    Where there are several local ones, ``nearest`` gives the one to which a point belongs.
    """

    value: Callable[..., Tensor]
    names: tuple[str, ...]
    solution: tuple[Tensor, ...]
    nearest: Callable[[Tensor], Tensor] | None = None


def objectives(dtype: torch.dtype, layouts: dict[str, Layout]) -> list[Objective]:
    """One for each weight of :class:`Solved`, or for two of them."""
    shapes = {name: layout.matrix_shape for name, layout in layouts.items()}
    found = []
    for k, (name, repeated) in enumerate({"rows": False, "columns": True, "conv": False, "stack": True}.items()):
        if name in shapes:
            value, x = pca(*shapes[name], repeated=repeated, dtype=dtype, seed=7 * k)
            found.append(Objective(value, (name,), (x,)))
    for k, name in enumerate(["split", *(["one"] if dtype.is_complex else [])]):
        value, x = procrustes(*shapes[name], dtype=dtype, seed=50 + 10 * k)
        found.append(Objective(value, (name,), (x,)))
    if not dtype.is_complex:
        value, x, nearest = ica(shapes["one"][1])
        found.append(Objective(value, ("one",), (x,), nearest))
        value, x1, x2 = product(*shapes["first"][1:], shapes["second"][1], seed=70)
        found.append(Objective(value, ("first", "second"), (x1, x2)))
    return found


class Solved(nn.Module):
    """Weights of every layout, which sum up to a problem whose solution is known.

    Args:
        method: what holds them.
        dtype: float64 or complex128; complex models lack the objectives that have no complex form here.
        scale: of the set.
        matrices: weights of two dimensions only, for base optimizers that take no others.
        device: where its weights are; what is measured is on the CPU.
    """

    def __init__(
        self,
        method: Constraint,
        dtype: torch.dtype = torch.float64,
        scale: float = 1.0,
        *,
        matrices: bool = False,
        device: str = "cpu",
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        shapes = {"rows": (4, 12), "columns": (12, 4), "split": (6, 8), "one": (6, 6)}
        if not dtype.is_complex:
            shapes |= {"first": (5, 9), "second": (3, 5)}
        for name, (out, fan_in) in shapes.items():
            setattr(self, name, nn.Linear(fan_in, out, bias=False, dtype=dtype))
        self.tied = nn.Linear(6, 6, bias=False, dtype=dtype)
        self.tied.weight = self.one.weight
        if not matrices:
            self.conv = nn.Conv2d(2, 4, 3, bias=False, dtype=dtype)
            self.stack = nn.Parameter(torch.randn(3, 3, 7, dtype=dtype))
        self.to(device)
        method = replace(on_common_set(method), scale=scale)
        stiefel.constrain(self, replace(method, group_size=3), layers="split")
        stiefel.constrain(self, method, layers=[*(set(shapes) - {"split"}), *([] if matrices else ["conv", "stack"])])
        self.found = {w.name.removesuffix(".weight"): w for w in constrained_weights(self)}
        self.objectives = objectives(dtype, {name: w.binding.layout for name, w in self.found.items()})
        self.best = torch.cat([o.value(*o.solution) for o in self.objectives])

    @torch.no_grad()
    def solve(self) -> Solved:
        """Put every weight at its solution."""
        for objective in self.objectives:
            for name, x in zip(objective.names, objective.solution, strict=True):
                found = self.found[name]
                weight = found.binding.layout.weight(x).to(found.parameter.device)
                if found.parametrization is None:
                    found.parameter.copy_(weight)
                else:
                    setattr(found.owner, found.tensor, weight)
        return self

    def points(self) -> Weights:
        """All weights as ``(b, p, n)``."""
        return {name: w.binding.layout.points(getattr(w.owner, w.tensor)) for name, w in self.found.items()}

    def values(self) -> Tensor:
        """Of all objectives, a number for each matrix."""
        points = self.points()
        return torch.cat([o.value(*(points[name] for name in o.names)) for o in self.objectives])

    def loss(self) -> Tensor:
        """What is minimized: at every scale with the curvature of scale 1, so that a rate means the same."""
        scale = next(iter(self.found.values())).binding.layout.scale
        return -(scale**2) * self.values().sum() + stiefel.penalty(self)

    @torch.no_grad()
    def gap(self) -> float:
        """The largest relative distance of an objective from its value at the solution."""
        return float(((self.best - self.values().cpu()) / self.best).abs().max())

    @torch.no_grad()
    def shortfall(self) -> Tensor:
        """How far each objective is below its best, relatively; a contrast, below the local one that is nearest."""
        points = {name: x.cpu() for name, x in self.points().items()}
        best = [
            o.value(*o.solution) if o.nearest is None else o.value(o.nearest(points[o.names[0]]))
            for o in self.objectives
        ]
        return (torch.cat(best) - self.values().cpu()) / torch.cat(best).abs()


# --- base optimizers ---

REFUSED = ("LBFGS", "SparseAdam")
"""Neither takes dense gradients once a step: one evaluates the loss several times, the other wants sparse rows."""
RATES = {"SGD": 0.1, "ASGD": 0.1, "Adadelta": 0.3}
ADAPTIVE = 1e-2
"""The rate of all others, whose steps are about that long whatever the gradient."""


def bases() -> list[tuple[type[torch.optim.Optimizer], dict[str, Any]]]:
    """Every dense optimizer that torch ships, in the forms that differ in what they keep of a gradient."""
    found: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = []
    for name, cls in vars(torch.optim).items():
        known = isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
        if known and cls is not torch.optim.Optimizer and name not in REFUSED:
            found.append((cls, {}))
            if "momentum" in inspect.signature(cls).parameters:
                found.append((cls, {"momentum": 0.9}))
            if "nesterov" in inspect.signature(cls).parameters:
                found.append((cls, {"momentum": 0.9, "nesterov": True}))
    return found


def decays(cls: type[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    """The forms of weight decay that an optimizer has, none of them first."""
    options = inspect.signature(cls).parameters
    if "weight_decay" not in options:
        return [{}]
    found: list[dict[str, Any]] = [{"weight_decay": 0.0}, {"weight_decay": 0.1}]
    return (
        [*found, {"weight_decay": 0.1, "decoupled_weight_decay": True}]
        if "decoupled_weight_decay" in options
        else found
    )


def rate(method: Constraint, cls: type[torch.optim.Optimizer]) -> float:
    """A rate at which the fastest of a method's directions is stable.

    Of methods without (a, b), maps from a fixed start may move eight times as far as the step that is projected, and
    one that moves a share of the coordinates moves less far on average.
    """
    lr = RATES.get(cls.__name__, ADAPTIVE)
    if method.coefficients is None and not (method.caveat or method.step_length):
        return 4 * lr
    fastest = 8.0 if method.caveat else max(method.coefficients or (1.0,))
    return lr / max(1.0, fastest / 2) if cls.__name__ in RATES else lr


def optimizer(
    model: Solved, method: Constraint, cls: type[torch.optim.Optimizer], **hyper: Any
) -> torch.optim.Optimizer:
    """The base optimizer for a model; :class:`stiefel.OptimizerError` where the method cannot have it."""
    return stiefel.optimizer(model, cls, lr=rate(method, cls), **hyper)


# --- the two halves of the law ---


def departure(
    method: Constraint,
    cls: type[torch.optim.Optimizer],
    hyper: dict[str, Any],
    steps: int,
    dtype: torch.dtype = torch.float64,
    scale: float = 1.0,
    device: str = "cpu",
) -> float:
    """How far a model gets from its solution, where it starts, within some steps: the largest gap on the way."""
    model = Solved(method, dtype, scale, matrices=cls.__name__ == "Muon", device=device).solve()
    opt, gap = optimizer(model, method, cls, **hyper), 0.0
    for step in range(steps):
        torch.default_generator.manual_seed(step)  # for methods that draw, as for dropout
        opt.zero_grad()
        model.loss().backward()
        opt.step()
        if step % 5 == 4:
            gap = max(gap, model.gap())
    return gap
