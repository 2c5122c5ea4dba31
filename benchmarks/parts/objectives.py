"""Objectives without a network, with their optima: in closed form, or the best that is found from many starts.

Each is a public report's job, rebuilt from its description (docs/jobs.md). Weights are ``(*batch, p, n)`` with
orthonormal rows, in float64; all are minimized.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

import stiefel

DOUBLE = torch.float64
STARTS = 100
"""How many random starts stand for an optimum that no formula gives."""
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """What is minimized.

    Args:
        name: of the job.
        shapes: of the weights, by name.
        loss: of the weights.
        optimum: the least value, where a formula gives it.
        dtype: of the weights.
        determinant: of square real weights; None for either.
        subspace: whether only the span of the rows matters.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    loss: Callable[[Weights], Tensor]
    optimum: float | None = None
    dtype: torch.dtype = DOUBLE
    determinant: int | None = None
    subspace: bool = False

    def start(self, seed: int = 0) -> Weights:
        """Random weights on their sets, the same for all solvers."""
        random = torch.Generator().manual_seed(seed)
        drawn = {k: torch.randn(s, generator=random, dtype=self.dtype) for k, s in self.shapes.items()}
        return {k: stiefel.orthogonalize(v, determinant=self.determinant) for k, v in drawn.items()}

    def module(self, method: str, start: Weights) -> nn.ParameterDict:
        """The weights as a module, held by a method on the whole set."""
        net = nn.ParameterDict({name: value.clone() for name, value in start.items()})
        options = {**stiefel.get(method).comparison, "determinant": self.determinant, "subspace": self.subspace}
        stiefel.constrain(net, stiefel.get(method, **options), layers=list(start))
        return net

    def of(self, net: nn.ParameterDict) -> Callable[[], Tensor]:
        """The loss as a function of a module's weights."""
        return lambda: self.loss({name: net[name] for name in self.shapes})

    @cached_property
    def best(self) -> float:
        """The optimum, or the least value found from :data:`STARTS` starts."""
        if self.optimum is not None:
            return self.optimum
        found = []
        for seed in range(1, STARTS + 1):
            net = self.module("retraction", self.start(seed))
            found.append(stiefel.minimize(net, self.of(net)).loss)
        return min(found)

    def gradient_norm(self, weights: Weights) -> float:
        """‖P_X(G)‖_F at weights that any solver has found."""
        net = self.module("retraction", weights)
        return stiefel.gradient_norm(net, self.of(net))


