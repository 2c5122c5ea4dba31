"""The comparison engine: problems, runs in processes of their own, records, reports. Imports ``measure`` and below."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from stiefel.compare import datasets
from stiefel.compare.batches import Batch
from stiefel.compare.problem import Data, Problem, Regression, load_problem, where

if TYPE_CHECKING:
    from stiefel.compare.report import Report

__all__ = ["Batch", "Data", "Problem", "Regression", "datasets", "load_problem", "read_report", "where"]


def read_report(*folders: str | Path) -> Report:
    """The report of the records in some folders: tables as pandas frames, figures of matplotlib.

    Raises:
        ProblemError: a folder is not there, or there is no finished run in any.
    """
    from stiefel.compare.report import Report  # with pandas and matplotlib, which a run does not need

    return Report.read(*folders)
