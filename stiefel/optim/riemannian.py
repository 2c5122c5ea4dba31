"""geoopt's RiemannianSGD and RiemannianAdam, batched and with their first step right. Imports ``batched`` and geoopt.

geoopt's loops are the reference; the differences are these. Equal-shaped matrices of different weights move in one
batched call. The momentum buffer starts at the first gradient, as torch's does (geoopt seeds it with the raw gradient
and adds the Riemannian one: a first step 1.9 times too long at momentum 0.9). ``p.grad`` is never changed. State keys
and shapes are geoopt's, so state dicts are interchangeable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stiefel.compat.geoopt import geoopt
from stiefel.compat.sharding import is_sharded
from stiefel.compat.torch_private import copy_all_
from stiefel.errors import OptimizerError
from stiefel.linalg import full_precision, refuse_capture
from stiefel.optim.batched import Batched, manifold_of
from stiefel.optim.buckets import stack, unstack


class _Point:
    """The weights of one bucket as one point, with the operations of its manifold; a flat space where there is none.

    Gradients and momenta are in the weights' units, points in units of X: a displacement is divided by the scale when
    it moves the point.
    """

    def __init__(self, members: list[Tensor]) -> None:
        self.members = members
        self.manifold = manifold_of(members[0])
        self.layouts = [m.layout for p in members if (m := manifold_of(p)) is not None]
        self.x = self.points(members)

    def points(self, tensors: list[Tensor]) -> Tensor:
        return tensors[0] if self.manifold is None else stack(self.layouts, tensors, scaled=True)

    def vectors(self, tensors: list[Tensor]) -> Tensor:
        return tensors[0] if self.manifold is None else stack(self.layouts, tensors, scaled=False)

    def tensors(self, vectors: Tensor) -> list[Tensor]:
        return [vectors] if self.manifold is None else unstack(self.layouts, vectors, scaled=False)

    def gradient(self, weight_decay: float) -> Tensor:
        """``grad(G + λW)``, the Riemannian gradient at the point, in the weights' units."""
        grads = [p.grad for p in self.members if p.grad is not None]
        if weight_decay:
            grads = [g.add(p, alpha=weight_decay) for g, p in zip(grads, self.members, strict=True)]
        g = self.vectors(grads)
        return g if self.manifold is None else self.manifold.gradient(self.x, g)

    def second_moment(self, r: Tensor) -> Tensor:
        """r² entry by entry; on the manifold ⟨r, r⟩/(pn), one number per matrix, at each of its entries."""
        if self.manifold is None:
            return r * r
        return (self.manifold.inner_points(self.x, r, r) / r[0].numel())[:, None, None].expand_as(r)

    def advance(self, displacement: Tensor) -> None:
        """Move the weights by a displacement in their units."""
        if self.manifold is None:
            self.members[0].add_(displacement)
            return
        scale = self.layouts[0].scale
        self.x = self.manifold.retract(self.x, displacement / scale if scale != 1 else displacement)
        copy_all_(self.members, unstack(self.layouts, self.x, scaled=True))

    def transport(self, momentum: Tensor) -> list[Tensor]:
        """Momentum at the point advanced to, as the weights' own tensors: projected onto its tangent space."""
        return self.tensors(momentum if self.manifold is None else self.manifold.tangent(self.x, momentum))


