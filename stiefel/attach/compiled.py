"""Weights as one operation of a compiled graph. Imports ``bucket``, ``methods``, ``layout``, ``linalg``.

Traced through, a map is hundreds of operations that a compiler unrolls, fuses badly and compiles for a minute, that
cannot read a number to decide on a number of steps, and that cannot set the precision of products, a setting of the
process. As one operation it is computed as it is outside of a graph, to the bit, and equal weights of a model as one
batch. The backward pass computes the map again: between the two an operation of a graph keeps nothing but tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from functools import cache
from typing import Any

import torch
from torch import Tensor

from stiefel.attach.bucket import Bucket, Formula
from stiefel.compat.torch_private import recording_within
from stiefel.constraint import Binding
from stiefel.errors import StiefelError
from stiefel.layout import Layout
from stiefel.linalg import full_precision, require_exact
from stiefel.methods import get
from stiefel.optim import is_lent


def text_of(formula: Formula) -> str | None:
    """A formula in words, which a graph can hold and another process can read; equal ones are computed together.

    Returns:
        None for a method that cannot be made again from its name and options: one that is not registered.
    """
    method = formula.binding.constraint
    changed = {f.name: getattr(method, f.name) for f in fields(method) if getattr(method, f.name) != f.default}
    words = {
        "method": method.name,
        "options": changed,
        "layout": asdict(formula.binding.layout),
        "names": list(formula.names),
        "gain": formula.gain,
    }
    try:
        text = json.dumps(words)
        return text if formula_of(text).binding.constraint == method else None
    except (TypeError, StiefelError):
        return None


@cache
def formula_of(text: str) -> Formula:
    """The inverse of :func:`text_of`, but for the weight's name."""
    words = json.loads(text)
    method = get(words["method"], **words["options"])
    known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in words["layout"].items()}
    return Formula(Binding(method, Layout(**known), "of a compiled model"), tuple(words["names"]), words["gain"])


def begin(lists: Iterable[Any]) -> None:
    """Compute equal weights together, when a traced pass begins.

    Args:
        lists: torch's lists of parametrizations, of each weight.
    """
    groups: dict[str, list[Any]] = {}
    for each in lists:
        text = getattr(each[0], "text", None)
        if text is not None and each[0].ahead is None and not is_lent(each.original):
            groups.setdefault(f"{text} {each.original.dtype} {each.original.device}", []).append(each)
    for members in groups.values():
        if len(members) > 1:
            tensors = [t for each in members for t in each[0].tensors(each.original)]
            for each, made in zip(members, weights_of([each[0] for each in members], tensors), strict=True):
                each[0].ahead = made


def end(lists: Iterable[Any]) -> None:
    """Forget them, before the trace ends."""
    for each in lists:
        each[0].ahead = None


def weights_of(parametrizations: Sequence[Any], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The weights of equal parametrizations as one operation, given the tensors of one after the other.

    Raises:
        WeightError: the model was converted to a precision in which no weight is orthogonal.
    """
    for each in parametrizations:
        require_exact(tensors[0].dtype, each.binding.label)
    trained = [torch.is_grad_enabled() and t.requires_grad for t in tensors]
    return weights(list(tensors), parametrizations[0].text, trained)


def _computed(tensors: Sequence[Tensor], text: str) -> list[Tensor]:
    formula = formula_of(text)
    width = 1 + formula.gain + len(formula.names)
    with full_precision(tensors[0].device):
        return Bucket([formula] * (len(tensors) // width)).weights(tensors)


@torch.library.custom_op("stiefel::weights", mutates_args=())
def weights(tensors: Sequence[Tensor], text: str, trained: Sequence[bool]) -> list[Tensor]:
    """The operation.

    Args:
        tensors: proxy, gain and parts of each weight.
        text: from :func:`text_of`.
        trained: which of the tensors get gradients.
    """
    with torch.no_grad():
        # Operations return tensors of their own, no parts of one, and none of their arguments.
        return [made.clone() for made in _computed(tensors, text)]


@weights.register_fake
def _(tensors: Sequence[Tensor], text: str, trained: Sequence[bool]) -> list[Tensor]:
    formula = formula_of(text)
    proxies = tensors[:: 1 + formula.gain + len(formula.names)]
    return [proxy.new_empty(formula.binding.layout.shape) for proxy in proxies]


@torch.library.custom_op("stiefel::weights_backward", mutates_args=())
def weights_backward(
    gradients: Sequence[Tensor], tensors: Sequence[Tensor], text: str, trained: Sequence[bool]
) -> list[Tensor]:
    """The gradients of those tensors that are trained, and empty tensors for the others."""
    leaves = [t.detach().requires_grad_(want) for t, want in zip(tensors, trained, strict=True)]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    with recording_within(), full_precision(gradients[0].device):
        found = iter(torch.autograd.grad(_computed(leaves, text), wanted, list(gradients), materialize_grads=True))
    return [next(found).clone() if leaf.requires_grad else leaf.new_empty(0) for leaf in leaves]


@weights_backward.register_fake
def _(gradients: Sequence[Tensor], tensors: Sequence[Tensor], text: str, trained: Sequence[bool]) -> list[Tensor]:
    return [t.new_empty(t.shape if want else 0) for t, want in zip(tensors, trained, strict=True)]


def _setup(ctx: Any, inputs: tuple[Sequence[Tensor], str, Sequence[bool]], output: list[Tensor]) -> None:
    tensors, ctx.text, ctx.trained = inputs
    ctx.set_materialize_grads(False)  # None, not zeros, from weights that are not used
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[list[Tensor | None], None, None]:
    """The backward pass of those weights that are used: the others keep no gradient, as outside of a graph."""
    used = [i for i, g in enumerate(gradients) if g is not None]
    width = len(ctx.saved_tensors) // len(gradients)
    places = [k for i in used for k in range(i * width, (i + 1) * width)]
    trained = [ctx.trained[k] for k in places]
    result: list[Tensor | None] = [None] * len(ctx.saved_tensors)
    if any(trained):
        given = [g for g in gradients if g is not None]
        found = weights_backward(given, [ctx.saved_tensors[k] for k in places], ctx.text, trained)
        for k, gradient, want in zip(places, found, trained, strict=True):
            result[k] = gradient if want else None
    return result, None, None


weights.register_autograd(_backward, setup_context=_setup)
