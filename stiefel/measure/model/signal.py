"""What orthogonality is for: whether layers keep the energy of signals and gradients, and whether filters repeat.

Imports ``attach`` and below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stiefel.attach import constrained_weights
from stiefel.attach.select import CONVOLUTIONS
from stiefel.errors import OptionError
from stiefel.linalg import in_double
from stiefel.measure.model.taps import UNCALLED, UNREACHED, Place, Taps, linear_maps


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

    Inputs and outputs of layers are seen as :class:`Taps` shows them.
    """

    def __init__(self, model: nn.Module) -> None:
        # A released layer or another optimizer may come later: the weights are looked up now, and the hooks removed.
        watched, self._others = linear_maps(model)
        self._names = [weight.name for weight in constrained_weights(model, ties=True)]
        self._sums: dict[str, _Sums] = {}
        self._taps = Taps(watched, self._see)

    @property
    def inputs(self) -> list[Tensor]:
        """What the layers were given, for :func:`torch.autograd.grad`; empty once the probe is left."""
        return self._taps.inputs

    def __enter__(self) -> Probe:
        self._taps.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._taps.__exit__(*error)

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
            reason = None if dx is not None else UNREACHED
            found[name] = LayerSignal(_ratio(y, x), _ratio(dx, dy), *totals, sums.calls, reason)
        unseen = [name for name in self._names if name not in found]
        return found | {n: LayerSignal(None, None, None, None, 0, self._others.get(n, UNCALLED)) for n in unseen}

    def _see(self, name: str, module: nn.Module, place: Place, tensor: Tensor) -> None:
        sums = self._sums.setdefault(name, _Sums())
        sums.calls += place == "x"
        sums.add(place, _without_bias(tensor, module) if place == "y" else tensor)


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
