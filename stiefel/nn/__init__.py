"""Layers: with a constrained weight, with whitened outputs, with a rectifier that keeps mean and variance."""

from stiefel.nn.activations import PropagatedReLU
from stiefel.nn.layers import OrthogonalConv2d, OrthogonalLinear
from stiefel.nn.whitening import Whitening1d, Whitening2d

__all__ = ["OrthogonalConv2d", "OrthogonalLinear", "PropagatedReLU", "Whitening1d", "Whitening2d"]
