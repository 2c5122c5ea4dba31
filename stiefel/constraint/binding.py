"""One method on one tensor: the record that its layer and its optimizer share. Imports ``base``, ``layout``."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stiefel.constraint.base import Constraint
from stiefel.layout import Layout


@dataclass
class Tally:
    """How many steps training has taken on a weight.

    Args:
        steps: optimizer steps taken.
        shortened: how many of them the method shortened to keep its claim; None for methods that never do. A tensor
            while the count is on a device, so that the host does not wait for it.
        resumed: the steps taken as an optimizer's loaded state has them.
        left: what an optimizer's step, or a check, has left behind: by it a later change from outside is known.
    """

    steps: int = 0
    shortened: Tensor | int | None = None
    resumed: int | None = None
    left: Hashable = None


@dataclass
class Binding:
    """One method on one tensor of one module. It holds no reference to the module, so that the module can be copied.

    Args:
        constraint: the method with its options.
        layout: how the tensor is read.
        label: the tensor's name when it was constrained, for messages.
        position: the tensor's place among its module's parameters. A reparameterization removes the tensor from there,
            and release puts it back, so that ``parameters()`` has the plain module's order again.
        tally: optimizer steps taken, and how many of them were shortened.
    """

    constraint: Constraint
    layout: Layout
    label: str
    position: int = 0
    tally: Tally = field(default_factory=Tally)

    @torch.no_grad()
    def nearest(self, weight: Tensor) -> Tensor:
        """The weight on the method's set that is nearest to a given one."""
        if not self.constraint.orthogonal_start:
            return weight  # as it is, to the bit: dividing by the scale and multiplying again would round
        return self.layout.weight(self.constraint.nearest(self.layout.points(weight), self.layout))
