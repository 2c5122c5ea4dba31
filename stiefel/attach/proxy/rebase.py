"""The starts of trivializations moved to where their weights are. Imports ``bucket``, ``parametrization``, ``compat``.

    X₀ ← X = φ(X₀, P(V)),   V ← s X     every K steps: the same weight, and a tangent part of zero

It is done after the optimizer's step, when no evaluation of the loss is under way, and in place, so that compiled
models and captured graphs read the new values. The optimizer's state stays: a gradient or a moment of V is an array of
the weight's own space, of which the map takes the part P that is tangent at its start, from now on at the new one:
vector transport by projection (Absil, Mahony and Sepulchre 2008, section 8.1.3). L-BFGS alone begins anew: its pairs of
steps and gradients model the curvature in coordinates that are gone.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from stiefel.attach.proxy.bucket import Bucket, computed_together
from stiefel.attach.proxy.parametrization import Reparametrized
from stiefel.compat.sharding import whole, write
from stiefel.optim.buckets import bucket

_Member = tuple[Reparametrized, Tensor]


@torch.no_grad()
def move_starts(due: Sequence[_Member]) -> None:
    """Start the maps of some weights where these are now.

    Args:
        due: each weight's parametrization and its proxy; of a sharded one all processes come here together.
    """
    for members in bucket(due, _alike, lambda member: member[1]):
        together = Bucket([parametrization.formula for parametrization, _ in members])
        x = together.held(together.stack([whole(t) for member in members for t in _tensors(member)]))
        counts = [layout.matrix_shape[0] for layout in together.layouts]
        for (parametrization, proxy), points in zip(members, x.split(counts), strict=True):
            start, parts = parametrization.started(points)
            write(proxy, start)
            for name, part in parts.items():
                write(getattr(parametrization.parts, name), part)
            parametrization.cached = None


def _tensors(member: _Member) -> tuple[Tensor, ...]:
    parametrization, proxy = member
    return parametrization.tensors(proxy)


def _alike(member: _Member) -> Hashable:
    return computed_together(member[0].formula, _tensors(member))