def gaussian(*shape: int, seed: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def spectrum(values: Tensor, seed: int) -> Tensor:
    """A symmetric matrix with given eigenvalues."""
    q = torch.linalg.qr(gaussian(len(values), len(values), seed=seed))[0]
    return (q * values) @ q.mT


def _pca() -> Objective:
    values = torch.logspace(0, -2, 60, dtype=DOUBLE)
    a = spectrum(values, seed=1)
    return Objective(
        "leading subspace, 12 of 60",
        {"W": (12, 60)},
        lambda w: -((w["W"] @ a) * w["W"]).sum(),
        -float(values[:12].sum()),
        subspace=True,
    )


def _trace_ratio() -> Objective:
    a, b = (gaussian(20, 20, seed=s) for s in (1, 2))
    a, b, rho = a @ a.mT, b @ b.mT + torch.eye(20, dtype=DOUBLE), 0.0
    for _ in range(100):  # Newton's method on the sum of the largest eigenvalues of A − ρB (Ngo et al. 2012)
        v = torch.linalg.eigh(a - rho * b)[1][:, -3:]
        rho = float((v.mT @ a @ v).trace() / (v.mT @ b @ v).trace())
    return Objective(
        "trace ratio, 3 of 20",
        {"W": (3, 20)},
        lambda w: -((w["W"] @ a) * w["W"]).sum() / ((w["W"] @ b) * w["W"]).sum(),
        -rho,
        subspace=True,
    )


def _ica() -> Objective:
    signs = gaussian(10, 2000, seed=1)
    sources = signs.sign() * signs.abs() ** 1.5  # heavier tails than a Gaussian
    mixed = gaussian(10, 10, seed=2) @ sources
    mixed = mixed - mixed.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh(mixed @ mixed.mT / 2000)
    white = (vectors * values.rsqrt()) @ vectors.mT @ mixed
    return Objective(
        "independent components, 10", {"W": (10, 10)}, lambda w: torch.log(torch.cosh(w["W"] @ white)).mean(1).sum()
    )


def _localized() -> Objective:
    modes = torch.linalg.qr(gaussian(27, 9, seed=1))[0].unflatten(0, (9, 3))  # atoms, coordinates, modes

    def loss(w: Weights) -> Tensor:
        return -torch.einsum("acm,nm->acn", modes, w["U"]).square().sum(1).square().sum()

    return Objective("localized modes, 9", {"U": (9, 9)}, loss)


def _orbitals() -> Objective:
    grid = 80
    kinetic = 2 * torch.eye(grid, dtype=DOUBLE)
    kinetic -= torch.diag(torch.ones(grid - 1, dtype=DOUBLE), 1) + torch.diag(torch.ones(grid - 1, dtype=DOUBLE), -1)
    place = torch.linspace(-1, 1, grid, dtype=DOUBLE)
    potential = 3 * place.square()

    def loss(w: Weights) -> Tensor:
        density = w["X"].square().sum(0)
        return ((w["X"] @ kinetic) * w["X"]).sum() * 20 + (potential * density).sum() + 5 * density.square().sum()

    return Objective("orbitals, 6 on 80 points", {"X": (6, 80)}, loss, subspace=True)


def _gates() -> Objective:
    target = torch.linalg.qr(gaussian(200, 4, 4, seed=1, dtype=torch.complex128))[0]

    def loss(w: Weights) -> Tensor:
        return (16 - (w["U"] * target.conj()).sum((-2, -1)).abs().square()).sum()

    return Objective("200 unitary gates, 4×4", {"U": (200, 4, 4)}, loss, 0.0, dtype=torch.complex128)


def _rotations() -> Objective:
    points, noise = gaussian(40, 10, 3, seed=1), 1e-3 * gaussian(40, 10, 3, seed=2)
    true = stiefel.orthogonalize(gaussian(40, 3, 3, seed=3), determinant=1)
    seen = points @ true.mT + noise
    cross = seen.mT @ points
    nearest = stiefel.orthogonalize(cross, determinant=1)
    optimum = float((seen - points @ nearest.mT).square().sum())
    return Objective(
        "40 rotations, 3×3",
        {"R": (40, 3, 3)},
        lambda w: (seen - points @ w["R"].mT).square().sum(),
        optimum,
        determinant=1,
    )


def _correlations() -> Objective:
    x, y = gaussian(8, 500, seed=1), gaussian(6, 500, seed=2)
    y[:3] += x[:3]
    white = [torch.linalg.qr(z.mT)[0] for z in (x, y)]
    cross = white[0].mT @ white[1]
    return Objective(
        "canonical correlations, 3",
        {"U": (3, 8), "V": (3, 6)},
        lambda w: -((w["U"] @ cross) * w["V"]).sum(),
        -float(torch.linalg.svdvals(cross)[:3].sum()),
    )


def _unbalanced() -> Objective:
    u, v = (torch.linalg.qr(gaussian(n, 30, seed=s))[0] for n, s in ((60, 1), (30, 2)))
    a = (u * torch.logspace(0, -3, 30, dtype=DOUBLE)) @ v.mT
    b = a @ torch.linalg.qr(gaussian(30, 6, seed=3))[0] + 0.01 * gaussian(60, 6, seed=4)
    return Objective("Procrustes, condition 1e3", {"X": (6, 30)}, lambda w: (a @ w["X"].mT - b).square().sum())


MAKERS = (_pca, _trace_ratio, _ica, _localized, _orbitals, _gates, _rotations, _correlations, _unbalanced)


def objectives() -> list[Objective]:
    """All of them."""
    return [make() for make in MAKERS]
