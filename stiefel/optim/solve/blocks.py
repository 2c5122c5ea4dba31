"""What is solved for: matrices on the Stiefel manifold and free numbers, as blocks of one vector.

A vector is a list with one tensor per block. Lengths are those of weights, in which the Stiefel manifold has the radius
s√p. Imports ``manifold`` and ``linalg``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stiefel.linalg import full_precision, widened
from stiefel.manifold.geometry import project_tangent
from stiefel.manifold.retractions import retract_polar

Vector = list[Tensor]


@dataclass(frozen=True)
class Stiefel:
    """Matrices ``(b, p, n)`` with ``W Wᵀ = scale² I``, in a linear space of rows.

    Args:
        scale: s.
        within: the part of a vector in that space.
        subspace: whether only the rows' span matters, so that directions within it are left out.
    """

    scale: float
    within: Callable[[Tensor], Tensor]
    subspace: bool = False

    def project(self, w: Tensor, u: Tensor) -> Tensor:
        """The tangent part of a vector at W."""
        with full_precision(w.device):
            return project_tangent(w / self.scale, self.within(u), horizontal=self.subspace)

    def retract(self, w: Tensor, u: Tensor) -> Tensor:
        """The point of the set nearest to W + U."""
        with full_precision(w.device):
            return self.scale * retract_polar(w / self.scale, u / self.scale)

    def size(self, w: Tensor) -> float:
        """How far the set reaches: ``s √(b p)``."""
        return norm([w])

    def curvature(self, w: Tensor, gradient: Tensor, u: Tensor) -> Tensor:
        """What the set's bending adds to the loss's second derivative along a tangent U: ``−sym(G Xᵀ) U / s``."""
        with full_precision(w.device):
            s = gradient @ w.mH
            return (s + s.mH) @ u / (-2 * self.scale**2)


@dataclass(frozen=True)
class Free:
    """Numbers that may take any value."""

    def project(self, w: Tensor, u: Tensor) -> Tensor:
        """All of it."""
        return u

    def retract(self, w: Tensor, u: Tensor) -> Tensor:
        """The sum."""
        return w + u

    def size(self, w: Tensor) -> float:
        """Without end."""
        return math.inf

    def curvature(self, w: Tensor, gradient: Tensor, u: Tensor) -> Tensor:
        """Nothing."""
        return torch.zeros_like(u)


class Product:
    """The product of several sets: where the whole point is."""

    def __init__(self, blocks: Sequence[Stiefel | Free]) -> None:
        self.blocks = blocks

    def project(self, point: Vector, vector: Vector) -> Vector:
        """The tangent part, block by block."""
        return [b.project(w, u) for b, w, u in zip(self.blocks, point, vector, strict=True)]

    def retract(self, point: Vector, vector: Vector) -> Vector:
        """The point reached, block by block."""
        return [b.retract(w, u) for b, w, u in zip(self.blocks, point, vector, strict=True)]

    @property
    def flat(self) -> bool:
        """Whether no set bends."""
        return all(isinstance(b, Free) for b in self.blocks)

    def size(self, point: Vector) -> float:
        """How far all reach together."""
        return math.hypot(*(b.size(w) for b, w in zip(self.blocks, point, strict=True)))

    def curvature(self, point: Vector, gradient: Vector, vector: Vector) -> Vector:
        """The sets' part of the second derivative, block by block."""
        return [b.curvature(w, g, u) for b, w, g, u in zip(self.blocks, point, gradient, vector, strict=True)]


def dot(u: Vector, v: Vector) -> Tensor:
    """``Re ⟨u, v⟩``, summed in double where the device is fast at it."""
    terms = [(widened(a) * widened(b).conj()).real.sum() for a, b in zip(u, v, strict=True)]
    return torch.stack([t.to(terms[0].device) for t in terms]).sum()


def norm(u: Vector) -> float:
    """``‖u‖``."""
    return float(dot(u, u).sqrt())


def add(u: Vector, v: Vector, factor: float | Tensor = 1.0) -> Vector:
    """``u + factor · v``."""
    return [a + factor * b for a, b in zip(u, v, strict=True)]


def scaled(u: Vector, factor: float | Tensor) -> Vector:
    """``factor · u``."""
    return [factor * a for a in u]


def flat(u: Vector) -> Tensor:
    """All numbers in one row, complex ones as two."""
    rows = [(torch.view_as_real(v) if v.is_complex() else v).reshape(-1) for v in u]
    return torch.cat([r.to(rows[0].device) for r in rows])


def unflat(row: Tensor, like: Vector) -> Vector:
    """The vector of a row, in the shapes of another."""
    found = []
    parts = row.split([v.numel() * (1 + v.is_complex()) for v in like])
    for part, v in zip(parts, like, strict=True):
        part = part.to(v.device, v.dtype.to_real())
        # A copy, since complex numbers must begin at an even place.
        found.append(torch.view_as_complex(part.clone().view(*v.shape, 2)) if v.is_complex() else part.view(v.shape))
    return found
