"""Energy and redundancy: what an orthogonal start gives, and what of it a constraint keeps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from claims.outcome import COLOURS, Claim, Outcome, Rows, band, figure, mean
from claims.training import SHOWN, TINY, Run, Size
from stiefel.measure import preservation, redundancy

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "torch's start": ("unconstrained", {"start": "given"}),
    "orthogonal start": ("unconstrained", {"scale": "relu"}),
    "own": ("own", {"scale": "relu", "center": False}),
    "soft": ("soft", {"scale": "relu"}),
}


def run(size: Size) -> Outcome:
    """Energy after each layer over that before the first, and mean |cos| between filters: before and after training."""
    rows: Rows = []
    problem = size.problem()
    lr = size.rates[len(size.rates) // 2 - 1]
    for name, (method, options) in KINDS.items():
        for seed in size.seeded():
            one = Run(problem, method, lr, seed, options)
            for when in ("start", "end"):
                rows += _measured(one, name, when)
                if when == "start":
                    one.go()
    made, axes = figure(2, 2)
    for row in (0, 1):
        axes[row, 1].sharey(axes[row, 0])
    layers = range(1, size.depth + 1)
    for column, when in enumerate(("start", "end")):
        for row, key in enumerate(("energy", "redundancy")):
            for (name, colour), style in zip(zip(KINDS, COLOURS, strict=False), ("-", "-", "--", ":"), strict=True):
                at = {"name": name, "when": when}
                curves = [[mean(rows, key, **at, layer=i, seed=s) for i in layers] for s in size.seeded()]
                band(axes[row, column], list(layers), curves, name, colour, marker="o", markersize=3, linestyle=style)
            label = "‖output‖/‖input of the first‖" if key == "energy" else "mean |cos| between filters"
            axes[row, column].set(xlabel="layer", ylabel=label, title=f"at the {when}")
        axes[0, column].set_yscale("log")
    axes[0, 0].legend(frameon=False, fontsize=7)
    kept = ", ".join(
        f"{name} {mean(rows, 'energy', name=name, when='start', layer=size.depth):.3g} and "
        f"{mean(rows, 'energy', name=name, when='end', layer=size.depth):.3g}" for name in KINDS
    )  # fmt: skip
    alike = ", ".join(
        f"{name} {mean(rows, 'redundancy', name=name, when='start'):.2g} and "
        f"{mean(rows, 'redundancy', name=name, when='end'):.2g}" for name in KINDS
    )  # fmt: skip
    return Outcome(rows, f"Energy after the last layer at start and end: {kept}. Mean |cos| of filters: {alike}.", made)


def _measured(one: Run, name: str, when: str) -> Rows:
    x, y = one.train[0][:512], one.train[1][:512]
    signals = preservation(one.model, lambda: F.cross_entropy(one.model(x), y))
    alike = redundancy(one.model)
    hidden = [n for n in signals if n.startswith("hidden")]
    return [
        {"name": name, "seed": one.seed, "when": when, "layer": i}
        | {"energy": signals[n].forward_total or torch.nan, "redundancy": alike[n]}
        for i, n in enumerate(hidden, 1)
    ]


CLAIM = Claim(
    "Orthogonal filters keep the signal's energy through depth, and do not repeat each other.", run, SHOWN, TINY
)
