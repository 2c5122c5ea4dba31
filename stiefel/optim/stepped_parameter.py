"""A parameter that a method moves in the step, and what is known of it. Imports ``constraint``, ``layout``."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stiefel.constraint import Penalty, StepMethod
from stiefel.layout import Layout


@dataclass
class Tally:
    """What training did to a weight.

    Args:
        steps: optimizer steps taken.
        shortened: how many of them a method shortened to keep the weight where it promises; None for methods that
            shorten none. A tensor while it is counted on a device, so that counting does not wait for it.
    """

    steps: int = 0
    shortened: Tensor | int | None = None


@dataclass(frozen=True)
class Ownership:
    """Which method moves a parameter, how the parameter is read, its name for messages, and its tally."""

    method: StepMethod | Penalty
    layout: Layout
    label: str
    tally: Tally

    def wants_tangent(self, forgets: bool) -> bool:
        """Whether the base gets P_X(G); where it ``forgets``, a method that projects its step makes the same of G."""
        method = self.method
        return isinstance(method, StepMethod) and method.tangent and not (forgets and method.projects)


class SteppedParameter(nn.Parameter):
    """A parameter that a method moves: under its old name, in its old shape, with the method attached.

    Ordinary parameters become one in place (``p.__class__ = SteppedParameter``), so ties and optimizers stay valid.
    """

    ownership: Ownership

    def __deepcopy__(self, memo: dict[int, Any]) -> SteppedParameter:
        if id(self) not in memo:
            data = self.data.clone(memory_format=torch.preserve_format)
            memo[id(self)] = hand_over(nn.Parameter(data, self.requires_grad), copy.deepcopy(self.ownership, memo))
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild_parameter, (self.data, self.requires_grad, self.ownership)


def hand_over(parameter: nn.Parameter, ownership: Ownership) -> SteppedParameter:
    """Hand a parameter over to a step method, in place."""
    parameter.__class__ = SteppedParameter
    assert isinstance(parameter, SteppedParameter)
    parameter.ownership = ownership
    return parameter


def take_back(parameter: nn.Parameter) -> None:
    """Take a parameter back from its step method, in place."""
    del parameter.ownership  # type: ignore[attr-defined]
    parameter.__class__ = nn.Parameter


def _rebuild_parameter(data: Tensor, requires_grad: bool, ownership: Ownership) -> Tensor:
    return hand_over(nn.Parameter(data, requires_grad), ownership)
