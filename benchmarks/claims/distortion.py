"""Minimal distortion: of all maps to orthonormal rows, ZCA's changes the proxy least.

Whitening by the Cholesky factor, ``L⁻¹V`` with ``VVᵀ = LLᵀ``, gives the Q factor: one curve for both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from claims.outcome import COLOURS, Claim, Outcome, Rows, band, figure, mean
from claims.training import SHOWN, TINY, Run, Size
from stiefel.attach import constrained_weights
from stiefel.linalg import polar, qf, whitened

MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "ZCA (own)": polar,
    "QR, Cholesky": qf,
    "PCA (own_pca)": whitened,
}


def run(size: Size) -> Outcome:
    """‖W − V‖_F/‖V‖_F of the three, on the proxies that ``own`` trains, largest over layers, epoch by epoch."""
    rows: Rows = []
    problem = size.problem(bias=False)

    def look(at: Run) -> None:
        for weight in constrained_weights(at.model):
            v = weight.binding.layout.points(weight.parameter.detach().double())
            unit = v / torch.linalg.matrix_norm(v, keepdim=True) * v.shape[-2] ** 0.5  # as long as W
            for name, orthonormal in MAPS.items():
                distance = torch.linalg.matrix_norm(orthonormal(unit) - unit) / torch.linalg.matrix_norm(unit)
                rows.append(
                    {"seed": at.seed, "epoch": at.steps // (len(at.train[1]) // size.batch), "layer": weight.name}
                    | {"map": name, "distortion": distance.max().item()}
                )

    for seed in size.seeded():
        Run(problem, "own", size.rates[len(size.rates) // 2], seed, {"center": False}).go(epoch=look)
    last = max(r["epoch"] for r in rows)
    made, axes = figure()
    epochs = sorted({r["epoch"] for r in rows})
    for name, colour in zip(MAPS, COLOURS, strict=False):
        curves = [
            [max(r["distortion"] for r in rows if (r["seed"], r["epoch"], r["map"]) == (s, e, name)) for e in epochs]
            for s in size.seeded()
        ]
        band(axes[0, 0], epochs, curves, name, colour)
    axes[0, 0].set(xlabel="epoch", ylabel="‖W − V‖ / ‖V‖, largest over layers", yscale="log")
    axes[0, 0].legend(frameon=False)
    found = {name: mean(rows, "distortion", epoch=last, map=name) for name in MAPS}
    listed = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
    return Outcome(rows, f"At the end of training, mean over layers and seeds, ‖W − V‖/‖V‖ is: {listed}.", made)


CLAIM = Claim("Of all transforms that make the proxy's rows orthonormal, ZCA's changes it least.", run, SHOWN, TINY)
