"""What options may be. Imports the standard library."""

from __future__ import annotations

import math
from numbers import Real


def is_count(value: object) -> bool:
    """Whether an option's value is a whole number of at least 1 (and not True)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_number(value: object) -> bool:
    """Whether an option's value is a finite real number (and not True or False)."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
