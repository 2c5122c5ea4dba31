"""Gradients within a backward pass, as functions that can be differentiated again. Imports torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def nested_gradients(
    function: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    gradients: Sequence[Tensor],
) -> list[Tensor | None]:
    """The gradients of a function's inputs with a graph, for a backward pass under ``create_graph=True``.

    They are partial derivatives: where one input is computed from another, the outer backward pass follows that path,
    and it calls the hooks of the inputs. So the function gets aliases, at which the inner pass ends.

    Args:
        function: of all ``inputs``; one tensor or several.
        inputs: None stays None.
        gradients: of each of the function's outputs.

    Returns:
        None for an input that is None, needs no gradient or is not used.
    """
    with torch.enable_grad():
        aliases = [None if t is None else t.view_as(t) for t in inputs]
        outputs = function(*aliases)
    wanted = [t for t in aliases if t is not None and t.requires_grad]
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    found = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=True, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in aliases]
