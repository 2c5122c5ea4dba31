"""A weight as one operation of a compiled graph. Imports ``methods``, ``layout``, ``linalg``.

Traced through, a map is hundreds of operations that a compiler unrolls, fuses badly and compiles for a minute, that
cannot read a number to decide on a number of steps, and that cannot set the precision of products, a setting of the
process. As one operation it is computed as it is outside of a graph, to the bit. Its backward pass computes the map
again, since an operation of a graph can keep nothing but tensors between the two.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import cache
from typing import Any

import torch
from torch import Tensor

from stiefel.compat.torch_private import recording_within
from stiefel.constraint import Binding, Reparameterization
from stiefel.errors import StiefelError
from stiefel.layout import Layout
from stiefel.linalg import full_precision
from stiefel.methods import get


def text_of(binding: Binding, names: Sequence[str], gain: bool) -> str | None:
    """A map in words, which a graph can hold and another process can read.

    Args:
        binding: of the weight.
        names: of the method's parts, in the order of the tensors.
        gain: whether a learnable gain stands between the proxy and the parts.

    Returns:
        None for a method that cannot be made again from its name and options: one that is not registered.
    """
    method = binding.constraint
    changed = {f.name: getattr(method, f.name) for f in fields(method) if getattr(method, f.name) != f.default}
    words = {
        "method": method.name,
        "options": changed,
        "layout": asdict(binding.layout),
        "names": list(names),
        "gain": gain,
    }
    try:
        text = json.dumps(words)
        return text if _map(text)[0] == method else None
    except (TypeError, StiefelError):
        return None


@cache
def _map(text: str) -> tuple[Reparameterization, Layout, tuple[str, ...], bool]:
    words = json.loads(text)
    method = get(words["method"], **words["options"])
    assert isinstance(method, Reparameterization)
    known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in words["layout"].items()}
    return method, Layout(**known), tuple(words["names"]), words["gain"]


def computed(text: str, tensors: Sequence[Tensor]) -> Tensor:
    """The weight that a map in words makes of its proxy, gain and parts, in its own shape."""
    method, layout, names, gain = _map(text)
    with full_precision(tensors[0].device):
        parts = dict(zip(names, tensors[len(tensors) - len(names) :], strict=True))
        x = method.forward(layout.points(tensors[0]), layout, **parts)
        return layout.weight(x * tensors[1].reshape(*x.shape[:2], 1) if gain else x)


@torch.library.custom_op("stiefel::weight", mutates_args=())
def weight(tensors: Sequence[Tensor], text: str, trained: Sequence[bool]) -> Tensor:
    """:func:`computed` as one operation.

    Args:
        tensors: proxy, gain and parts.
        text: from :func:`text_of`.
        trained: which of the tensors get gradients.
    """
    with torch.no_grad():
        # An operation must not return one of its arguments.
        made = computed(text, tensors)
        return made.clone() if any(made.data_ptr() == t.data_ptr() for t in tensors) else made


@weight.register_fake
def _(tensors: Sequence[Tensor], text: str, trained: Sequence[bool]) -> Tensor:
    return tensors[0].new_empty(tensors[0].shape)


@torch.library.custom_op("stiefel::weight_backward", mutates_args=())
def weight_backward(gradient: Tensor, tensors: Sequence[Tensor], text: str, trained: Sequence[bool]) -> list[Tensor]:
    """The gradients of those tensors that are trained, and empty tensors for the others."""
    leaves = [t.detach().requires_grad_(want) for t, want in zip(tensors, trained, strict=True)]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    with recording_within(), full_precision(gradient.device):
        found = iter(torch.autograd.grad(computed(text, leaves), wanted, gradient, materialize_grads=True))
    return [next(found).contiguous() if leaf.requires_grad else leaf.new_empty(0) for leaf in leaves]


@weight_backward.register_fake
def _(gradient: Tensor, tensors: Sequence[Tensor], text: str, trained: Sequence[bool]) -> list[Tensor]:
    return [t.new_empty(t.shape if want else 0) for t, want in zip(tensors, trained, strict=True)]


def _keep(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Sequence[Tensor], str, Sequence[bool]], output: Tensor
) -> None:
    tensors, ctx.text, ctx.trained = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(*tensors)


def _backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[list[Tensor | None], None, None]:
    trained = ctx.trained  # type: ignore[attr-defined]
    found = weight_backward(gradient, list(ctx.saved_tensors), ctx.text, trained)  # type: ignore[attr-defined]
    return [g if want else None for g, want in zip(found, trained, strict=True)], None, None


weight.register_autograd(_backward, setup_context=_keep)
