"""The Gauss-Newton block of one weight, without an approximation. Imports ``taps`` and ``attach``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stiefel.attach import constrained_weights, release
from stiefel.errors import OptionError, SelectionError, nearest_names
from stiefel.linalg import in_double
from stiefel.measure.model.taps import linear_maps

if TYPE_CHECKING:
    from jaxtyping import Float

MOST = 256
"""Entries of a weight whose block is computed."""


def gauss_newton_block(
    model: nn.Module,
    weight: str,
    outputs: Callable[[nn.Module], Tensor],
    loss: Callable[[Tensor], Tensor],
    *,
    most: int = MOST,
) -> Float[Tensor, "k k"]:
    """The block ``G = Jᵀ H J`` of the Gauss-Newton matrix that belongs to one weight.

    ``gauss_newton_block(model, "0.weight", lambda model: model(x), lambda z: F.cross_entropy(z, y))``

    J = ∂z/∂W is the Jacobian of all outputs z in the weight's k entries, H = ∂²L/∂z² the Hessian of the loss in them.
    A layer's Kronecker factors (:func:`stiefel.measure.conditioning`) approximate G by S ⊗ A, that of a transposed
    convolution by A ⊗ S. It takes k products with J and with H at once, and k times the memory of z.

    Args:
        model: constrained or not; stays as it is. It must be one that can be copied, in a mode in which it changes
            nothing (``eval()`` for batch normalization), and whose operators have forward derivatives.
        weight: its name, as measurements give it: ``"0.weight"``.
        outputs: of a model like the one given, on a batch.
        loss: of these outputs.
        most: the largest k that is computed.

    Returns:
        (k, k) in double precision, in the order of ``W.flatten()``.

    Raises:
        SelectionError: no layer has a weight of that name.
        OptionError: the weight is larger than ``most``, complex, or computed by a parametrization of another library.

    Source: Schraudolph, Neural Computation 2002; Martens, *New Insights and Perspectives on the Natural Gradient
    Method*, JMLR 2020, section 8.
    """
    path = _path(model, weight)
    # Released, a weight is a plain parameter, in which outputs are differentiated.
    plain = _Outputs(release(copy.deepcopy(model), whole=False).requires_grad_(False), outputs)
    value = _value(plain.model, path, most)

    def of(w: Tensor) -> Tensor:
        return torch.func.functional_call(plain, {f"model.{path}": w}, ())

    entries = torch.eye(value.numel(), dtype=value.dtype, device=value.device).reshape(-1, *value.shape)
    moved = torch.func.vmap(lambda v: torch.func.jvp(of, (value,), (v,))[1], randomness="same")(entries)
    # H is symmetric: products with it as pull-backs, which more losses have than forward derivatives of gradients.
    pull = torch.func.vjp(torch.func.grad(loss), of(value))[1]
    (curved,) = torch.func.vmap(pull, randomness="same")(moved)
    block = in_double(moved.flatten(1)) @ in_double(curved.flatten(1)).mT
    return (block + block.mT) / 2


def _path(model: nn.Module, weight: str) -> str:
    """A weight's name among the parameters of the model, once that is released."""
    layers, _ = linear_maps(model, unconstrained=True)
    if weight not in layers:
        raise SelectionError(f"no layer has a weight {weight!r}; {nearest_names(weight, layers)}")
    return {found.name: found.path for found in constrained_weights(model, ties=True)}.get(weight, weight)


def _value(plain: nn.Module, path: str, most: int) -> Tensor:
    """The parameter whose block it is."""
    value = dict(plain.named_parameters(remove_duplicate=False)).get(path)
    if value is None:
        raise OptionError(f"weight {path!r} is computed by a parametrization of another library; remove that first")
    if value.numel() > most or value.is_complex():
        what = "complex" if value.is_complex() else f"of {value.numel()} entries, more than most={most}"
        raise OptionError(
            f"weight {path!r} is {what}; measure.conditioning gives the Kronecker factors of a block of any size"
        )
    return value


class _Outputs(nn.Module):
    """A model with the function that takes its outputs, as a module whose weights can be replaced."""

    def __init__(self, model: nn.Module, outputs: Callable[[nn.Module], Tensor]) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(self) -> Tensor:
        return self.outputs(self.model)
