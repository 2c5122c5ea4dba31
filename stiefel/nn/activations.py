"""Activations whose outputs have mean 0 and variance 1 where their inputs have. Imports torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["PropagatedReLU"]

MEAN = 1 / math.sqrt(2 * math.pi)
DEVIATION = math.sqrt((1 - 1 / math.pi) / 2)
"""Mean and standard deviation of ``max(x, 0)`` for a standard normal x."""


class PropagatedReLU(nn.Module):
    """``y = (max(x, 0) − 1/√(2π)) / √(½ (1 − 1/π))``: mean 0 and variance 1 for standard normal inputs.

        model = nn.Sequential(stiefel.nn.OrthogonalLinear(64, 64), stiefel.nn.PropagatedReLU())

    Rows of unit length make of independent inputs of mean 0 and variance 1 outputs with the same, and nearly normal
    ones where they sum many. So each layer passes both on without statistics of a batch.

    Source: Arpit, Zhou, Kota and Govindaraju, Normalization Propagation, ICML 2016 (arXiv 1603.01431).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Rectify, centre and scale; any shape."""
        return (torch.relu(x) - MEAN) / DEVIATION
