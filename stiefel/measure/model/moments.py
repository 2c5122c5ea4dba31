"""Second moments of what passes through a layer, as its Fisher block has them. Imports ``windows``, ``spectrum``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from stiefel.linalg import in_double
from stiefel.measure.model.spectrum import Spectrum, spectrum
from stiefel.measure.model.windows import dimensions, is_transposed, windows

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped

ENTRIES = 2**22
"""Entries of double precision that are gathered at once."""
LEAST = 2048
"""Rows that a sample has at least, where there are so many."""


class Rows(NamedTuple):
    """Rows of (g, d) at each of several places: ``view[place]`` is (g, *entries), where windows share memory."""

    view: Shaped[Tensor, "*places g *entries"]
    places: int
    """Dimensions that count places."""


class Moments:
    """``Σ h hᴴ`` over rows h, one matrix per group; of fewer rows than their width, the rows themselves.

    Args:
        per_entry: rows that are taken at a time for each entry of a row, but :data:`LEAST` at least, from evenly spread
            places; None for all.
        centred: whether the mean of the rows is subtracted.
    """

    def __init__(self, *, per_entry: int | None = None, centred: bool = False) -> None:
        self.per_entry, self.centred = per_entry, centred
        self.seen, self.total = 0, 0
        """Rows taken, and rows there were."""
        self._noise = 0.0  # relative rounding of the entries
        self._energy: Tensor | None = None  # (g,), sum of squared norms
        self._rows: list[Tensor] = []  # (g, r, d)
        self._second: Tensor | None = None  # (g, d, d)
        self._shift: Tensor | None = None  # (g, 1, d)
        self._sum: Tensor | None = None  # of the rows less the shift

    @torch.no_grad()
    def add(self, rows: Rows) -> None:
        """Take in more rows, a part at a time."""
        places, width = rows.view.shape[: rows.places], rows.view.shape[rows.places :].numel()
        if not rows.view.numel():
            return
        self._noise = max(self._noise, torch.finfo(rows.view.dtype).eps)
        self.total += places.numel()
        most = (
            None if self.per_entry is None else max(LEAST, self.per_entry * rows.view.shape[rows.places + 1 :].numel())
        )
        for at in _spread(places.numel(), most).split(max(1, ENTRIES // width)):
            index = torch.unravel_index(at.to(rows.view.device), places)
            self._take(in_double(rows.view[index].flatten(2)).transpose(0, 1))

    def spectrum(self, *, mean: bool, exact_to: int) -> list[Spectrum]:
        """Of the mean over the rows taken, or of the sum over all that there were, by group."""
        assert self._energy is not None
        matrices, size = self._matrices()
        scale = 1.0 if mean else float(self.total)
        # Rounding moves a singular value of the rows by no more than their norm times that of an entry (Weyl).
        floors = (self._noise**2 / self.seen * scale * self._energy).tolist()
        return [
            spectrum(scale * m, size=size, floor=floor, exact_to=exact_to)
            for m, floor in zip(matrices, floors, strict=True)
        ]

    def _take(self, rows: Float[Tensor, "g r d"]) -> None:
        energy = torch.linalg.vector_norm(rows, dim=(1, 2)) ** 2
        self._energy = energy if self._energy is None else self._energy + energy
        if self.centred:
            # The mean of the first rows is taken off all: a mean far from 0 would cost the digits of the rest.
            self._shift = rows.mean(1, keepdim=True) if self._shift is None else self._shift
            rows = rows - self._shift
        self.seen += rows.shape[1]
        added = rows.sum(1, keepdim=True)
        self._sum = added if self._sum is None else self._sum + added
        if self._second is None:
            self._rows.append(rows)
            if self.seen < rows.shape[-1]:
                return
            # No fewer rows than entries: from here on their products are the smaller ones to keep.
            rows = torch.cat(self._rows, dim=1) if len(self._rows) > 1 else rows
            self._rows = []
        product = rows.mT @ rows.conj()
        self._second = product if self._second is None else self._second + product

    def _matrices(self) -> tuple[Float[Tensor, "g m m"], int]:
        """Mean second moments, or with fewer rows than entries the smaller matrices of the same nonzero spectra."""
        assert self._sum is not None
        middle, size = self._sum / self.seen, self._sum.shape[-1]
        if self._second is None:
            rows = torch.cat(self._rows, dim=1)
            rows = rows - middle if self.centred else rows
            return rows @ rows.mH / self.seen, size
        second = self._second / self.seen
        return second - middle.mT @ middle.conj() if self.centred else second, size


def input_rows(layer: nn.Module, x: Tensor) -> Rows:
    """What each output of a layer is a product with: inputs; of a convolution windows, of a transposed one pixels."""
    n = dimensions(layer)
    if not n:
        return _vectors(x)
    images = x if x.ndim == n + 2 else x.unsqueeze(0)
    return _grouped(layer, images.movedim(1, -1) if is_transposed(layer) else windows(layer, images))


def gradient_rows(layer: Any, dy: Tensor) -> Rows:
    """Gradients with respect to outputs: pixels of a convolution's, and windows of a transposed one's."""
    n = dimensions(layer)
    if not n:
        return _vectors(dy)
    images = dy if dy.ndim == n + 2 else dy.unsqueeze(0)
    if not is_transposed(layer):
        return _grouped(layer, images.movedim(1, -1))
    found = windows(layer, images)
    # An output that is larger than the kernels' reach by whole strides has windows beyond the last input.
    beyond = [extra // stride for extra, stride in zip(layer.output_padding, layer.stride, strict=True)]
    return _grouped(layer, found[(slice(None), *(slice(-k if k else None) for k in beyond))])


def _vectors(x: Tensor) -> Rows:
    x = torch.atleast_2d(x)
    return Rows(x.unsqueeze(-2), x.ndim - 1)


def _grouped(layer: Any, rows: Shaped[Tensor, "b *positions c *kernel"]) -> Rows:
    places = dimensions(layer) + 1
    return Rows(rows.unflatten(places, (layer.groups, -1)), places)


def _spread(count: int, most: int | None) -> Shaped[Tensor, " rows"]:
    """Indices of all, or of one at random from each of ``most`` equal parts, always the same ones."""
    if most is None or count <= most:
        return torch.arange(count)
    # Not every k-th, which of an image might be the pixels of one column.
    part = torch.rand(most, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return ((torch.arange(most) + part) * (count / most)).long().clamp_max(count - 1)
