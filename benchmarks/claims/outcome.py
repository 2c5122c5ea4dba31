"""What a claim's experiment leaves: rows, a sentence made from them, a figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from matplotlib.figure import Figure

S = TypeVar("S")
Rows = list[dict[str, Any]]
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's: told apart by eyes that see fewer colours."""


@dataclass(frozen=True)
class Outcome:
    """What was found.

    Args:
        rows: the numbers.
        sentence: what they say, with the figures in it.
        figure: the picture.
    """

    rows: Rows
    sentence: str
    figure: Figure


@dataclass(frozen=True)
class Claim(Generic[S]):
    """A claim, and how it is tried.

    Args:
        says: the claim, in a sentence.
        run: the experiment, at a size.
        shown, tiny: the size that shows the effect, and one that shows only that it runs.
    """

    says: str
    run: Callable[[S], Outcome]
    shown: S
    tiny: S


def figure(columns: int = 1, rows: int = 1) -> tuple[Figure, Any]:
    """A figure with panels, and its axes as an array (rows, columns)."""
    made = Figure(figsize=(1.5 + 3.6 * columns, 0.6 + 2.9 * rows), layout="constrained")
    axes = made.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return made, axes


def band(ax: Any, xs: Sequence[float], many: Sequence[Sequence[float]], label: str, colour: str, **style: Any) -> None:
    """The median of several curves, between their extremes."""
    values = np.asarray(many, dtype=float)
    ax.fill_between(xs, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
    ax.plot(xs, np.median(values, 0), color=colour, label=label, **style)


def among(rows: Rows, **where: Any) -> Rows:
    """The rows with certain values."""
    return [r for r in rows if all(r[k] == v for k, v in where.items())]


def mean(rows: Rows, key: str, **where: Any) -> float:
    """The mean of a number over the rows with certain values."""
    found = [r[key] for r in among(rows, **where)]
    return float(np.mean(found)) if found else float("nan")


def best_rate(rows: Rows, rates: Sequence[float], **where: Any) -> float:
    """The learning rate with the best mean validation accuracy over the rows with certain values."""
    return max(rates, key=lambda lr: mean(rows, "validation", lr=lr, **where))


def spread(rows: Rows, key: str, **where: Any) -> str:
    """Mean and standard error, as text."""
    found = [r[key] for r in among(rows, **where)]
    error = np.std(found, ddof=1) / len(found) ** 0.5 if len(found) > 1 else float("nan")
    return f"{np.mean(found):.3f} ± {error:.3f}"
