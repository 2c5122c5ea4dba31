"""Normalization of activations as a factor of an experiment: what stands between the layers of a network, and where."""

from __future__ import annotations

from torch import Tensor, nn

import stiefel.nn
from stiefel.errors import ProblemError

NORMS = ("none", "batch", "layer", "group", "instance", "whitening")
PLACES = ("after", "before")
GROUPS = 4
"""Groups of features that group normalization has, or as many of them as divide the features."""
WHITENED = 64
"""Features that are whitened together at most: of more a batch has too few examples."""


def norm(kind: str, features: int, dimensions: int = 0) -> nn.Module:
    """A normalization of ``(batch, features, *dimensions)``; the identity for ``"none"``.

    Args:
        kind: one of ``NORMS``.
        features: their number.
        dimensions: spatial ones, 0 or 2. Instance normalization is over these.

    Raises:
        ProblemError: there is none of that kind.
    """
    if kind not in NORMS:
        raise ProblemError(f"norm={kind!r}: expected one of {', '.join(NORMS)}")
    if kind == "instance" and not dimensions:
        raise ProblemError("norm='instance' needs images: over single features it would leave none; use 'layer'")
    spatial = dimensions > 0
    if kind == "batch":
        return nn.BatchNorm2d(features) if spatial else nn.BatchNorm1d(features)
    if kind == "layer":  # over all of an example's features, and places
        return nn.GroupNorm(1, features) if spatial else nn.LayerNorm(features)
    if kind == "group":
        return nn.GroupNorm(_divisor(features, GROUPS), features)
    if kind == "instance":
        return nn.InstanceNorm2d(features, affine=True)
    if kind == "whitening":
        size = _divisor(features, WHITENED)
        cls = stiefel.nn.Whitening2d if spatial else stiefel.nn.Whitening1d
        return cls(features, group_size=size)
    return nn.Identity()


def add(
    net: nn.Sequential, linear: nn.Module, names: tuple[str, str], kind: str, place: str, dimensions: int = 0
) -> None:
    """Append a linear map to a network, with a normalization before or after it; alone for ``"none"``.

    Args:
        net: the network.
        linear: the map, a linear layer or a convolution.
        names: of the map, and of the normalization.
        kind, dimensions: as for :func:`norm`.
        place: ``"after"`` the map, before the nonlinearity, as usual; or ``"before"`` it, on what the map receives.

    Raises:
        ProblemError: there is no such kind or place.
    """
    if place not in PLACES:
        raise ProblemError(f"norm_place={place!r}: expected before or after")
    assert isinstance(linear.weight, Tensor)
    outputs, inputs = linear.weight.shape[:2]
    parts = [(names[0], linear)]
    if kind != "none":
        parts.insert(place == "after", (names[1], norm(kind, outputs if place == "after" else inputs, dimensions)))
    for name, part in parts:
        net.add_module(name, part)


class OverStates(nn.Module):
    """A normalization of the states of a recurrent layer ``(batch, steps, features)``, over batch and steps at once."""

    def __init__(self, kind: str, features: int) -> None:
        super().__init__()
        self.norm = norm(kind, features)

    def forward(self, states: Tensor) -> Tensor:
        """The states, normalized."""
        return self.norm(states.flatten(0, -2)).reshape(states.shape)


def _divisor(number: int, most: int) -> int:
    return max(d for d in range(1, min(number, most) + 1) if number % d == 0)
