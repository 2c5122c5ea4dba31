"""Equal-shaped reparameterized weights of a model, computed as one batch when its forward pass begins.

This only saves time: each parametrization can compute its own weight, but one batch of sixteen matrices takes less
time than sixteen calls. A forward pre-hook on the constrained module prefetches the weights for this pass and this
thread; a forward hook drops them. A layer uses its prefetched weight only where it would compute the same: gradients
are recorded, its proxy and parts are the same tensors, unchanged since, and no hook takes what autograd saves elsewhere
(gradient checkpointing runs a part of the pass again, without prefetched weights). Otherwise, under torch.compile and
in torch.func, it computes its own.

Imports ``parametrization``, ``weights``, ``prefetched``, ``snapshot``, ``optim`` and below.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from stiefel.attach.proxy.bucket import Bucket, computed_together
from stiefel.attach.proxy.parametrization import Reparametrized, needs_graph
from stiefel.attach.proxy.prefetched import PrefetchedWeight, begin, end, forget, offer, prefetched_weight
from stiefel.attach.proxy.snapshot import Snapshot
from stiefel.attach.weights import constrained_weights, first_parametrization
from stiefel.compat.sharding import is_sharded
from stiefel.compat.torch_private import has_hook, remove_hooks, saves_tensors_elsewhere
from stiefel.constraint import Reparameterization
from stiefel.linalg import full_precision, is_traced, nested_gradients
from stiefel.optim import is_lent
from stiefel.optim.buckets import bucket, stack, unstack

# By module: the owner and the name of each reparameterized tensor below it, looked up once.
_places: WeakKeyDictionary[nn.Module, list[tuple[ref[nn.Module], str]]] = WeakKeyDictionary()


def prefetch_below(root: nn.Module) -> None:
    """From now on compute the reparameterized weights below ``root`` together, at each of its forward passes."""
    _places.pop(root, None)
    if not has_hook(root, _before_forward):
        root.register_forward_pre_hook(_before_forward)
        root.register_forward_hook(_after_forward, always_call=True)


def prefetch_list(owner: nn.Module) -> None:
    """Compute the weights of a list or dictionary together, when one is read: it has no forward pass."""
    if not is_traced() and not saves_tensors_elsewhere():
        offer(_computed(owner))


def forget_places() -> None:
    """Look up anew, in all models, which weights there are: a layer has got some in a forward pass."""
    _places.clear()


def stop_prefetch(root: nn.Module) -> None:
    """Take the hooks off."""
    _places.pop(root, None)
    remove_hooks(root, _before_forward, _after_forward)


@dataclass(frozen=True)
class _Member:
    """A parametrization, and the tensors that its weight is a function of, the proxy first."""

    parametrization: Reparametrized
    tensors: tuple[Tensor, ...]


def _before_forward(root: nn.Module, args: Any) -> None:
    if not torch.is_grad_enabled() or is_traced() or saves_tensors_elsewhere():
        return
    forget(root)
    begin(root, _computed(root))


def _computed(root: nn.Module) -> list[PrefetchedWeight]:
    """The weights below ``root``, those of equal layout as one batch."""
    prefetched = []
    for members in bucket(_members(root), _alike, lambda m: m.tensors[0]):
        # Before the weights: a proxy that is changed meanwhile then makes them invalid.
        snapshots = [Snapshot(m.tensors) for m in members]
        weights = _Together.apply(
            Bucket([m.parametrization.formula for m in members]), *(t for m in members for t in m.tensors)
        )
        prefetched += [
            PrefetchedWeight(m.parametrization, s, w) for m, s, w in zip(members, snapshots, weights, strict=True)
        ]
    return prefetched


def _alike(member: _Member) -> Hashable:
    return computed_together(member.parametrization.formula, member.tensors)


def _after_forward(root: nn.Module, args: Any, output: Any) -> None:
    if not is_traced():
        end(root)


def _members(root: nn.Module) -> list[_Member]:
    """The reparameterized weights below ``root`` that train, without those prefetched by an enclosing pass.

    Their places are looked up once. The weight of a module replaced later is not prefetched, or prefetched in vain.
    """
    if root not in _places:
        weights = [w for w in constrained_weights(root) if isinstance(w.binding.constraint, Reparameterization)]
        _places[root] = [(ref(w.owner), w.tensor) for w in weights]
    members = []
    for owner, tensor in _places[root]:
        parametrization, proxy = first_parametrization(owner(), tensor)
        if not isinstance(parametrization, Reparametrized) or proxy is None:
            continue
        # A layer computes from the whole of a sharded proxy, which fully_shard brings in for its own forward pass.
        if is_sharded(proxy) or is_lent(proxy) or parametrization.held is not None:
            continue
        tensors = parametrization.tensors(proxy)
        if needs_graph(tensors) and prefetched_weight(parametrization, tensors) is None:
            members.append(_Member(parametrization, tensors))
    return members


class _Together(torch.autograd.Function):
    """The weights of a bucket as one function, which any number of backward passes may differentiate.

    Weights computed one by one have a graph each. The first backward pass would free the one graph of a batch, and
    weights that were not used would get a gradient of zeros instead of None. So the graph of the batch is kept here
    until a backward pass has reached all of its weights; after that, and for second derivatives, it is built again.
    """

    @staticmethod
    def forward(ctx: Any, bucket: Bucket, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # None, not zeros, from weights that were not used
        ctx.bucket, ctx.tensors, ctx.snapshot = bucket, tensors, Snapshot(tensors)
        ctx.graph = _graph(bucket, tensors)
        return tuple(unstack(bucket.layouts, ctx.graph[1].detach(), scaled=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        twice = torch.is_grad_enabled()  # as under create_graph=True
        if (twice or ctx.graph is None) and not ctx.snapshot.holds_for(ctx.tensors):
            raise RuntimeError(
                "a proxy parameter was changed in place between a forward pass and a second backward pass through it; "
                "step the optimizer after the last backward pass"
            )
        with full_precision(ctx.tensors[0].device):
            return None, *(_Together.second(ctx, gradients) if twice else _Together.first(ctx, gradients))

    @staticmethod
    def first(ctx: Any, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """First derivatives for all tensors by one pass through the batch; None for those of unused weights."""
        bucket = ctx.bucket
        leaves, points = ctx.graph or _graph(bucket, ctx.tensors)
        shapes = [layout.shape for layout in bucket.layouts]
        # The batch needs a gradient for each weight. Those that were not used get zeros here, and None in the result.
        filled = [points.new_zeros(s) if g is None else g for s, g in zip(shapes, gradients, strict=True)]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        # W = s·X, and X is a function of V/s: for the proxy V the factors s and 1/s cancel, and no matrix is scaled ...
        g = stack(bucket.layouts, filled, scaled=False)
        found = iter(torch.autograd.grad(points, wanted, g, retain_graph=True, allow_unused=True))
        # One batched gradient for each kind of tensor: proxies, gains, each of the parts.
        of_kind = [next(found) if leaf.requires_grad else None for leaf in leaves]
        if all(g is not None for g in gradients):  # every weight has been reached, so that the memory can be freed
            ctx.graph = None
        width, scale = len(leaves), bucket.layouts[0].scale
        result: list[Tensor | None] = [None] * len(ctx.tensors)
        for kind, gradient in enumerate(of_kind):
            if gradient is None:
                continue
            if kind == 0:
                parts = unstack(bucket.layouts, gradient, scaled=False)
            else:  # ... but a gain or a part is not divided by s, and the factor s remains
                whole = gradient * scale if scale != 1 else gradient
                parts = list(whole.split([len(t) for t in ctx.tensors[kind::width]]))
            for i, part in enumerate(parts):
                if gradients[i] is not None and ctx.needs_input_grad[1 + i * width + kind]:
                    result[i * width + kind] = part
        return result

    @staticmethod
    def second(ctx: Any, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The same with a graph, from the weights that were used alone, so that the others are not in the graph."""
        used = [i for i, g in enumerate(gradients) if g is not None]
        width = len(ctx.tensors) // len(gradients)
        own = [k for i in used for k in range(i * width, (i + 1) * width)]  # the tensors of the weights used
        again = Bucket([ctx.bucket.formulas[i] for i in used])
        found = nested_gradients(
            lambda *tensors: again.weights(tensors),
            [ctx.tensors[k] for k in own],
            [g for g in gradients if g is not None],
        )
        result: list[Tensor | None] = [None] * len(ctx.tensors)
        for k, gradient in zip(own, found, strict=True):
            result[k] = gradient
        return result


def _graph(bucket: Bucket, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Stacked leaves with the values of ``tensors``, and the points as a function of them."""
    with torch.no_grad():
        stacked = bucket.stack(tensors)
    width = len(stacked)
    with torch.enable_grad():
        # A kind (proxies, gains, one of the parts) gets gradients if any member's does.
        leaves = [
            t.detach().requires_grad_(any(u.requires_grad for u in tensors[kind::width]))
            for kind, t in enumerate(stacked)
        ]
        return leaves, bucket.points(leaves)
