"""Which cases of a test with very many are tried by default: a sample with every value of every parameter in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from zlib import crc32


def sample(
    cases: Mapping[str, Mapping[str, object]], every: int, together: Sequence[str] = (), *, values: bool = True
) -> set[str]:
    """One case in so many, the same ones everywhere, and those that its parameters' values need to occur at all.

    Args:
        cases: parameters of each, by its name.
        every: one case in how many.
        together: parameters whose combinations all occur.
        values: whether all values occur. What has one parameter has no other sample than one of its values.
    """
    ordered = sorted(cases, key=lambda case: (crc32(case.encode()), case))
    kept = {case for case in ordered if crc32(case.encode()) % every == 0} or set(ordered[:1])
    if not values:
        return kept
    seen = {part for case in kept for part in parts(cases[case], together)}
    for case in ordered:
        new = parts(cases[case], together) - seen
        if new:
            kept.add(case)
            seen |= new
    return kept


def parts(case: Mapping[str, object], together: Sequence[str]) -> set[tuple[str, ...]]:
    """What of a case has to occur: each parameter's value, and the combination of some."""
    each = {(name, str(value)) for name, value in case.items()}
    return each | {tuple(str(case[name]) for name in together)} if together else each
