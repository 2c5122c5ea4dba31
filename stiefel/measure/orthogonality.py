"""How orthogonal each constrained weight is. Imports ``attach`` and below."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stiefel.attach import constrained_weights
from stiefel.errors import SelectionError
from stiefel.linalg import gram_residual


@dataclass(frozen=True)
class WeightRow:
    """One constrained weight, measured as X = W/scale; over several matrices (groups, gates) the worst of them.

    ``error`` is ‖XXᵀ − I‖_F, ``relative`` the same divided by √p, ``sigma_max`` and ``sigma_min`` the extreme singular
    values of X, ``condition`` their ratio.
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
        head = ("weight", "method", "layout", "scale", "‖XXᵀ−I‖_F", "σ max", "σ min", "condition")
        lines = [
            (
                r.name,
                r.method,
                r.layout,
                r.scale if isinstance(r.scale, str) else f"{r.scale:.4g}",
                f"{r.error:.1e}",
                f"{r.sigma_max:.6f}",
                f"{r.sigma_min:.6f}",
                f"{r.condition:.4g}",
            )
            for r in self.rows
        ]
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
    return {
        w.name: _residual(w.points().double()) / w.binding.layout.matrix_shape[1] ** 0.5
        for w in constrained_weights(module)
    }


def _residual(x: Tensor) -> float:
    residuals = torch.linalg.matrix_norm(gram_residual(x))
    return residuals.max().item() if torch.isfinite(x).all() else float("nan")


@torch.no_grad()
def report(module: nn.Module) -> OrthogonalityReport:
    """Measure every constrained weight of a module, in double precision, against its declared scale.

    Raises:
        SelectionError: nothing in the module is constrained.
    """
    rows = []
    for weight in constrained_weights(module):
        x = weight.points().double()
        p = x.shape[-2]
        error = _residual(x)
        sigma = torch.linalg.svdvals(x) if error == error else torch.full(x.shape[:2], float("nan"))
        high, low = sigma[:, 0], sigma[:, -1]
        method = weight.binding.constraint
        rows.append(
            WeightRow(
                name=weight.name,
                method=method.name,
                layout=str(weight.binding.layout),
                scale=method.scale if method.scale == "learnable" else method.fixed_scale,
                error=error,
                relative=error / p**0.5,
                sigma_max=high.max().item(),
                sigma_min=low.min().item(),
                condition=(high / low).max().item(),
            )
        )
    if not rows:
        raise SelectionError(
            f"nothing in this {type(module).__name__} is constrained, so there is nothing to report; call "
            "stiefel.constrain(module, ...) first (a released module has lost its constraints)"
        )
    return OrthogonalityReport(tuple(rows))
