"""What rests on LU factorizations, over batches. Imports only torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TOGETHER = 150
"""Largest matrices that torch factorizes rightly in batches, on a CPU with several threads."""


def one_by_one(function: Callable[..., Tensor], *batches: Tensor) -> Tensor:
    """A function of matrices that factorizes its first argument by LU, applied to ``(*batch, m, k)``.

    On a CPU torch factorizes a batch in several threads, in which MKL's row swaps of larger matrices fail: the factors
    are wrong, or an error says so (pytorch issue 142815, torch 2.5 to 2.13). Those are taken one after the other, each
    by all threads.
    """
    first = batches[0]
    outer = first.shape[:-2]
    if first.device.type != "cpu" or max(first.shape[-2:]) <= TOGETHER or outer.numel() < 2:
        return function(*batches)
    matrices = zip(*(b.reshape(-1, *b.shape[-2:]).unbind() for b in batches), strict=True)
    results = torch.stack([function(*m) for m in matrices])
    return results.reshape(*outer, *results.shape[1:])


def solve(a: Tensor, b: Tensor, *, left: bool = True) -> Tensor:
    """``A⁻¹ B``, or ``B A⁻¹``, for an A that is not singular: a GPU's host does not wait to be told that one is."""
    return one_by_one(lambda a, b: torch.linalg.solve_ex(a, b, left=left)[0], a, b)


def inverse_of(a: Tensor) -> Tensor:
    """``A⁻¹`` likewise."""
    return one_by_one(lambda a: torch.linalg.inv_ex(a)[0], a)