class StiefelSGD(Batched, geoopt.optim.RiemannianSGD):
    """Riemannian SGD with momentum, dampening, nesterov and weight decay as torch.optim.SGD has them.

    On the manifold: ``r = grad(G + λW)``, ``m ← μ m + (1−d) r``, ``X ← R_X(−lr · m)``, m projected onto the new tangent
    space. On ordinary parameters it is torch.optim.SGD. ``stabilize=k`` re-projects every k steps, and is not needed.
    """

    def kept(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The momentum, where there is one."""
        return ("momentum_buffer",) if group["momentum"] else ()

    def move(self, group: dict[str, Any], members: list[Tensor]) -> None:
        """Move a bucket's weights, or an ordinary parameter, and their momentum."""
        momentum = group["momentum"]
        states = [self.state[p] for p in members]
        previous = [s["momentum_buffer"] for s in states if s.get("momentum_buffer") is not None]
        if momentum and 0 < len(previous) < len(members):  # a late first gradient starts a momentum of its own
            for p in members:
                self.move(group, [p])
            return
        with full_precision(members[0].device):
            point = _Point(members)
            r = point.gradient(group["weight_decay"])
            if not momentum:
                point.advance(-group["lr"] * r)
                return
            # As in torch the first gradient becomes the momentum as it is, without dampening.
            m = momentum * point.vectors(previous) + (1 - group["dampening"]) * r if previous else r.clone()
            # The point moves first: transport() projects onto the tangent space of the new one.
            point.advance(-group["lr"] * (r + momentum * m if group["nesterov"] else m))
            _store(states, "momentum_buffer", point.transport(m))


class StiefelAdam(Batched, geoopt.optim.RiemannianAdam):
    """Riemannian Adam: one second moment per matrix, ``⟨r, r⟩/(pn)``, so that lr means what it means in torch's Adam.

    On ordinary parameters it is torch.optim.Adam (with L2 weight decay). AMSGrad is supported.
    """

    counts = True

    def kept(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Both moments."""
        return ("exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if group["amsgrad"] else ())

    def move(self, group: dict[str, Any], members: list[Tensor]) -> None:
        """Move a bucket's weights, or an ordinary parameter, and their moments."""
        refuse_capture(members[0], "the bias correction of Riemannian Adam")
        beta1, beta2 = group["betas"]
        states = [self.state[p] for p in members]
        for p, state in zip(members, states, strict=True):
            state["step"] = torch.tensor(float(state.get("step", 0)) + 1)  # as torch keeps it
            for key in self.kept(group):
                state.setdefault(key, torch.zeros_like(p, memory_format=torch.preserve_format))
        step = int(states[0]["step"])
        with full_precision(members[0].device):
            point = _Point(members)
            r = point.gradient(group["weight_decay"])
            m = beta1 * point.vectors([s["exp_avg"] for s in states]) + (1 - beta1) * r
            v = beta2 * point.vectors([s["exp_avg_sq"] for s in states]) + (1 - beta2) * point.second_moment(r)
            if group["amsgrad"]:
                largest = torch.maximum(point.vectors([s["max_exp_avg_sq"] for s in states]), v)
                _store(states, "max_exp_avg_sq", point.tensors(largest))
            else:
                largest = v
            # As in torch the largest moment is kept uncorrected, and eps is added after the root.
            denominator = (largest / (1 - beta2**step)).sqrt_().add_(group["eps"])
            point.advance(-group["lr"] / (1 - beta1**step) * m / denominator)
            _store(states, "exp_avg", point.transport(m))
            _store(states, "exp_avg_sq", point.tensors(v))


def _store(states: list[dict[str, Any]], key: str, tensors: list[Tensor]) -> None:
    """Write new values into the tensors that are there: the replays of a captured step read those again."""
    kept = [state[key] for state in states if state.get(key) is not None]
    if len(kept) == len(states):
        # An ordinary parameter may be sharded, and moves by itself; torch copies no list of such.
        if is_sharded(kept[0]):
            kept[0].copy_(tensors[0])
        else:
            copy_all_(kept, tensors)
        return
    for state, tensor in zip(states, tensors, strict=True):
        state[key] = tensor.clone()  # a slice of a batch would keep the whole batch alive


def riemannian(cls: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The Riemannian form of an optimizer class: SGD or Adam.

    Raises:
        OptimizerError: any other class; no Riemannian form of it is defined.
    """
    forms: dict[type[torch.optim.Optimizer], type[torch.optim.Optimizer]] = {
        torch.optim.SGD: StiefelSGD,
        torch.optim.Adam: StiefelAdam,
        geoopt.optim.RiemannianSGD: StiefelSGD,
        geoopt.optim.RiemannianAdam: StiefelAdam,
    }
    if cls in forms:
        return forms[cls]
    if cls in forms.values():
        return cls
    raise OptimizerError(
        f"weights on a Riemannian manifold cannot be stepped by {cls.__name__}: use torch.optim.SGD or "
        "torch.optim.Adam, or a reparameterization, which takes any optimizer"
    )
