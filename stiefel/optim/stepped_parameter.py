"""A parameter that a method moves in the step, which knows the method. Imports ``constraint``."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from stiefel.constraint import Binding


class SteppedParameter(nn.Parameter):
    """A parameter that a method moves: under its old name, in its old shape, with the method attached.

    Ordinary parameters become one in place (``p.__class__ = SteppedParameter``), so ties and optimizers stay valid.
    """

    binding: Binding

    def __deepcopy__(self, memo: dict[int, Any]) -> SteppedParameter:
        # torch's own copy of a parameter keeps the class and loses the attributes. By way of memo the copy shares its
        # binding with the copied module.
        if id(self) not in memo:
            data = self.data.clone(memory_format=torch.preserve_format)
            memo[id(self)] = tag_stepped(nn.Parameter(data, self.requires_grad), copy.deepcopy(self.binding, memo))
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild_parameter, (self.data, self.requires_grad, self.binding)


def tag_stepped(parameter: nn.Parameter, binding: Binding) -> SteppedParameter:
    """Make a parameter one that its binding's method moves, in place."""
    parameter.__class__ = SteppedParameter
    assert isinstance(parameter, SteppedParameter)
    parameter.binding = binding
    return parameter


def untag(parameter: nn.Parameter) -> None:
    """Make it an ordinary parameter again."""
    del parameter.binding  # type: ignore[attr-defined]
    parameter.__class__ = nn.Parameter


def _rebuild_parameter(data: Tensor, requires_grad: bool, binding: Binding) -> Tensor:
    return tag_stepped(nn.Parameter(data, requires_grad), binding)
