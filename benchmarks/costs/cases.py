"""Shapes with seeded proxies, points and gradients, and what a candidate hands over. Imports ``stiefel.linalg``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from stiefel.linalg import gram_residual, in_double

CPU = torch.device("cpu")
TURN = 0.3
"""Length of each row of the displacement from the start, for proxies of maps that start at a fixed point."""


@dataclass(frozen=True)
class Case:
    """``count`` matrices p×n, p ≤ n, that all candidates of a round work on.

    Args:
        condition: condition number of each proxy V = H X: X is random orthonormal, the eigenvalues of the symmetric H
            lie at equal ratios from 1 to ``condition``. About 2 is a start that training has moved, 100 one that it has
            bent out of shape.
    """

    count: int
    p: int
    n: int
    condition: float = 2.0
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.count}×{self.p}×{self.n}"

    def alone(self) -> Case:
        """One of its matrices."""
        return replace(self, count=1)

    def gaussian(self, seed: int) -> Tensor:
        """Entries N(0, 1/n): rows of length about 1."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.count, self.p, self.n, generator=generator, dtype=torch.float64) / self.n**0.5

    def points(self) -> Tensor:
        """Random orthonormal X, (count, p, n)."""
        return self.placed(_points(self.count, self.p, self.n))

    def proxies(self) -> Tensor:
        """V = H X, (count, p, n)."""
        # H = QᵀΛQ, so that the singular values of V are the eigenvalues of H.
        q = _points(self.count, self.p, self.p)
        eigenvalues = torch.logspace(0, 1, self.p, base=self.condition, dtype=torch.float64)
        return self.placed((q.mT * eigenvalues) @ (q @ _points(self.count, self.p, self.n)))

    def turned(self) -> Tensor:
        """X and a displacement from it, for maps that start at X."""
        return self.placed(self.points().double().cpu() + TURN * self.gaussian(2))

    def gradients(self) -> Tensor:
        """∂L/∂X, rows of length about 1."""
        return self.placed(self.gaussian(1))

    def placed(self, x: Tensor) -> Tensor:
        """A copy in the case's dtype, on its device, since candidates may change it in place."""
        return x.to(self.device, self.dtype, copy=True).contiguous()


@cache
def _points(count: int, p: int, n: int) -> Tensor:
    return torch.linalg.qr(Case(count, p, n).gaussian(0).mT)[0].mT.contiguous()


class Layers(nn.Module):
    """``count`` Linear layers of one shape, whose forward pass asks for their weights and does nothing else."""

    def __init__(self, case: Case, values: Tensor | None = None) -> None:
        super().__init__()
        device, dtype = case.device, case.dtype
        self.layers = nn.ModuleList(
            nn.Linear(case.n, case.p, bias=False, device=device, dtype=dtype) for _ in range(case.count)
        )
        for layer, x in zip(self.layers, case.points() if values is None else values, strict=True):
            layer.weight = nn.Parameter(x.clone())

    def forward(self) -> list[Tensor]:
        """All weights."""
        return [layer.weight for layer in self.layers]  # type: ignore[misc]


@dataclass(frozen=True)
class Work:
    """What is timed, and the matrices that it leaves, batches of (b, p, n), whose orthogonality is measured."""

    call: Callable[[], Any]
    result: Callable[[], list[Tensor]] | None = None

    @torch.no_grad()
    def error(self) -> float | None:
        """The largest ‖XXᵀ − I‖_F/√p of any matrix, in float64; None where there are none."""
        if self.result is None:
            return None
        residuals = [
            gram_residual(in_double(x.detach())).flatten(-2).norm(dim=-1) / x.shape[-2] ** 0.5 for x in self.result()
        ]
        return float(torch.cat(residuals).max())


@dataclass(frozen=True)
class Candidate:
    """One implementation of the work of a section.

    Args:
        name: as tables show it; unique within its section.
        who: whose code it is: ``"ours"`` or a package; ``"reference"`` is what the others are measured by.
        setup: makes the work of a case.
        needs: the module that has to be installed.
        per_layer: whether its time is proportional to the number of matrices: one is then tried first.
        conditioned: whether its time or accuracy depends on the proxy's condition number.
        short: whether the short form has it.
    """

    name: str
    who: str
    setup: Callable[[Case], Work]
    needs: str | None = None
    per_layer: bool = False
    conditioned: bool = False
    short: bool = True

    @property
    def missing(self) -> str | None:
        """Why it cannot run here."""
        if self.needs is None or find_spec(self.needs.partition(".")[0]) is not None:
            return None
        return f"{self.needs.partition('.')[0]} is not installed (pip install 'stiefel[bench]')"
