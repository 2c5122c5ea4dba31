"""How well layers still distinguish their inputs: the variance of activations through depth. Imports ``attach``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stiefel.attach import constrained_weights
from stiefel.attach.select import CONVOLUTIONS
from stiefel.linalg import in_double


def activation_variance(model: nn.Module, run: Callable[[], Any]) -> dict[str, float | None]:
    """Variance of the output of each layer with a constrained weight, through depth.

    ``activation_variance(model, lambda: model(x))``

        v = mean over units of  mean |y − mean y|²,

    where a unit is an output of a Linear or a channel of a convolution, and its means are over the examples, all
    positions and all calls, as in BatchNorm. The energy of a signal (:func:`stiefel.measure.preservation`) includes
    the mean that all examples share; the variance is only the part by which they differ. Where signals die or explode,
    both shrink or grow by the same factor in each layer; where layers map all inputs to one, only the variance goes to
    zero.

    Args:
        model: with constrained weights.
        run: calls the model on a batch; what it returns is not used.

    Returns:
        By the weights' names, in the order of their layers' first calls. A layer that returns several things (as RNNs
        do) is measured by the first. None where a layer was not called or returns no tensor of units: those come last.

    Source: He, Zhang, Ren and Sun, *Delving Deep into Rectifiers*, ICCV 2015, section 2.2; Poole et al., *Exponential
    expressivity in deep neural networks through transient chaos*, NeurIPS 2016 (length, and what is common to inputs).
    """
    weights = list(constrained_weights(model, ties=True))
    sums: dict[str, list[Any]] = {}

    def watch(name: str, dimension: int) -> Callable[..., None]:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            y = output[0] if isinstance(output, (tuple, list)) and output else output
            if isinstance(y, Tensor) and y.ndim >= -dimension + 1:  # units, positions and examples
                moments = _moments(y, dimension)
                sums[name] = [a + b for a, b in zip(sums[name], moments, strict=True)] if name in sums else moments

        return after

    handles = []
    try:
        for weight in weights:
            positions = len(weight.owner.kernel_size) if isinstance(weight.owner, CONVOLUTIONS) else 0
            hook = watch(weight.name, -1 - positions)  # channels stand before the positions
            handles.append(weight.owner.register_forward_hook(hook, prepend=True))  # others may change the output
        run()
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, float | None] = {}
    for name, (total, square, count) in sums.items():
        found[name] = (square / count - (total / count).abs() ** 2).mean().item()  # E|y|² − |E y|²
    return found | {weight.name: None for weight in weights if weight.name not in found}


@torch.no_grad()
def _moments(y: Tensor, dimension: int) -> list[Tensor | int]:
    """Per unit, the sums of its values and of their squares; how many values each has."""
    # (values, units), in double because the variance is a difference of these sums.
    units = in_double(y.detach()).movedim(dimension, -1).flatten(0, -2)
    return [units.sum(0), (units.abs() ** 2).sum(0), len(units)]
