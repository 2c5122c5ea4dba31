"""The comparison engine: problems, runs in processes of their own, records, reports. Imports ``measure`` and below."""

from stiefel.compare import datasets
from stiefel.compare.batches import Batch
from stiefel.compare.problem import Data, Problem, Regression, load_problem, where

__all__ = ["Batch", "Data", "Problem", "Regression", "datasets", "load_problem", "where"]
