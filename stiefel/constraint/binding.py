"""One method on one tensor: all that its layer and its optimizer know. Imports ``base``, ``layout``."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from stiefel.constraint.base import Constraint
from stiefel.layout import Layout


@dataclass
class Tally:
    """What training did to a weight.

    Args:
        steps: optimizer steps taken.
        shortened: how many of them a method shortened to keep the weight where it promises; None for methods that
            shorten none. A tensor while it is counted on a device, so that counting does not wait for it.
    """

    steps: int = 0
    shortened: Tensor | int | None = None


@dataclass
class Binding:
    """One method on one tensor of one module. It holds no reference to the module, which copies freely.

    Args:
        constraint: the method with its options.
        layout: how the tensor is read.
        label: the tensor's name when it was constrained, for messages.
        position: the tensor's place among its module's parameters, which a reparameterization gives up and release
            restores, so that the order of ``parameters()`` is the plain module's again.
        tally: optimizer steps taken, and how many of them were shortened.
    """

    constraint: Constraint
    layout: Layout
    label: str
    position: int = 0
    tally: Tally = field(default_factory=Tally)

    @torch.no_grad()
    def nearest(self, weight: Tensor) -> Tensor:
        """The weight of the method's set nearest to a given one."""
        return self.layout.weight(self.constraint.nearest(self.layout.points(weight), self.layout))
