"""One method on one tensor: what its layer and its optimizer share. Imports ``base``, ``layout`` and ``linalg``."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stiefel.constraint.base import Constraint
from stiefel.layout import Layout
from stiefel.linalg import gram_residual, in_double


@dataclass
class Tally:
    """How many steps training has taken on a weight.

    Args:
        steps: optimizer steps taken.
        stepped: those of them for which the weight had a gradient.
        shortened: how many of them the method shortened to keep its claim; None for methods that never do. A tensor
            while the count is on a device, so that the host does not wait for it.
        resumed: the steps taken as an optimizer's loaded state has them.
        left: what an optimizer's step, or a check, has left behind: by it a later change from outside is known.
    """

    steps: int = 0
    stepped: int = 0
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
        title: what the weight is called, where its name below its layer says little.
        position: the tensor's place among its module's parameters. A reparameterization removes the tensor from there,
            and release puts it back, so that ``parameters()`` has the plain module's order again.
        tally: optimizer steps taken, and how many of them were shortened.
    """

    constraint: Constraint
    layout: Layout
    label: str
    title: str = ""
    position: int = 0
    tally: Tally = field(default_factory=Tally)

    @torch.no_grad()
    def nearest(self, weight: Tensor) -> Tensor:
        """The weight on the method's set that is nearest to a given one."""
        if not self.constraint.orthogonal_start:
            return weight  # as it is, to the bit: dividing by the scale and multiplying again would round
        return self.layout.weight(self.constraint.closest(self.layout.points(weight), self.layout))

    def allows(self, residual: float, dtype: torch.dtype) -> bool:
        """Whether a residual is within what the method promises in a precision; true where it promises nothing."""
        claim = self.constraint.claim
        return claim is None or claim.allows(residual, dtype, self.layout.matrix_shape[1])


@torch.no_grad()
def residual_of(points: Tensor) -> float:
    """``‖XXᵀ − I‖_F/√p``, the largest of some matrices ``(b, p, n)``, in double precision."""
    x = in_double(points)
    return torch.linalg.matrix_norm(gram_residual(x)).max().item() / x.shape[-2] ** 0.5
