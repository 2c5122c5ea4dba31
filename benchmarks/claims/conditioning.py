"""Why normalize: conditioning of layers' inputs and Gauss-Newton blocks through depth, with and without."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from matplotlib.figure import Figure

from claims.outcome import COLOURS, Claim, Outcome, Rows, band, best_rate, figure, mean, spread
from claims.training import SHOWN, TINY, Run, Size
from stiefel.measure.model.conditioning import conditioning

KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "as torch starts": ("unconstrained", {"start": "given"}, "none"),
    "orthogonal start, √2": ("unconstrained", {"scale": "relu"}, "none"),
    "own, √2": ("own", {"scale": "relu", "center": False}, "none"),
    "batch normalization": ("unconstrained", {"start": "given"}, "batch"),
    "whitening": ("unconstrained", {"start": "given"}, "whitening"),
}
EXAMPLES = 512


def run(size: Size) -> Outcome:
    """Condition numbers of A = E[hhᵀ] and of the block A ⊗ S, layer by layer, at the start and after training.

    Over the eigenvalues that are not zero, since units that are never on make A singular; its effective rank says more.
    Each kind trains at the rate with the best validation accuracy of those tried.
    """
    rows: Rows = []
    for name, (method, options, norm) in KINDS.items():
        for lr in size.rates:
            for seed in size.seeded():
                one = Run(size.problem(norm=norm), method, lr, seed, options)
                start = _measured(one)
                one.go()
                scores = {"accuracy": one.accuracy(), "validation": one.accuracy(one.validation)}
                about = {"name": name, "lr": lr, "seed": seed, **scores}
                rows += [about | row | {"when": "start"} for row in start]
                if not one.diverged:
                    rows += [about | row | {"when": "end"} for row in _measured(one)]
    return Outcome(rows, _sentence(rows, size), _picture(rows, size))


def _measured(one: Run) -> Rows:
    x, y = one.train[0][:EXAMPLES], one.train[1][:EXAMPLES]
    found = conditioning(one.model, lambda: one.model(x), loss=lambda z: F.cross_entropy(z, y), unconstrained=True)
    hidden = [c for n, c in found.items() if n.startswith("hidden")]
    return [
        {"layer": i, "inputs": c.inputs.condition_nonzero, "block": c.block.condition_nonzero}
        | {"rank": c.inputs.effective_rank}
        for i, c in enumerate(hidden, 1)
        if c.inputs and c.block
    ]


def _sentence(rows: Rows, size: Size) -> str:
    parts = []
    for name in KINDS:
        lr = best_rate(rows, size.rates, name=name)
        at = {"name": name, "lr": lr, "layer": size.depth}
        ranks = " and ".join(f"{mean(rows, 'rank', when=when, **at):.3g}" for when in ("start", "end"))
        kappas = " and ".join(f"{mean(rows, 'inputs', when=when, **at):.2g}" for when in ("start", "end"))
        score = spread(rows, "accuracy", name=name, lr=lr, layer=size.depth, when="end")
        parts.append(f"{name}: effective rank {ranks}, κ {kappas}, test accuracy {score} at {lr:g}")
    return "Inputs of the last hidden layer, at start and end: " + "; ".join(parts) + "."


def _picture(rows: Rows, size: Size) -> Figure:
    made, axes = figure(3, 2)
    layers = list(range(1, size.depth + 1))
    titles = {"inputs": "κ of E[hhᵀ]", "rank": "effective rank of E[hhᵀ]", "block": "κ of the Gauss-Newton block"}
    for row, when in enumerate(("start", "end")):
        for column, (key, title) in enumerate(titles.items()):
            ax = axes[row, column]
            for name, colour in zip(KINDS, COLOURS, strict=False):
                at = {"name": name, "lr": best_rate(rows, size.rates, name=name), "when": when}
                curves = [[mean(rows, key, **at, layer=i, seed=s) for i in layers] for s in size.seeded()]
                band(ax, layers, curves, name, colour, marker="o", markersize=3)
            ax.set(xlabel="layer", yscale="log", title=f"{title}, {when}")
    axes[0, 1].legend(frameon=False, fontsize=7)
    return made


CLAIM = Claim(
    "Normalized and orthogonal layers are better conditioned, so that gradients descend faster.", run, SHOWN, TINY
)
