"""Training data that are drawn anew, in place of a data set."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """``steps`` batches, each drawn as it is asked for; others whenever they are iterated."""

    draw: Callable[[], tuple[Tensor, Tensor]]
    steps: int

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.draw() for _ in range(self.steps))

    def __len__(self) -> int:
        return self.steps
