"""What the experiments of ``talk.py`` left, as numbers for documents. Imports pandas."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd


@dataclass(frozen=True)
class Tuned:
    """A score at the rate that validation chose.

    Args:
        mean, error: over seeds; the standard error of the mean.
        lr: the rate.
    """

    mean: float
    error: float
    lr: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.error:.3f}".replace("0.", ".")


@dataclass(frozen=True)
class Experiment:
    """A published experiment: ``rows.csv``, ``sentence.txt`` and ``figure.png`` in a folder."""

    folder: Path

    @cached_property
    def rows(self) -> pd.DataFrame:
        """The numbers."""
        return pd.read_csv(self.folder / "rows.csv")

    @cached_property
    def sentence(self) -> str:
        """What the experiment itself says."""
        return (self.folder / "sentence.txt").read_text().strip()

    def among(self, **where: object) -> pd.DataFrame:
        """The rows with certain values.

        Raises:
            ValueError: there are none.
        """
        rows = self.rows
        for name, value in where.items():
            rows = rows[rows[name] == value]
        if not len(rows):
            raise ValueError(f"{self.folder.name} has no rows with {where}")
        return rows

    def mean(self, key: str, **where: object) -> float:
        """The mean of a number over these rows."""
        return float(self.among(**where)[key].mean())

    def median(self, key: str, **where: object) -> float:
        """The median of a number over these rows."""
        return float(self.among(**where)[key].median())

    def rate(self, **where: object) -> float:
        """The learning rate with the best mean validation accuracy."""
        means = self.among(**where).groupby("lr").validation.mean()
        return float(means.index.to_numpy()[means.argmax()])

    def tuned(self, **where: object) -> Tuned:
        """The test accuracy at that rate, of every seed once."""
        lr = self.rate(**where)
        scores = self.among(**where, lr=lr).groupby("seed").accuracy.first().to_numpy()
        return Tuned(float(scores.mean()), float(scores.std(ddof=1) / len(scores) ** 0.5), lr)
