"""Orthonormal rows within groups of outputs, in every layer that can have them."""

from dataclasses import replace

from torch import Tensor, nn

import stiefel


def constrain_in_groups(model: nn.Module, method: stiefel.Constraint, names: list[str], size: int) -> nn.Module:
    """Put a method on the weights of the layers named, in groups of ``size`` outputs or of as many as fit.

    A group has the most outputs into which those of the layer divide, ``size`` of them or fewer, and no more than a
    filter has entries: 64 of 256, all 10 of 10, 16 of the 64 filters of 3×3×3. A method with a group size of its own
    keeps it.
    """
    for group in sorted({_group(model.get_submodule(name), size) for name in names}):
        chosen = [name for name in names if _group(model.get_submodule(name), size) == group]
        stiefel.constrain(model, replace(method, group_size=method.group_size or group), layers=chosen)
    return model


def _group(layer: nn.Module, size: int) -> int:
    assert isinstance(layer.weight, Tensor)
    out, fan_in = len(layer.weight), layer.weight[0].numel()
    return max(rows for rows in range(1, min(size, fan_in) + 1) if out % rows == 0)
