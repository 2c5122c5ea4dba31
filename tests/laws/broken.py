"""Methods that are wrong on purpose, each in one way, and the checks of the conformance suite that must reject them.

Most are a correct projection or polar map with one fault, of a kind that was found in released code or is easily made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stiefel.constraint import Claim, Constraint, Penalty, Reparameterization, StepMethod
from stiefel.layout import Layout
from stiefel.linalg import gram_residual, householder_rows, householder_vectors, nearest_orthonormal, polar, qf
from stiefel.manifold.geometry import canonical_gradient, project_tangent

BROKEN: dict[type[Constraint], tuple[str, ...]] = {}
"""Each broken method, and the checks that reject it."""


def rejected_by(*checks: str):
    """Enter a method here; it is never registered in the catalogue."""

    def enter(cls: type[Constraint]) -> type[Constraint]:
        cls.name, cls.summary, cls.reference = cls.__name__.lower(), "wrong on purpose", "none"
        BROKEN[dataclass(frozen=True, kw_only=True)(cls)] = checks
        return cls

    return enter


class Step(StepMethod):
    """What a correct one would be."""

    claim = Claim()
    coefficients = (1.0, 1.0)

    def step(self, x: Tensor, displacement: Tensor, lr: float) -> Tensor:
        return nearest_orthonormal(x + displacement)


class Map(Reparameterization):
    """What a correct one would be."""

    claim = Claim(rates=(0, 0.1))
    coefficients = (1.0, 1.0)

    def forward(self, proxy: Tensor, layout: Layout) -> Tensor:
        return polar(proxy)


@rejected_by("law")
class Transposed(Step):
    """Reads the displacement of a matrix as that of its transpose."""

    def step(self, x: Tensor, displacement: Tensor, lr: float) -> Tensor:
        return nearest_orthonormal(x + displacement.mT.reshape(x.shape))


@rejected_by("law")
class Unscaled(Step):
    """Divides the gradient, not the displacement, by the scale: the learning rate depends on it."""

    def step(self, x: Tensor, displacement: Tensor, lr: float) -> Tensor:
        return nearest_orthonormal(x + displacement * self.fixed_scale)


@rejected_by("descent", "law")
class WrongSign(Step):
    """Ascends."""

    def step(self, x: Tensor, displacement: Tensor, lr: float) -> Tensor:
        return nearest_orthonormal(x - displacement)


@rejected_by("claim", "descent")
class Drifts(Step):
    """Steps along the tangent space and never comes back."""

    def step(self, x: Tensor, displacement: Tensor, lr: float) -> Tensor:
        return x + project_tangent(x, displacement)


@rejected_by("momentum")
class ForgetsMomentum(Step):
    """Takes away the part of the displacement that the last one had already."""

    last: ClassVar[dict[torch.Size, Tensor]] = {}

    def step(self, x: Tensor, displacement: Tensor, lr: float) -> Tensor:
        fresh = displacement - 0.9 * self.last.get(x.shape, torch.zeros_like(x))
        self.last[x.shape] = displacement
        return nearest_orthonormal(x + fresh)


@rejected_by("gradient")
class NaNAtTheStart(Map):
    """Differentiates through eigh, whose 1/(λ_i − λ_j) is infinite at an orthonormal proxy."""

    def forward(self, proxy: Tensor, layout: Layout) -> Tensor:
        values, d = torch.linalg.eigh(proxy @ proxy.mT)
        return d @ ((d.mT @ proxy) / values.sqrt().unsqueeze(-1))


@rejected_by("start", "descent")
class IgnoresGroups(Step):
    """Takes all matrices of a weight for one."""

    def nearest(self, points: Tensor, layout: Layout) -> Tensor:
        flat = points.reshape(-1, points.shape[-1])
        flat = nearest_orthonormal(flat) if flat.shape[0] <= flat.shape[1] else nearest_orthonormal(flat.mT).mT
        return flat.reshape(points.shape)

    def step(self, x: Tensor, displacement: Tensor, lr: float) -> Tensor:
        return self.nearest(x + displacement, None)


@rejected_by("memory")
class BuildsSquares(Step):
    """Rotates by an n×n exponential, whatever p is."""

    def step(self, x: Tensor, displacement: Tensor, lr: float) -> Tensor:
        a = x.mH @ displacement
        return nearest_orthonormal(x @ torch.linalg.matrix_exp((a - a.mH) / 2))


@rejected_by("start")
class StartsElsewhere(Map):
    """Starts at an orthonormal matrix, but not the nearest one."""

    def nearest(self, points: Tensor, layout: Layout) -> Tensor:
        return qf(points)


@rejected_by("gradient")
class ForgetsHalfTheGradient(Map):
    """Treats the inverse square root as a constant."""

    def forward(self, proxy: Tensor, layout: Layout) -> Tensor:
        with torch.no_grad():
            factor = polar(proxy) @ torch.linalg.pinv(proxy)
        return factor @ proxy


@rejected_by("groups")
class Leaks(Step):
    """Shortens every weight's step by what the longest step of its batch needs, and remembers it."""

    longest: ClassVar[list[float]] = [0.0]

    def step(self, x: Tensor, displacement: Tensor, lr: float) -> Tensor:
        self.longest[0] = max(self.longest[0], displacement.abs().max().item())
        return nearest_orthonormal(x + displacement / (1 + 100 * self.longest[0]))


