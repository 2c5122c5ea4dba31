"""Weights as functions of their proxies and parts, one or many in a batch. Imports ``constraint`` and below."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stiefel.constraint import Binding, Reparameterization
from stiefel.errors import DivergenceError
from stiefel.linalg import full_precision, require_exact, with_determinant, with_horizontal_gradient
from stiefel.optim.buckets import stack, unstack


class Formula(NamedTuple):
    """What a weight is a function of: of a proxy, a learnable gain where there is one, and the method's parts.

    Args:
        binding: of the weight.
        names: of the parts, in the order of their tensors.
        gain: whether there is a gain, which comes between the proxy and the parts.
    """

    binding: Binding
    names: tuple[str, ...]
    gain: bool


def computed_together(formula: Formula, tensors: Sequence[Tensor]) -> Hashable:
    """What weights have in common that one bucket computes."""
    binding, proxy = formula.binding, tensors[0]
    return id(binding.constraint), binding.layout, proxy.dtype, proxy.device, len(tensors)


class Bucket:
    """Weights by one method and of one layout, which are computed as one batch.

    Args:
        formulas: of one or more weights, with equally many tensors each.
    """

    def __init__(self, formulas: Sequence[Formula]) -> None:
        self.formulas, self.first = formulas, formulas[0]
        self.layouts = [f.binding.layout for f in formulas]

    def stack(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Stack the tensors of all, given one after the other: one tensor per kind.

        Raises:
            WeightError: the model was converted to a precision in which no weight is orthogonal.
        """
        width = len(tensors) // len(self.formulas)
        # Proxy, gain and parts of the first weight, then those of the second: a kind is every width-th tensor.
        proxies, *others = [tensors[i::width] for i in range(width)]
        for formula, proxy in zip(self.formulas, proxies, strict=True):
            require_exact(proxy.dtype, formula.binding.label)
        return [
            stack(self.layouts, proxies, scaled=True),
            *(o[0] if len(o) == 1 else torch.cat(list(o)) for o in others),
        ]

    def points(self, stacked: Sequence[Tensor]) -> Tensor:
        """The weights, in units of X but with their gains, as functions of the stacked tensors."""
        x = self.held(stacked)
        with full_precision(x.device):
            return x * stacked[1].reshape(*x.shape[:2], 1) if self.first.gain else x  # (Σb·p,) → (Σb, p, 1)

    def held(self, stacked: Sequence[Tensor]) -> Tensor:
        """The weights in units of X without gains: the points that the method keeps on its set.

        Raises:
            DivergenceError: a proxy is beyond what can be factorized.
        """
        method, names = self.first.binding.constraint, self.first.names
        assert isinstance(method, Reparameterization)
        with full_precision(stacked[0].device):
            # The parts come last, whether there is a gain before them or not.
            parts = dict(zip(names, stacked[len(stacked) - len(names) :], strict=True))
            try:
                x = method.forward(stacked[0], self.layouts[0], **parts)
                if method.determinant is not None:
                    return with_determinant(x, stacked[0], method.determinant)
            except torch.linalg.LinAlgError as error:
                labels = ", ".join(f"'{f.binding.label}'" for f in self.formulas)
                raise DivergenceError(
                    f"no weight can be computed from the proxy of {labels}: {error} Its entries are NaN, infinite or "
                    "too large; lower the learning rate"
                ) from error
            return with_horizontal_gradient(x) if method.subspace else x

    def weights(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Stack the tensors and compute the batch; returns the weights in their own shapes."""
        return unstack(self.layouts, self.points(self.stack(tensors)), scaled=True)
