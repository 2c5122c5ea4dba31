"""A weight put together from constrained matrices, each of which is a weight of its own.

    blocks:  W = (X₁; X₂; …),  Xᵢ Xᵢᵀ = s² I        outputs in groups of unequal sizes
    inner:   W = X L⁻¹,  B = L Lᵀ                    W B Wᵀ = X Xᵀ = s² I

They are the members of a list of parameters, in torch's parametrization of the layer's weight, so that each method,
optimizer and checkpoint has only matrices to deal with. Imports ``attaching``, ``select`` and below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stiefel.attach.attaching import give_class, planned, refuse_sparse, restore_order
from stiefel.attach.checkpoint import KEY, MATRICES, PLAIN, drop_proxy, saved_weight
from stiefel.attach.hooks import add_recurrent_hooks
from stiefel.attach.parallel import refuse_held
from stiefel.attach.select import Target, reading_of
from stiefel.attach.weights import ConstrainedWeight, bindings_of
from stiefel.compat.torch_private import has_hook, is_called_by, parameters_of, remove_hooks
from stiefel.constraint import Constraint, is_count
from stiefel.errors import LayoutError, OptionError
from stiefel.layout import Layout
from stiefel.linalg import full_precision, in_double, is_traced

_POSITIONS = "_stiefel_positions"
"""An entry of the owner's ``__dict__``, which copies have too: where the tensors were among its parameters."""


class Assembled(nn.Module):
    """torch's parametrization of a weight as a function of a list of matrices.

    Args:
        layout: how the whole weight is read.
        sizes: the outputs of each matrix.
        factor: L, lower triangular; None for the ordinary inner product.
        weight: where to start.
    """

    factor: Tensor | None

    def __init__(self, layout: Layout, sizes: Sequence[int], factor: Tensor | None, weight: nn.Parameter) -> None:
        super().__init__()
        self.layout, self.ends = layout, (0, *accumulate(sizes))
        self.register_buffer("factor", factor)
        parts = self.parts(weight.detach())
        self.matrices = nn.ParameterList(nn.Parameter(x, requires_grad=weight.requires_grad) for x in parts)
        self.registered = False

    def forward(self) -> Tensor:
        """The weight."""
        parts = list(self.matrices)
        if self.factor is not None:
            # A compiled graph leaves the precision of products, a setting of the process, as it is.
            with nullcontext() if is_traced() else full_precision(self.factor.device):
                parts = [_unwhitened(x, self.factor) for x in parts]
        rows = torch.cat(parts, dim=-2).reshape(-1, self.layout.out, self.layout.fan_in)
        return self.layout.tensor(self.layout.rows(rows))

    @torch.no_grad()
    def parts(self, weight: Tensor) -> list[Tensor]:
        """The matrices of a weight: ``(outputs, inputs)``, of a weight with several blocks a batch of them."""
        rows = self.layout.rows(self.layout.matrices(weight))
        rows = rows[0] if len(rows) == 1 else rows
        parts = [rows[..., a:b, :].clone() for a, b in pairwise(self.ends)]
        if self.factor is None:
            return parts
        with full_precision(weight.device):
            return [_whitened(x, self.factor) for x in parts]

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> tuple[()]:
        """Start from an assigned weight: each matrix from the nearest of its set."""
        if self.registered:
            for found, part in zip(self.weights(), self.parts(weight), strict=True):
                found.start_from(part)
        return ()

    def weights(self) -> Iterator[ConstrainedWeight]:
        """Its matrices as constrained weights."""
        for tensor, binding in bindings_of(self.matrices).items():
            yield ConstrainedWeight(binding.label, self.matrices, tensor, binding)


def planned_assembly(
    target: Target, method: Constraint, axes: str | None, blocks: tuple[int, ...] | None, inner: Tensor | None
) -> Callable[[], None]:
    """Check a target, and return the function that attaches the method; all errors are raised before any change."""
    refuse_held(target.name, target.parameter)
    refuse_sparse(target, method)
    layout = reading_of(target, method, axes)
    sizes = _sizes(target.name, layout, blocks)
    factor = None if inner is None else _factor(target, layout, sizes, inner, method.group_size is not None)
    assembled = Assembled(layout, sizes, factor, target.parameter)
    tensor = target.tensor
    parts, titles = [], []
    for i, (a, b) in enumerate(pairwise(assembled.ends)):
        title = f"{tensor}[{a}:{b}]" if len(sizes) > 1 else tensor
        label = f"{target.name.removesuffix(tensor)}{title}"
        titles.append(title if factor is None else f"{title} (inner)")
        parts.append(Target(label, assembled.matrices, str(i)))
    plans = planned(parts, method, titles=titles)

    def attach() -> None:
        for plan in plans:
            plan()
        for each in target.places:
            _register(each, assembled)
        assembled.registered = True

    return attach


def _sizes(name: str, layout: Layout, blocks: tuple[int, ...] | None) -> tuple[int, ...]:
    if blocks is None:
        return (layout.out,)
    if sum(blocks) != layout.out:
        raise LayoutError(
            f"weight '{name}': blocks={list(blocks)} add up to {sum(blocks)}, and it has {layout.out} outputs; give "
            "the number of outputs of each block"
        )
    return blocks


