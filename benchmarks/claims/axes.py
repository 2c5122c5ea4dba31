"""Axis swapping: PCA's axes change places as training goes on, of activations and of weights alike; ZCA's do not."""

from __future__ import annotations

from statistics import median

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from claims.outcome import COLOURS, Claim, Outcome, Rows, best_rate, figure, mean, spread
from claims.training import TINY, Run, Size
from stiefel.attach import constrained_weights
from stiefel.nn import Whitening1d

WEIGHTS = {"ZCA": "own", "PCA": "own_pca"}
ACTIVATIONS = {"ZCA": "zca", "PCA": "pca"}


class _Turn:
    """How far each step moves what is looked at, relative to its size: the largest over layers."""

    def __init__(self) -> None:
        self.before: list[Tensor] | None = None
        self.moves: list[float] = []

    def look(self, now: list[Tensor]) -> None:
        """Compare with the last time."""
        if self.before is not None:
            pairs = zip(now, self.before, strict=True)
            self.moves.append(max((torch.linalg.norm(a - b) / torch.linalg.norm(b)).item() for a, b in pairs))
        self.before = now


def run(size: Size) -> Outcome:
    """Moves per step and test accuracy of both kinds, of weights and of activations, at each learning rate."""
    rows: Rows = []
    moves: dict[tuple[str, str, float], list[float]] = {}
    for what, make in (("weights", _weights), ("activations", _acts)):
        for kind in ("ZCA", "PCA"):
            for lr in size.rates:
                for seed in size.seeded():
                    row, turns = _tried(make(size, kind, lr, seed), what)
                    rows.append({"what": what, "kind": kind, **row})
                    if not seed:
                        moves[what, kind, lr] = turns
    return Outcome(rows, _sentence(rows, size), _picture(rows, moves, size))


def _tried(one: Run, what: str) -> tuple[dict[str, float], list[float]]:
    turn, probe = _Turn(), one.train[0][:256]
    one.go(lambda at, loss: turn.look(_seen(at.model, what, probe)))
    scores = {"accuracy": one.accuracy(), "validation": one.accuracy(one.validation)}
    return {"lr": one.lr, "seed": one.seed, **scores, "move": median(turn.moves)}, turn.moves


def _trains(rows: Rows, size: Size, what: str) -> float:
    """The rate that is best for ZCA, at which steps are compared: where nothing trains, nothing moves."""
    return best_rate(rows, size.rates, what=what, kind="ZCA")


def _sentence(rows: Rows, size: Size) -> str:
    parts = []
    for what in ("weights", "activations"):
        for kind in ("ZCA", "PCA"):
            lr, common = best_rate(rows, size.rates, what=what, kind=kind), _trains(rows, size, what)
            move = 100 * mean(rows, "move", what=what, kind=kind, lr=common)
            score = spread(rows, "accuracy", what=what, kind=kind, lr=lr)
            parts.append(f"{what}, {kind}: a step at rate {common:g} moves {move:.2g} %, accuracy {score} at {lr:g}")
    return "; ".join(parts) + "."


def _picture(rows: Rows, moves: dict[tuple[str, str, float], list[float]], size: Size) -> Figure:
    made, axes = figure(2)
    for ax, what in zip(axes[0], ("weights", "activations"), strict=True):
        lr = _trains(rows, size, what)
        for kind, colour in zip(("ZCA", "PCA"), COLOURS, strict=False):
            ax.plot(moves[what, kind, lr], color=colour, label=kind, linewidth=1)
        ax.set(xlabel="step", ylabel=f"move of {what} per step", yscale="log", title=f"{what}, rate {lr:g}")
        ax.legend(frameon=False)
    return made


def _weights(size: Size, kind: str, lr: float, seed: int) -> Run:
    return Run(size.problem(bias=False), WEIGHTS[kind], lr, seed, {"center": False})


def _acts(size: Size, kind: str, lr: float, seed: int) -> Run:
    """The network without a constraint, its hidden layers' outputs whitened, as ``norm`` does it or by PCA."""
    one = Run(size.problem(bias=False, norm="whitening"), "unconstrained", lr, seed)
    return one.exchange(
        Whitening1d, lambda part: Whitening1d(size.width, group_size=part.group_size, kind=ACTIVATIONS[kind])
    )


@torch.no_grad()
def _seen(model: nn.Module, what: str, probe: Tensor) -> list[Tensor]:
    """The weights, or the whitened activations of fixed inputs, after a step."""
    if what == "weights":
        return [w.value.detach().clone() for w in constrained_weights(model)]
    found = []
    h = probe
    for part in model.children():
        kept = {k: v.clone() for k, v in part.state_dict().items()} if isinstance(part, Whitening1d) else None
        h = part(h)
        if kept is not None:
            part.load_state_dict(kept)  # looking leaves the running statistics alone
            found.append(h.clone())
    return found


CLAIM = Claim(
    "PCA whitening fails where ZCA works, since axes swap: of activations, and of weights.",
    run,
    shown=Size(rates=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)),  # PCA's best rates are small
    tiny=TINY,
)
