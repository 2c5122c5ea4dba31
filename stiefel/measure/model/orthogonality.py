"""How orthogonal each constrained weight is. Imports ``attach`` and below."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stiefel.attach import ConstrainedWeight, constrained_weights
from stiefel.attach.intact import refuse_waiting, warn_of_replaced
from stiefel.attach.weights import points_of
from stiefel.constraint import residual_of
from stiefel.errors import SelectionError
from stiefel.linalg import gram_residual, in_double, one_by_one


@dataclass(frozen=True)
class WeightRow:
    """One constrained weight, measured as X = W/scale; over several matrices (groups, gates) the worst of them.

    ``error`` is ‖XXᵀ − I‖_F, ``relative`` the same divided by √p, ``sigma_max`` and ``sigma_min`` the extreme singular
    values of X, ``condition`` their ratio. ``steps`` are the optimizer steps taken, ``shortened`` how many of them the
    method shortened to keep its promise (None for methods that shorten none). ``determinant`` is the sign of a square
    weight's determinant, which continuous methods cannot change: 1, −1, 0 where its matrices differ, None where p < n
    or where it is singular.
    """

    name: str
    method: str
    layout: str
    scale: float | str
    error: float
    relative: float
    sigma_max: float
    sigma_min: float
    condition: float
    steps: int
    shortened: int | None
    determinant: int | None


@dataclass(frozen=True)
class OrthogonalityReport:
    """A row per constrained weight; prints as a table."""

    rows: tuple[WeightRow, ...]

    @property
    def worst(self) -> float:
        """The largest ‖XXᵀ − I‖_F/√p of all weights; NaN where a weight is."""
        values = [row.relative for row in self.rows]
        return float("nan") if any(v != v for v in values) else max(values)

    def to_dict(self) -> dict[str, Any]:
        """``{"worst": float, "weights": [row, ...]}``, for JSON."""
        return {"worst": self.worst, "weights": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        columns = {
            "weight": [r.name for r in self.rows],
            "method": [r.method for r in self.rows],
            "layout": [r.layout for r in self.rows],
            "scale": [r.scale if isinstance(r.scale, str) else f"{r.scale:.4g}" for r in self.rows],
            "‖XXᵀ−I‖_F": [f"{r.error:.1e}" for r in self.rows],
            "σ max": [f"{r.sigma_max:.6f}" for r in self.rows],
            "σ min": [f"{r.sigma_min:.6f}" for r in self.rows],
            "condition": [f"{r.condition:.4g}" for r in self.rows],
        }
        if any(r.determinant is not None for r in self.rows):
            columns["det"] = [{None: "—", 0: "±", 1: "+1", -1: "−1"}[r.determinant] for r in self.rows]
        if any(r.shortened is not None for r in self.rows):
            columns["shortened"] = ["—" if r.shortened is None else f"{r.shortened} of {r.steps}" for r in self.rows]
        head, lines = tuple(columns), list(zip(*columns.values(), strict=True))
        widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
        text = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in (head, *lines)
        ]
        text.insert(1, "─" * max(map(len, text)))
        return "\n".join([*text, f"worst ‖XXᵀ−I‖_F/√p: {self.worst:.1e}"])


@torch.no_grad()
def errors(module: nn.Module) -> dict[str, float]:
    """‖XXᵀ − I‖_F/√p of every constrained weight, by name, the worst of its matrices; NaN where the weight is.

    Cheaper than :func:`report`, which also decomposes.
    """
    weights = list(constrained_weights(module))
    return {w.name: residual_of(x) for w, x in zip(weights, points_of(weights), strict=True)}


@torch.no_grad()
def report(module: nn.Module) -> OrthogonalityReport:
    """Measure every constrained weight of a module, in double precision, against its declared scale.

    Raises:
        SelectionError: nothing in the module is constrained.
        WeightError: a lazy layer that will be constrained has no shape yet.
    """
    refuse_waiting(module)
    warn_of_replaced(module)
    weights = list(constrained_weights(module))
    if not weights:
        raise SelectionError(
            f"nothing in this {type(module).__name__} is constrained, so there is nothing to report; call "
            "stiefel.constrain(module, ...) first (a released module has lost its constraints)"
        )
    points = points_of(weights)
    alike: dict[Any, list[int]] = {}
    for i, x in enumerate(points):
        alike.setdefault((x.shape[1:], x.dtype, x.device), []).append(i)
    rows: dict[int, WeightRow] = {}
    for group in alike.values():
        x = in_double(torch.cat([points[i] for i in group]))
        sizes = [len(points[i]) for i in group]
        for i, numbers in zip(group, _measured(x).split(sizes), strict=True):
            rows[i] = _row(weights[i], numbers.T.tolist(), x.shape[-2])
    return OrthogonalityReport(tuple(rows[i] for i in range(len(weights))))


def _measured(x: Tensor) -> Tensor:
    """‖XXᵀ − I‖_F, σ max, σ min and the determinant's sign of each matrix, on the host: one read for all."""
    residual = torch.linalg.matrix_norm(gram_residual(x))
    # A matrix with NaN (the only number unequal to itself) cannot be decomposed.
    known = residual == residual
    fine = torch.where(known[:, None, None], x, 0)
    sigma = torch.where(known[:, None], torch.linalg.svdvals(fine), math.nan)  # descending
    sign = torch.full_like(residual, math.nan)
    if x.shape[-2] == x.shape[-1] and not x.is_complex():
        sign = one_by_one(torch.linalg.det, fine).sign()
    return torch.stack([residual, sigma[:, 0], sigma[:, -1], sign], dim=1).cpu()


def _row(weight: ConstrainedWeight, numbers: list[list[float]], p: int) -> WeightRow:
    residuals, highs, lows, signs = numbers
    method, tally = weight.binding.constraint, weight.binding.tally
    error = _largest(residuals)
    return WeightRow(
        name=weight.name,
        method=method.name,
        layout=str(weight.binding.layout),
        scale=method.scale if method.scale == "learnable" else method.fixed_scale,
        error=error,
        relative=error / p**0.5,
        sigma_max=_largest(highs),
        sigma_min=-_largest([-low for low in lows]),
        # Also of a zero weight.
        condition=_largest([math.inf if low == 0 else high / low for high, low in zip(highs, lows, strict=True)]),
        steps=tally.steps,
        shortened=None if tally.shortened is None else int(tally.shortened),
        determinant=_common_sign(signs),
    )


def _largest(values: list[float]) -> float:
    """The largest; NaN where one is."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def _common_sign(signs: list[float]) -> int | None:
    """The sign that all determinants have, 0 where they differ; None where one has none: singular, or NaN."""
    if not all(abs(sign) == 1 for sign in signs):
        return None
    return int(signs[0]) if len(set(signs)) == 1 else 0