def check_blocks(blocks: Any) -> tuple[int, ...] | None:
    """Blocks as a tuple.

    Raises:
        OptionError: they are no positive whole numbers.
    """
    if blocks is None:
        return None
    if not (isinstance(blocks, (list, tuple)) and blocks and all(map(is_count, blocks))):
        raise OptionError(f"blocks={blocks!r}: expected the outputs of each block, as in blocks=[16, 16, 24]")
    return tuple(blocks)


def _factor(target: Target, layout: Layout, sizes: Sequence[int], inner: Any, grouped: bool) -> Tensor:
    """L of B = L Lᵀ, in the weight's precision; groups of outputs are rows of a tall weight too."""
    name, weight = target.name, target.parameter
    tall = layout.columns and not grouped and len(sizes) == 1
    longest = layout.out if tall else layout.fan_in
    if not tall and not grouped and max(sizes) > longest:
        raise LayoutError(
            f"weight '{name}': of blocks={list(sizes)} some have more outputs than the {layout.fan_in} inputs, and "
            "would need another inner product; use smaller blocks"
        )
    if not isinstance(inner, Tensor) or inner.shape != (longest, longest):
        came = f"shape {tuple(inner.shape)}" if isinstance(inner, Tensor) else type(inner).__name__
        side = "columns" if tall else "rows"
        raise LayoutError(
            f"weight '{name}' has {layout}, whose {side} need an inner product of shape {(longest, longest)}; inner "
            f"has {came}"
        )
    if inner.is_complex() and not weight.is_complex():
        raise OptionError(f"inner is {inner.dtype}, and weight '{name}' {weight.dtype}: expected a real matrix")
    wide = in_double(inner.detach()).to(torch.promote_types(weight.dtype, torch.float64))
    error = torch.linalg.matrix_norm(wide - wide.mH)
    factor, info = torch.linalg.cholesky_ex((wide + wide.mH) / 2)
    if info.item() or not error <= 1e-5 * torch.linalg.matrix_norm(wide):
        raise OptionError("inner: expected a positive definite matrix, equal to its (conjugate) transpose")
    return factor.to(weight)


def _whitened(x: Tensor, factor: Tensor) -> Tensor:
    """``X L`` of rows, ``Lᴴ X`` of columns."""
    return x @ factor if len(factor) == x.shape[-1] else factor.mH @ x


def _unwhitened(x: Tensor, factor: Tensor) -> Tensor:
    if len(factor) == x.shape[-1]:
        return torch.linalg.solve_triangular(factor, x, upper=False, left=False)
    return torch.linalg.solve_triangular(factor.mH, x, upper=True)


def _register(target: Target, assembled: Assembled) -> None:
    owner, tensor = target.owner, target.tensor
    owner.__dict__.setdefault(_POSITIONS, {})[tensor] = list(parameters_of(owner)).index(tensor)
    parametrize.register_parametrization(owner, tensor, assembled)
    add_recurrent_hooks(owner)
    if not has_hook(owner, _split):
        owner.register_load_state_dict_pre_hook(_split)
        owner.register_state_dict_post_hook(_join)


def assembled_of(owner: nn.Module) -> dict[str, Assembled]:
    """The assembled tensors of a module, by name."""
    lists: Any = getattr(owner, "parametrizations", None) or {}
    return {tensor: found[0] for tensor, found in lists.items() if isinstance(found[0], Assembled)}


def _split(owner: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *args: Any) -> None:
    """Split a whole weight of a state dict, a load-state-dict pre-hook: the matrices' own hooks do the rest."""
    for tensor, assembled in assembled_of(owner).items():
        below = f"{prefix}parametrizations.{tensor}"
        if f"{prefix}parametrizations.{tensor}.original" in state:  # of a weight that was one matrix
            facts = metadata.get(KEY, {}).get(tensor, {})
            state[prefix + tensor] = saved_weight(state, prefix, tensor, prefix + tensor, facts)
            drop_proxy(state, prefix, tensor)
        weight = state.get(prefix + tensor)
        if weight is None or weight.shape != assembled.layout.shape:
            continue
        del state[prefix + tensor]
        factor = assembled.factor
        state.update({} if factor is None else {f"{below}.0.factor": factor})
        parts = assembled.parts(weight if factor is None else weight.to(factor))
        state.update({f"{below}{MATRICES}{i}": part for i, part in enumerate(parts)})


def _join(owner: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Join what plain models are to read: a state-dict hook."""
    if not is_called_by(PLAIN):
        return
    for tensor in assembled_of(owner):
        drop_proxy(state, prefix, tensor)
        with torch.no_grad():
            state[prefix + tensor] = getattr(owner, tensor).detach()


@torch.no_grad()
def release_assembled(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Put ordinary parameters in place of assembled weights, whose matrices have been released; returns where."""
    made: dict[Assembled, nn.Parameter] = {}  # a tied one is one parameter again
    places = []
    for owner in module.modules():
        for tensor, assembled in reversed(assembled_of(owner).items()):  # as in release()
            trained = any(p.requires_grad for p in assembled.matrices)
            if assembled not in made:
                made[assembled] = nn.Parameter(getattr(owner, tensor).clone(), requires_grad=trained)
            give_class(owner)
            parametrize.remove_parametrizations(owner, tensor, leave_parametrized=True)
            delattr(owner, tensor)
            owner.register_parameter(tensor, made[assembled])
            restore_order(owner, tensor, owner.__dict__[_POSITIONS].pop(tensor))
            places.append((owner, tensor))
        if has_hook(owner, _split) and not assembled_of(owner):
            del owner.__dict__[_POSITIONS]
            remove_hooks(owner, _split, _join)
    return places
