"""The named errors of the library. Each message says what was given, what is expected, what to do. Imports nothing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class StiefelError(Exception):
    """Base class of every error that this library raises on purpose."""


class UnknownMethodError(StiefelError, ValueError):
    """A constraint was asked for by a name that is not registered."""


class OptionError(StiefelError, ValueError):
    """A method got an option that it does not have, or a value outside the option's range."""


class SelectionError(StiefelError, ValueError):
    """The layers named select nothing, select something that does not exist, or select a weight twice."""


class WeightError(StiefelError, ValueError):
    """A weight cannot be constrained as it is: wrong dtype, non-finite entries, too few dimensions."""


class LayoutError(StiefelError, ValueError):
    """The constraint's set is empty, or not the one asked for, at this weight's shape."""


class BatchError(StiefelError, ValueError):
    """A batch of activations cannot be whitened: wrong shape or dtype, too few samples, or not finite."""


class OptimizerError(StiefelError, TypeError):
    """An optimizer class cannot serve the constraint, or an optimizer would step a weight off its set."""


class DivergenceError(StiefelError, ArithmeticError):
    """The gradient of a constrained weight is NaN or infinite: the loss has diverged."""


class ObjectiveError(StiefelError, ValueError):
    """A loss cannot be minimized: it is no real number, depends on no parameter, or is another one at each call."""


class UncountedOperatorError(StiefelError, NotImplementedError):
    """A step uses an operator of linear algebra for which no count of floating-point operations is known."""


class DataError(StiefelError, RuntimeError):
    """A data set is missing, corrupt, or out of reach."""


class ProblemError(StiefelError, ValueError):
    """A file given to ``stiefel compare`` does not define a usable problem, or the grid asked for is empty."""


class RecordError(StiefelError, ValueError):
    """A run's record is corrupt, unreadable, or of another schema."""


class StorageError(StiefelError, OSError):
    """The folder of the records cannot be written: no permission, or no space."""


def nearest_names(name: str, known: Iterable[str]) -> str:
    """Phrase the names in ``known`` that resemble ``name``, or all of them where none does."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "known: " + ", ".join(known) if known else "there are none"
