"""Which cases of a test with very many are tried by default: a sample with every value of every parameter in it."""

from __future__ import annotations

from collections.abc import Mapping
from zlib import crc32


def sample(cases: Mapping[str, Mapping[str, object]], every: int, *, values: bool = True) -> set[str]:
    """One case in so many, the same ones everywhere, and those that its parameters' values need to occur at all.

    Args:
        cases: parameters of each, by its name.
        every: one case in how many.
        values: whether all values occur. What has one parameter has no other sample than one of its values.
    """
    ordered = sorted(cases, key=lambda case: (crc32(case.encode()), case))
    kept = {case for case in ordered if crc32(case.encode()) % every == 0} or set(ordered[:1])
    if not values:
        return kept
    seen = {part for case in kept for part in cases[case].items()}
    for case in ordered:
        new = set(cases[case].items()) - seen
        if new:
            kept.add(case)
            seen |= new
    return kept
