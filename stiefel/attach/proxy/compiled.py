"""A weight as one operation of a compiled graph. Imports ``bucket``, ``methods``, ``layout``, ``linalg``.

Traced through, a map is hundreds of operations that a compiler unrolls, fuses badly and compiles for a minute, that
cannot read a number to decide on a number of steps, and that cannot set the precision of products, a setting of the
process. As one operation it is computed as it is outside of a graph, to the bit. Two things cost time: the backward
pass computes the map again, since between the two an operation keeps nothing but tensors, and each weight is computed
by itself, since hooks of a compiled model run outside of its graph, so that none can compute equal weights together.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import cache
from typing import Any

import torch
from torch import Tensor

from stiefel.attach.proxy.bucket import Bucket, Formula
from stiefel.compat.torch_private import recording_within
from stiefel.constraint import Binding, Constraint
from stiefel.errors import StiefelError
from stiefel.layout import Layout
from stiefel.linalg import full_precision, require_exact
from stiefel.methods import get


def text_of(formula: Formula) -> str | None:
    """A formula in words, which a graph can hold and another process can read.

    Returns:
        None for a method that cannot be made again from its name and options: one that is not registered.
    """
    binding = formula.binding
    what = binding.constraint, binding.layout, formula.names, formula.gain
    try:
        return _text(*what)
    except TypeError:  # an option that has no hash
        return _text.__wrapped__(*what)


@cache
def _text(method: Constraint, layout: Layout, names: tuple[str, ...], gain: bool) -> str | None:
    changed = {f.name: getattr(method, f.name) for f in fields(method) if getattr(method, f.name) != f.default}
    words = {
        "method": method.name,
        "options": changed,
        "layout": asdict(layout),
        "names": list(names),
        "gain": gain,
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


def weight_of(formula: Formula, text: str, tensors: Sequence[Tensor]) -> Tensor:
    """The weight of a formula as one operation.

    Args:
        formula: of the weight.
        text: the same in words.
        tensors: proxy, gain and parts.

    Raises:
        WeightError: the model was converted to a precision in which no weight is orthogonal.
    """
    require_exact(tensors[0].dtype, formula.binding.label)
    return weight(list(tensors), text, [torch.is_grad_enabled() and t.requires_grad for t in tensors])


def _computed(tensors: Sequence[Tensor], text: str) -> Tensor:
    with full_precision(tensors[0].device):
        return Bucket([formula_of(text)]).weights(tensors)[0]


@torch.library.custom_op("stiefel::weight", mutates_args=())
def weight(tensors: Sequence[Tensor], text: str, trained: Sequence[bool]) -> Tensor:
    """The operation.

    Args:
        tensors: proxy, gain and parts.
        text: from :func:`text_of`.
        trained: which of the tensors get gradients.
    """
    with torch.no_grad():
        made = _computed(tensors, text)
        # An operation must not return one of its arguments.
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
        found = iter(torch.autograd.grad(_computed(leaves, text), wanted, gradient, materialize_grads=True))
    return [next(found).contiguous() if leaf.requires_grad else leaf.new_empty(0) for leaf in leaves]


@weight_backward.register_fake
def _(gradient: Tensor, tensors: Sequence[Tensor], text: str, trained: Sequence[bool]) -> list[Tensor]:
    return [t.new_empty(t.shape if want else 0) for t, want in zip(tensors, trained, strict=True)]


def _setup(ctx: Any, inputs: tuple[Sequence[Tensor], str, Sequence[bool]], output: Tensor) -> None:
    tensors, ctx.text, ctx.trained = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient: Tensor) -> tuple[list[Tensor | None], None, None]:
    found = weight_backward(gradient, list(ctx.saved_tensors), ctx.text, ctx.trained)
    return [g if want else None for g, want in zip(found, ctx.trained, strict=True)], None, None


weight.register_autograd(_backward, setup_context=_setup)
