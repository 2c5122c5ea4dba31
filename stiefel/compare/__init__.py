"""The comparison engine: problems, runs in processes of their own, records, reports. Imports ``measure`` and below."""

from stiefel.compare import datasets
from stiefel.compare.problem import Batch, Data, Problem, load_problem, where

__all__ = ["Batch", "Data", "Problem", "datasets", "load_problem", "where"]
