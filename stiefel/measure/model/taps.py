"""Hooks on layers that are linear maps: what enters and leaves them, and the gradients on their way back.

Imports ``attach``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stiefel.attach import constrained_weights
from stiefel.attach.select import SUPPORTED

Place = Literal["x", "y", "dx", "dy"]
"""A layer's input and output, and the gradients with respect to them."""
See = Callable[[str, nn.Module, Place, Tensor], None]
"""Takes a weight's name, its layer, the place and what is there."""

UNCALLED = "it was not called, or the model was compiled before, and new hooks do not run"
UNREACHED = "no gradient has reached it"


def is_linear_map(owner: nn.Module, tensor: str) -> bool:
    """Whether a layer's output is the product with this weight, plus a bias."""
    return isinstance(owner, SUPPORTED) and tensor == "weight"


def linear_maps(model: nn.Module, *, unconstrained: bool = False) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The Linear, Conv1-3d and ConvTranspose1-3d with a constrained weight; layers that share one come each.

    Args:
        model: where to look.
        unconstrained: whether those without a constraint come too, after the others.

    Returns:
        The layers by their weights' names; and by name why the layers of other constrained weights are none.
    """
    layers: dict[str, nn.Module] = {}
    others: dict[str, str] = {}
    for weight in constrained_weights(model, ties=True):
        if is_linear_map(weight.owner, weight.tensor):
            layers[weight.name] = weight.owner
        else:
            others[weight.name] = (
                f"a {type(weight.owner).__name__} does not return the product with {weight.tensor} alone"
            )
    if unconstrained:
        known = {id(layer) for layer in layers.values()}
        for path, module in model.named_modules():
            if isinstance(module, SUPPORTED) and id(module) not in known:
                layers[f"{path}.weight" if path else "weight"] = module
    return layers, others


class Taps:
    """Shows what passes through layers while it is entered, over forward passes and their backward passes.

    A layer's input is replaced by a view of itself, so that the gradient through this layer alone is seen; an input
    that needs no gradient by one that does. Outputs may be changed in place afterwards, as by ReLU(inplace=True).
    ``inputs`` are these inputs: ``torch.autograd.grad(loss, taps.inputs, allow_unused=True)`` shows all gradients and
    writes no ``.grad``.

    Args:
        layers: by name.
        see: what is called with each.
    """

    def __init__(self, layers: Mapping[str, nn.Module], see: See) -> None:
        self._layers, self._see = dict(layers), see
        self._handles: list[RemovableHandle] = []
        self.inputs: list[Tensor] = []

    def __enter__(self) -> Taps:
        for name, layer in self._layers.items():
            before, after = self._hooks(name)
            # Our hooks run next to the layer, since other hooks may change its input or output.
            self._handles += [
                layer.register_forward_pre_hook(before, with_kwargs=True),
                layer.register_forward_hook(after, with_kwargs=True, prepend=True),
            ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self.inputs = [], []

    def _hooks(self, name: str) -> tuple[Callable[..., Any], Callable[..., None]]:
        see = self._see

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            # Layers may be called as layer(x) or layer(input=x).
            x = args[0] if args else kwargs["input"]
            see(name, module, "x", x.detach())
            if not torch.is_grad_enabled() or x.is_inference():
                return None
            # A hook on x itself would see the gradients through all layers that x enters.
            # An input without a gradient gets one here, or ∂L/∂x of the first layer would not be computed.
            seen = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            seen.register_hook(lambda gradient: see(name, module, "dx", gradient.detach()))
            self.inputs.append(seen)
            return ((seen, *args[1:]), kwargs) if args else (args, kwargs | {"input": seen})

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
            see(name, module, "y", y.detach())
            if y.requires_grad:
                y.register_hook(lambda gradient: see(name, module, "dy", gradient.detach()))

        return before, after
