"""Methods on the step that take the base optimizer's momentum along. Imports ``base`` and ``manifold.geometry``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from stiefel.constraint.base import StepMethod
from stiefel.manifold.geometry import project_tangent

if TYPE_CHECKING:
    from jaxtyping import Float


class TransportMethod(StepMethod):
    """Acts on the step, and carries the base optimizer's momentum to the tangent space at the new point.

    A sum of tangent gradients is tangent where the last one was taken, and not where the weight has moved to since.
    Other methods leave a momentum as it is, a vector of the flat space around the set, and project each step. This kind
    replaces it by :meth:`transport` after each step, in the optimizer's own tensor. It is done for momenta that are the
    next step's direction (of SGD, RMSprop, Muon), and not for means that are yet to be divided entry by entry (Adam's).
    """

    def transport(
        self, x: Float[Tensor, "b p n"], moved: Float[Tensor, "b p n"], momentum: Float[Tensor, "b p n"]
    ) -> Float[Tensor, "b p n"]:
        """A tangent at X as one at the point that X has moved to, linear in it: by default ``P_{X⁺}(M)``.

        Source: Absil, Mahony and Sepulchre (2008), section 8.1.3, transport by projection.
        """
        return project_tangent(moved, momentum)
