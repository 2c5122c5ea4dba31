"""Layers that are orthogonal from the start: a Linear and a Conv2d with a constraint on their weight.

Each class is a layer of torch to which ``constrain`` has been applied. Imports ``attach`` and ``constraint``.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from stiefel.attach.constrain import constrain
from stiefel.constraint import Constraint

__all__ = ["OrthogonalConv2d", "OrthogonalLinear"]


class OrthogonalLinear(nn.Linear):
    """``y = W x + b`` with W on ``{W : W Wᵀ = scale² I}`` (or its columns, where out > in).

        layer = stiefel.nn.OrthogonalLinear(100, 64, scale="relu")

    Args:
        in_features, out_features, bias, device, dtype: as for :class:`torch.nn.Linear`.
        constraint: a name from :func:`stiefel.available`, or a constraint object. With a method that acts on the step,
            train the layer with :func:`stiefel.optimizer`.
        options: of the method, such as ``scale="relu"``.

    Raises:
        As :func:`stiefel.constrain`.

    Source: Huang et al., AAAI 2018, section 3.3: the orthogonal linear module (OLM), here for any method.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        constraint: str | Constraint = "own",
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        constrain(self, constraint, **options)


class OrthogonalConv2d(nn.Conv2d):
    """A 2-d convolution whose kernel, read as (out, in/groups · k · k) per group, is on the set.

        layer = stiefel.nn.OrthogonalConv2d(64, 128, 3, padding=1, scale="relu")

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            for :class:`torch.nn.Conv2d`.
        constraint, options: as for :class:`OrthogonalLinear`.

    Source: as for :class:`OrthogonalLinear`, section 3.4.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Any = "zeros",
        *,
        constraint: str | Constraint = "own",
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device=device,
            dtype=dtype,
        )
        constrain(self, constraint, **options)
