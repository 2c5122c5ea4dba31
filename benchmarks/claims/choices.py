"""Batch normalization's three choices: whose statistics, estimated or computed, standardized or whitened."""

from __future__ import annotations

import torch
from parts.norms import norm
from torch import Tensor, nn

from claims.outcome import COLOURS, Claim, Outcome, Rows, best_rate, figure, mean, spread
from claims.training import SHOWN, TINY, Run, Size
from stiefel.nn import Whitening1d


class Standardize(nn.Module):
    """``(h − μ)/σ`` feature by feature, with one of three pairs (μ, σ).

    Args:
        features: their number.
        of: ``"batch"``: computed from the mini-batch, and differentiated; ``"constant"``: the same, constants to the
            gradient; ``"estimate"``: running averages, constants too; ``"data"``: computed from all training data as an
            epoch begins, constants until the next.
    """

    def __init__(self, features: int, of: str) -> None:
        super().__init__()
        self.of = of
        self.weight, self.bias = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("variance", torch.ones(features))
        self.mean: Tensor
        self.variance: Tensor

    def forward(self, h: Tensor) -> Tensor:
        """Normalize; in training mode running averages move by a tenth."""
        variance, mean_ = torch.var_mean(h, 0, correction=0)
        if self.training and self.of != "data":
            for kept, new in ((self.mean, mean_), (self.variance, variance)):
                kept.lerp_(new.detach(), 0.1)
        if not (self.training and self.of in ("batch", "constant")):
            mean_, variance = self.mean, self.variance
        elif self.of == "constant":
            mean_, variance = mean_.detach(), variance.detach()
        return (h - mean_) * (variance + 1e-5).rsqrt() * self.weight + self.bias


CHOICES = {
    "mini-batch, computed, standardized": lambda n: Standardize(n, "batch"),
    "mini-batch, as constants, standardized": lambda n: Standardize(n, "constant"),
    "mini-batches, estimated, standardized": lambda n: Standardize(n, "estimate"),
    "data set, computed, standardized": lambda n: Standardize(n, "data"),
    "mini-batch, computed, whitened in groups": lambda n: norm("whitening", n),
    "mini-batch, computed, whitened": Whitening1d,
}
"""Whose statistics; whether they are computed, so that the gradient knows of them, or estimated; what they do."""


def run(size: Size) -> Outcome:
    """Test and training accuracy of each choice at each rate, beside none."""
    names = ("none", *CHOICES)
    rows: Rows = [
        {"choice": name, "lr": lr, "seed": seed, **_scores(size, name, lr, seed)}
        for name in names
        for lr in size.rates
        for seed in size.seeded()
    ]
    made, axes = figure(2)
    parts = []
    for name, colour in zip(names, COLOURS, strict=False):
        for ax, key in zip(axes[0], ("accuracy", "gap"), strict=True):
            values = [mean(rows, key, choice=name, lr=lr) for lr in size.rates]
            ax.plot(size.rates, values, "o-", color=colour, label=name)
        lr = best_rate(rows, size.rates, choice=name)
        score, gap = spread(rows, "accuracy", choice=name, lr=lr), 100 * mean(rows, "gap", choice=name, lr=lr)
        parts.append(f"{name} {score} at {lr:g} (training ahead by {gap:.1f} points)")
    axes[0, 0].set(xscale="log", xlabel="learning rate", ylabel="test accuracy (0: diverged)")
    axes[0, 1].set(xscale="log", xlabel="learning rate", ylabel="training less test accuracy")
    made.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return Outcome(rows, "Test accuracy at the rate that validation chose: " + "; ".join(parts) + ".", made)


def _scores(size: Size, name: str, lr: float, seed: int) -> dict[str, float]:
    one = Run(size.problem(norm="none" if name == "none" else "batch"), "unconstrained", lr, seed)
    if name != "none":
        one.exchange(nn.BatchNorm1d, lambda part: CHOICES[name](part.num_features))
    _compute(one)
    one.go(epoch=_compute)
    accuracy = one.accuracy()
    return {
        "accuracy": accuracy, "validation": one.accuracy(one.validation), "gap": one.accuracy(one.train) - accuracy,
    }  # fmt: skip


@torch.no_grad()
def _compute(one: Run) -> None:
    """The statistics of the whole data set, layer after layer, where these are asked for."""
    h = one.train[0]
    for part in one.model.children():
        if isinstance(part, Standardize) and part.of == "data":
            variance, mean_ = torch.var_mean(h, 0, correction=0)
            part.mean.copy_(mean_)
            part.variance.copy_(variance)
        h = part(h) if isinstance(part, (Standardize, nn.Linear, nn.ReLU)) else h


CLAIM = Claim("Batch normalization makes three choices: which of them matter?", run, SHOWN, TINY)
