"""What Riemannian optimizers have in common: which parameters move together, whole or sharded.

Imports ``manifold``, ``bases``, ``buckets``, ``exchange`` and geoopt.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from stiefel.compat.sharding import is_sharded, like, local_of
from stiefel.compat.torch_private import not_compiled
from stiefel.constraint import is_number
from stiefel.errors import OptimizerError
from stiefel.linalg import refuse_capture, require_exact
from stiefel.manifold.weight_manifold import StiefelWeight
from stiefel.optim.bases import IGNORED_BY_GEOOPT
from stiefel.optim.buckets import bucket
from stiefel.optim.exchange import exchange_of, exchanged_together


class Batched:
    """What both optimizers share: which parameters move together, and how a batch moves."""

    param_groups: list[dict[str, Any]]
    state: dict[Any, dict[str, Any]]
    batched = True  # what tells them from geoopt's own
    counts = False  # whether the state counts a parameter's steps
    _stabilize = None  # geoopt keeps it on the instance only, where a copy or a pickle loses it

    def __init__(self, params: Any, lr: float = 1e-3, **hyper: Any) -> None:
        self._refuse(hyper)
        # The ignored options that are left are off; foreach asks for batches, which these optimizers always use.
        hyper = {option: value for option, value in hyper.items() if option not in (*IGNORED_BY_GEOOPT, "foreach")}
        try:
            super().__init__(params, lr=lr, **hyper)  # type: ignore[call-arg]
        except TypeError as error:
            raise OptimizerError(
                f"{type(self).__name__} cannot be made with the options {sorted(hyper)}: {error}"
            ) from error

    def _refuse(self, options: dict[str, Any]) -> None:
        for option in IGNORED_BY_GEOOPT:
            if options.get(option):
                raise OptimizerError(
                    f"{type(self).__name__} does not support {option}=True: geoopt's optimizers would ignore it; "
                    "leave it out, or use a reparameterization with torch's optimizer"
                )
        dampening = options.get("dampening", 0)
        if not is_number(dampening):  # geoopt uses it from the second step on only
            raise OptimizerError(f"{type(self).__name__} does not support dampening={dampening!r}: expected a number")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, with the options checked."""
        self._refuse(param_group)
        super().add_param_group(param_group)  # type: ignore[misc]

    @not_compiled
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``closure``, where given, re-evaluates the loss and its gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # As in geoopt a group counts its steps, of which every k-th is followed by a projection (stabilize=k).
            group["step"] = group.get("step", 0) + 1
            ready = self._ready(group)
            if ready and group.get("stabilize") is not None:
                refuse_capture(ready[0], "stabilize")
            for members in bucket([p for p in ready if not self._is_shared(p)], self._key, lambda p: p):
                self.move(group, members)
            for shared in bucket([p for p in ready if self._is_shared(p)], exchanged_together):
                self._move_shared(group, shared)
            if group.get("stabilize") is not None and group["step"] % group["stabilize"] == 0:
                self.stabilize_group(group)  # type: ignore[attr-defined]
        return loss

    def _ready(self, group: dict[str, Any]) -> list[Tensor]:
        """The parameters with a gradient."""
        ready = [p for p in group["params"] if p.grad is not None]
        for p in ready:
            if p.grad.is_sparse:
                raise OptimizerError(
                    f"{type(self).__name__} does not support sparse gradients; make the layer that has them with "
                    "sparse=False"
                )
            manifold = manifold_of(p)
            if manifold is not None:
                require_exact(p.dtype, manifold.binding.label)
        return ready

    def _key(self, p: Tensor) -> Hashable:
        """What parameters have in common that move as one batch."""
        m = manifold_of(p)
        if m is None:
            return id(p)  # an ordinary parameter moves alone
        # Adam's bias corrections are one number per bucket, so its members have taken equally many steps.
        steps = int(self.state[p].get("step", 0))
        return m.metric, m.retraction, m.subspace, m.layout.matrix_shape[1:], m.layout.scale, p.dtype, p.device, steps

    def _is_shared(self, p: Tensor) -> bool:
        """Whether a weight is on the manifold and sharded; an ordinary parameter moves entry by entry, as it is."""
        return manifold_of(p) is not None and is_sharded(p)

    def kept(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The names of the state's tensors of a weight's shape."""
        raise NotImplementedError

    def _move_shared(self, group: dict[str, Any], parameters: list[Any]) -> None:
        """Move sharded weights, each whole at its owner, in whose place a copy moves with its state.

        With N entries on R processes, each receives (R−1)/R² · N entries for the weights, the gradients and each of
        the state's tensors, and for the new ones.
        """
        exchange, kept = exchange_of(parameters), self.kept(group)
        parts = []
        for p in parameters:
            state = self.state[p]
            parts.append([local_of(t) for t in (p, p.grad, *(state[k] for k in kept if state.get(k) is not None))])
        whole = exchange.gather(parts)
        copies = {i: self._copy(parameters[i], whole[i], kept) for i in exchange.owned}
        self.move_copies(group, list(copies.values()))
        moved = {i: [copy, *(self.state[copy][k] for k in kept)] for i, copy in copies.items()}
        for copy in copies.values():
            self.state.pop(copy)
        cut = exchange.scatter(moved, [1 + len(kept)] * len(parameters))
        for p, (weight, *tensors) in zip(parameters, cut, strict=True):
            local_of(p).copy_(weight)
            state = self.state[p]
            for name, tensor in zip(kept, tensors, strict=True):
                # Copied: a slice would keep alive all that was received, and torch's checkpoints take no such parts.
                state[name] = like(tensor.clone(memory_format=torch.contiguous_format), p)
            if self.counts:
                state["step"] = torch.tensor(float(state.get("step", 0)) + 1)

    def move_copies(self, group: dict[str, Any], copies: list[Tensor]) -> None:
        """Move the weights that this process owns."""
        for members in bucket(copies, self._key):
            self.move(group, members)

    def _copy(self, parameter: Any, whole: list[Tensor], kept: tuple[str, ...]) -> Tensor:
        """A whole weight in place of a sharded one, with its manifold, gradient and state."""
        state = self.state[parameter]
        copy, copy.grad, *tensors = whole
        copy.manifold = parameter.manifold  # type: ignore[attr-defined]
        names = [k for k in kept if state.get(k) is not None]
        self.state[copy] = {
            **dict(zip(names, tensors, strict=True)),
            **({"step": state["step"]} if "step" in state else {}),
        }
        return copy

    def move(self, group: dict[str, Any], members: list[Tensor]) -> None:
        """Move parameters that move together, one batch of weights or an ordinary parameter, and their states."""
        raise NotImplementedError


def manifold_of(p: Tensor) -> StiefelWeight | None:
    """The manifold that a weight is on; None for any other parameter."""
    manifold = getattr(p, "manifold", None)
    return manifold if isinstance(manifold, StiefelWeight) else None
