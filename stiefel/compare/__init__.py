"""The comparison engine: problems, runs in processes of their own, records, reports.

Its names are resolved on first use: reading records needs neither torch nor a problem.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stiefel.compare.present.report import Report
    from stiefel.compare.problem import datasets
    from stiefel.compare.problem.batches import Batch
    from stiefel.compare.problem.load import load_problem
    from stiefel.compare.problem.problem import Data, Problem, Regression, where

__all__ = ["Batch", "Data", "Problem", "Regression", "datasets", "load_problem", "read_report", "where"]

_HOME = {
    "Batch": "problem.batches",
    "Data": "problem.problem",
    "Problem": "problem.problem",
    "Regression": "problem.problem",
    "datasets": "problem.datasets",
    "load_problem": "problem.load",
    "where": "problem.problem",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:  # the import system asks for modules of this folder here first
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_HOME[name]}")
    return module if name == "datasets" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def read_report(*folders: str | Path) -> Report:
    """The report of the records in some folders: tables as pandas frames, figures of matplotlib.

    Raises:
        ProblemError: a folder does not exist, or none holds a finished run.
    """
    from stiefel.compare.present.report import Report  # with pandas and matplotlib, which a run does not need

    return Report.read(*folders)
