"""What can be wrong with a run, and what is right with a refusal."""

from __future__ import annotations

from collections.abc import Iterable

import stiefel


class Fault(Exception):
    """What is wrong with a run: its kind, and what was seen."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


def is_named(error: stiefel.StiefelError, options: Iterable[str], optimizer: str, weights: Iterable[str]) -> bool:
    """Whether a message names what is refused: the option, the optimizer, or the weight.

    Args:
        error: the refusal.
        options: names of the method's options that were given.
        optimizer: the class's name.
        weights: names of the weights.
    """
    quoted = [f"'{name}" for name in [*weights, "weight"]]  # of a layer that is constrained by itself, just that
    words: dict[type[stiefel.StiefelError], list[str]] = {
        stiefel.OptionError: [word for option in options for word in (f"{option}=", repr(option))],
        stiefel.OptimizerError: [optimizer, *quoted],
        stiefel.LayoutError: quoted,
        stiefel.WeightError: quoted,
        stiefel.DivergenceError: quoted,
    }
    return any(word in str(error) for word in words.get(type(error), []))