@rejected_by("late_gradient")
class SharesHistory(Step):
    """Keeps one momentum for all weights of a shape, so that a late one starts with the others' past."""

    mean: ClassVar[dict[torch.Size, Tensor]] = {}

    def step(self, x: Tensor, displacement: Tensor, lr: float) -> Tensor:
        last = self.mean.get(x.shape[1:], torch.zeros_like(x[0]))
        self.mean[x.shape[1:]] = 0.5 * (last + displacement.mean(0))
        return nearest_orthonormal(x + displacement + last)


@rejected_by("release")
class Jitters(Map):
    """Computes another weight each time, so that the one which release leaves is not the one last used."""

    def forward(self, proxy: Tensor, layout: Layout) -> Tensor:
        return polar(proxy * (1 + 1e-3 * torch.rand(proxy.shape[-1], dtype=torch.float64).to(proxy)))


@rejected_by("seed", "resume", "copy")
class NotReproducible(Step):
    """Draws from a generator of its own, which no seed reaches."""

    source: ClassVar[torch.Generator] = torch.Generator()

    def step(self, x: Tensor, displacement: Tensor, lr: float) -> Tensor:
        noise = torch.rand(x.shape[-1], generator=self.source, dtype=torch.float64).to(x)
        return nearest_orthonormal(x + displacement * (0.5 + noise))


@rejected_by("law")
class WrongRate(Step):
    """Says that its metric is Euclidean, and steps along the canonical gradient."""

    def step(self, x: Tensor, displacement: Tensor, lr: float) -> Tensor:
        return nearest_orthonormal(x + canonical_gradient(x, displacement))


@rejected_by("claim")
class Collapses(Map):
    """Keeps ±1 in the trained tensor and truncates it, so that one step of weight decay makes it 0."""

    real_only = True
    decay = "acts"

    def start(self, x: Tensor, layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
        vectors, signs = householder_vectors(x)
        vectors.diagonal(dim1=-2, dim2=-1).copy_(signs)
        return vectors, {}

    def forward(self, proxy: Tensor, layout: Layout) -> Tensor:
        unit = torch.eye(*proxy.shape[-2:], dtype=proxy.dtype)
        signs = proxy.diagonal(dim1=-2, dim2=-1).int().unsqueeze(-1)
        return signs * householder_rows(proxy.triu(1) + unit)


@rejected_by("start", "claim")
class LowPrecision(Map):
    """Iterates in bfloat16."""

    real_only = True

    def forward(self, proxy: Tensor, layout: Layout) -> Tensor:
        x = polar(proxy).bfloat16()
        return (1.5 * x - 0.5 * x @ x.mH @ x).to(proxy.dtype)


@rejected_by("gradient")
class PushesAway(Penalty):
    """A penalty with the wrong sign, as its graph has it."""

    def penalty(self, x: Tensor, layout: Layout) -> Tensor:
        square = gram_residual(x).abs().square().sum(dim=(-2, -1))
        return 2 * square.detach() - square


@rejected_by("gradient")
class NaNPenalty(Penalty):
    """A norm without care: its gradient at an orthonormal weight is 0/0."""

    def penalty(self, x: Tensor, layout: Layout) -> Tensor:
        delta = gram_residual(x)
        delta = delta * (delta.abs() > 1e-10)
        return (delta * delta.conj()).real.sum(dim=(-2, -1)).sqrt()


@rejected_by("law")
class Unaccountable(Step):
    """Steps further in some columns than in others, and says nothing of how far a step goes."""

    coefficients = None

    def step(self, x: Tensor, displacement: Tensor, lr: float) -> Tensor:
        return nearest_orthonormal(x + displacement * torch.linspace(0.5, 2, x.shape[-1], dtype=x.dtype))


@rejected_by("groups")
class IgnoresSmallRates(Step):
    """Takes a slow group's step for nothing."""

    def step(self, x: Tensor, displacement: Tensor, lr: float) -> Tensor:
        return nearest_orthonormal(x + displacement * (lr > 0.01))


@rejected_by("gradient")
class CountsTheFirstOnly(Penalty):
    """Looks at one matrix of a batch."""

    def penalty(self, x: Tensor, layout: Layout) -> Tensor:
        square = gram_residual(x).abs().square().sum(dim=(-2, -1))
        return square * (torch.arange(len(x)) == 0)


@rejected_by("gradient")
class NeverActs(Penalty):
    """Is there, and too weak to matter."""

    def penalty(self, x: Tensor, layout: Layout) -> Tensor:
        return 1e-6 * gram_residual(x).abs().square().sum(dim=(-2, -1))


@rejected_by("fixed_points")
class LiftsTheRawGradient(Step):
    """Lets Adam divide a normal gradient entry by entry: what comes out points along the set."""

    tangent = False


@rejected_by("fixed_points")
class LetsDecayIn(Step):
    """Has the weight decayed as any other, so that Adam's moments get a normal part."""

    decay = "acts"


@rejected_by("fixed_points")
class KeepsNormalMomentum(Step):
    """Gathers raw gradients in a momentum of its own, and takes their normal part to the set by QR, which turns it."""

    tangent = False
    gathered: ClassVar[dict[torch.Size, Tensor]] = {}

    def step(self, x: Tensor, displacement: Tensor, lr: float) -> Tensor:
        self.gathered[x.shape] = 0.9 * self.gathered.get(x.shape, torch.zeros_like(x)) + displacement
        return qf(x + self.gathered[x.shape])
