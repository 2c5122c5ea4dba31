"""What orthogonality is for: whether layers keep the energy of signals and gradients, and whether filters repeat.

Imports ``attach`` and below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stiefel.attach import constrained_weights
from stiefel.attach.select import CONVOLUTIONS
from stiefel.errors import OptionError
from stiefel.linalg import in_double


@dataclass(frozen=True)
class LayerSignal:
    """What one layer's linear map, without its bias, did to the energy of what passed through it.

    ``forward`` is ‖y‖/‖x‖ for y = W x, ``backward`` ‖∂L/∂x‖/‖∂L/∂y‖, where the gradient with respect to x is that
    through this layer alone; norms are over the batch, all positions and all calls, so that each is a root of a ratio
    of mean squares. ``forward_total`` is ‖y‖ over ‖x‖ of the first layer called and ``backward_total`` ‖∂L/∂x‖ over
    ‖∂L/∂y‖ of the last, both per call: how the signal has changed over the whole way, activations and all between
    included. ``calls`` are the calls seen. A ratio that was not measured is None, with the ``reason``.
    """

    forward: float | None
    backward: float | None
    forward_total: float | None
    backward_total: float | None
    calls: int
    reason: str | None = None


def preservation(model: nn.Module, run: Callable[[], Tensor]) -> dict[str, LayerSignal]:
    """How each constrained layer changes the norm of the signal forward and of the gradient backward.

    ``preservation(model, lambda: F.cross_entropy(model(x), y))``

    A square orthogonal Linear has 1 both ways, one of scale s has s; with p < n outputs, forward is the part of x in
    the row space, √(p/n) for white x, and backward is 1. A convolution's ratios are those of whole feature maps: where
    its windows overlap every input entry is used k² times, and padding adds windows that are partly empty, so that 1
    is exact only for windows that tile the input (stride = kernel size, no padding).

    Gradients of parameters are neither computed nor changed. What else ``run`` does (running means, random numbers)
    remains.

    Args:
        model: whose Linear, Conv1-3d and ConvTranspose1-3d with a constrained weight are measured.
        run: calls the model on a batch and returns the loss. Without a graph, only the forward ratios are measured.

    Returns:
        By the weights' names, in the order of their first calls, layers that were not seen last.

    Raises:
        OptionError: ``run`` did not return a single number.

    Source: Wang et al., *Orthogonal Convolutional Neural Networks*, CVPR 2020 (‖y‖ = ‖x‖); Schoenholz et al., *Deep
    Information Propagation*, ICLR 2017 (through depth).
    """
    with Probe(model) as probe:
        loss = run()
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            came = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise OptionError(f"run() returned {came}; it has to return the loss, a tensor of one element")
        if loss.requires_grad and probe.inputs:
            # The result is dropped: the probe's hooks see the gradients on their way, and no ``.grad`` is written.
            torch.autograd.grad(loss.reshape(()), probe.inputs, allow_unused=True)
    return probe.layers()


@torch.no_grad()
def redundancy(module: nn.Module) -> dict[str, float | None]:
    """Mean |cos| of the angles between different filters of each constrained weight: how much they repeat each other.

    Filters are the rows of the weight as (out, fan_in), compared within convolution groups, gates or blocks; 0 where
    they are orthogonal, 1 where they are all alike. A filter that is zero counts as orthogonal to all. More filters
    than inputs cannot all be orthogonal.

    Returns:
        By the weights' names; None for a single filter.

    Source: Wang et al., *Orthogonal Convolutional Neural Networks*, CVPR 2020, section 1 (filter similarity).
    """
    found: dict[str, float | None] = {}
    for weight in constrained_weights(module):
        layout = weight.binding.layout
        filters = layout.rows(layout.matrices(in_double(weight.value))).reshape(-1, layout.out, layout.fan_in)
        if layout.out == 1:
            found[weight.name] = None
            continue
        unit = nn.functional.normalize(filters, dim=-1)
        cosines = (unit @ unit.mH).abs()
        # The diagonal, |cos| = 1 of a filter with itself, is left out; out(out − 1) ordered pairs remain.
        off = cosines.sum() - cosines.diagonal(dim1=-2, dim2=-1).sum()
        found[weight.name] = off.item() / (len(filters) * layout.out * (layout.out - 1))
    return found


@dataclass
class _Sums:
    """Squared norms of one layer, summed over calls, on its device."""

    calls: int = 0
    squares: dict[str, Tensor] = field(default_factory=dict)

    def add(self, which: str, x: Tensor) -> None:
        x = x.detach()
        # abs, since vector_norm computes a complex tensor in complex dtypes only; float64, since squares in half
        # precision overflow.
        square = torch.linalg.vector_norm(x.abs() if x.is_complex() else x, dtype=torch.float64) ** 2
        self.squares[which] = self.squares[which] + square if which in self.squares else square

    def norm(self, which: str) -> float | None:
        """Root of the squared norm per call; None if it was not seen."""
        return (self.squares[which].item() / self.calls) ** 0.5 if which in self.squares else None


class Probe:
    """Watches the constrained layers of a model while it is entered, over forward passes and their backward passes.

    with Probe(model) as probe:
        loss_of(model).backward()
    probe.layers()

    A layer's input is replaced by a view of itself, so that the gradient through this layer alone is seen; an input
    that needs no gradient by one that does. Outputs may be changed in place afterwards, as by ReLU(inplace=True).
    """

    def __init__(self, model: nn.Module) -> None:
        # A released layer or another optimizer may come later: the weights are looked up now, and the hooks removed.
        self._weights = list(constrained_weights(model, ties=True))
        self._sums: dict[str, _Sums] = {}
        self._handles: list[RemovableHandle] = []
        self.inputs: list[Tensor] = []

    def __enter__(self) -> Probe:
        for weight in self._weights:
            if _is_linear_map(weight.owner, weight.tensor):
                before, after = self._hooks(weight.name)
                # Our hooks run next to the layer, since other hooks may change its input or output.
                self._handles += [
                    weight.owner.register_forward_pre_hook(before, with_kwargs=True),
                    weight.owner.register_forward_hook(after, with_kwargs=True, prepend=True),
                ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self.inputs = [], []

    def layers(self) -> dict[str, LayerSignal]:
        """What was seen so far; waits for the device."""
        rows = list(self._sums.values())  # in the order of first calls
        first = rows[0].norm("x") if rows else None
        # The last layer that a gradient reached: backward, the signal starts there.
        last = next((s.norm("dy") for s in reversed(rows) if "dy" in s.squares), None)
        found = {}
        for name, sums in self._sums.items():
            x, y, dx, dy = map(sums.norm, ("x", "y", "dx", "dy"))
            totals = _ratio(y, first), _ratio(dx, last)
            reason = None if dx is not None else "no gradient has reached it"
            found[name] = LayerSignal(_ratio(y, x), _ratio(dx, dy), *totals, sums.calls, reason)
        for weight in self._weights:
            if weight.name not in found:
                linear = _is_linear_map(weight.owner, weight.tensor)
                why = (
                    "it was not called, or the model was compiled before, and new hooks do not run"
                    if linear
                    else f"a {type(weight.owner).__name__} does not return the product with {weight.tensor} alone"
                )
                found[weight.name] = LayerSignal(None, None, None, None, 0, why)
        return found

    def _hooks(self, name: str) -> tuple[Callable[..., Any], Callable[..., None]]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            # Layers may be called as layer(x) or layer(input=x).
            x = args[0] if args else kwargs["input"]
            sums = self._sums.setdefault(name, _Sums())
            sums.calls += 1
            sums.add("x", x)
            if not torch.is_grad_enabled() or x.is_inference():
                return None
            # A hook on x itself would see the gradients through all layers that x enters.
            # An input without a gradient gets one here, or ∂L/∂x of the first layer would not be computed.
            seen = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            seen.register_hook(lambda gradient: sums.add("dx", gradient))
            self.inputs.append(seen)
            return ((seen, *args[1:]), kwargs) if args else (args, kwargs | {"input": seen})

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
            sums = self._sums[name]
            sums.add("y", _without_bias(y.detach(), module))
            if y.requires_grad:
                y.register_hook(lambda gradient: sums.add("dy", gradient))

        return before, after


def _is_linear_map(owner: nn.Module, tensor: str) -> bool:
    return isinstance(owner, (nn.Linear, CONVOLUTIONS)) and tensor == "weight"


def _without_bias(y: Tensor, module: nn.Module) -> Tensor:
    """An output of a linear map, in double precision where there is something to subtract."""
    assert isinstance(module, (nn.Linear, CONVOLUTIONS))
    if module.bias is None:
        return y
    # (channels, 1, …): broadcasts over the positions of a feature map.
    positions = len(module.kernel_size) if isinstance(module, CONVOLUTIONS) else 0
    return in_double(y) - in_double(module.bias.detach()).reshape(-1, *(1,) * positions)


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None
