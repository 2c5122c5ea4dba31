"""What several test files share: layers with their layouts, the forms of a method, and one of a user's own."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import stiefel
from stiefel.layout import Layout

LAYERS = {
    "wide": (lambda: nn.Linear(9, 4), Layout((4, 9))),
    "tall": (lambda: nn.Linear(4, 9), Layout((9, 4))),
    "square": (lambda: nn.Linear(5, 5), Layout((5, 5))),
    "conv": (lambda: nn.Conv2d(3, 6, 3), Layout((6, 3, 3, 3))),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), Layout((6, 2, 3, 3), blocks=2)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), Layout((4, 3, 2, 2), blocks=2, transposed=True)),
}


def forms(name: str, **options: Any) -> list[stiefel.Constraint]:
    """A method with these options, and with each other value of the options that its tuning space names by a word."""
    first = stiefel.get(name, **options)
    named = [(option, v) for option, values in first.tuning.items() for v in values if isinstance(v, str)]
    return [first, *(replace(first, **{option: v}) for option, v in named if v != getattr(first, option))]


class Largest(TorchDispatchMode):
    """Keeps the number of entries of the largest tensor that any operation returned."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.entries = max(self.entries, leaf.numel())
        return result


@dataclass(frozen=True, kw_only=True)
class Projection(stiefel.StepMethod):
    """X ← polar(X + U)."""

    name = "test_projection"
    summary = "project after the step"
    reference = "none"
    claim = stiefel.Claim()

    def step(self, x: Tensor, displacement: Tensor, lr: float) -> Tensor:
        return self.nearest(x + displacement, None)


def registered(cls: type[stiefel.Constraint]) -> Iterator[str]:
    """Register a method while a fixture is in use; yields its name."""
    stiefel.register(cls)
    try:
        yield cls.name
    finally:
        del stiefel.methods._CATALOGUE[cls.name]
