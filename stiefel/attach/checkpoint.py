"""What a checkpoint says of its weights, and loading it into a model that holds them in another way.

The state dict's metadata has the method, its options and the layout of each weight, so that its keys stay torch's. A
checkpoint of the same method with the same options is loaded bit for bit. From any other the weight's value is taken:
where it was saved as a proxy, the method that saved it computes the value, and the method that loads it starts from
there. Where it cannot be told, or the method is not there, loading is refused.

Imports ``weights``, ``methods`` and below.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor, nn

from stiefel.attach.weights import ConstrainedWeight, bindings_of
from stiefel.compat.sharding import agree_on_least, cut_as, is_sharded, whole
from stiefel.compat.torch_private import is_called_by
from stiefel.constraint import ROUNDING, Binding, Constraint, Reparameterization
from stiefel.errors import StiefelError, WeightError
from stiefel.layout import Layout
from stiefel.linalg import full_precision
from stiefel.methods import get

KEY = "stiefel"
"""Where a module's metadata has what is known of its weights: a dictionary by tensor."""
VERSION = 1
"""Of the meaning of these entries and of proxies."""
MATRICES = ".0.matrices."
"""In the names of the parts of an assembled weight."""
PLAIN = "save_pretrained"
"""Functions of this name write files that plain models read: they get the weights themselves."""


def describe(owner: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Add what is known of a module's weights to a state dict's metadata: a state-dict hook."""
    metadata[KEY] = {tensor: _facts(binding) for tensor, binding in bindings_of(owner).items()}
    if is_called_by(PLAIN):
        for tensor, binding in bindings_of(owner).items():
            if isinstance(binding.constraint, Reparameterization):
                drop_proxy(state, prefix, tensor)
                with torch.no_grad():
                    state[prefix + tensor] = ConstrainedWeight(binding.label, owner, tensor, binding).value


def adapt(owner: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *args: Any) -> None:
    """Rewrite a state dict to the form in which a module holds its weights: a load-state-dict pre-hook.

    Raises:
        WeightError: a weight is saved as the proxy of a method that the checkpoint does not name, or that is not there.
    """
    saved = metadata.get(KEY, {})
    for tensor, binding in bindings_of(owner).items():
        facts = saved.get(tensor)
        if isinstance(facts, tuple):  # of 0.1.0, which saved the tally alone
            facts = {"steps": facts[0], "shortened": facts[1]}
        if facts is not None:
            binding.tally.shortened = facts["shortened"]
            # Where an optimizer has been loaded just now, its count is right in any format: distributed.checkpoint
            # loads into the model's own state dict, whose metadata is of before.
            if binding.tally.resumed != binding.tally.steps:
                binding.tally.steps = facts["steps"]
                binding.tally.stepped = facts.get("stepped", facts["steps"])
        found = ConstrainedWeight(binding.label, owner, tensor, binding)
        with torch.no_grad():
            _adapt_one(found, state, prefix, facts or {}, bool(metadata.get("assign_to_params_buffers")))


def _adapt_one(
    found: ConstrainedWeight, state: dict[str, Any], prefix: str, facts: dict[str, Any], assigned: bool
) -> None:
    parametrization, proxied = found.parametrization, keys_of_proxy(state, prefix, found.tensor)
    saved = _to_convert(found, state, prefix, facts)
    if is_sharded(found.parameter):
        _refuse_unlike(found, saved is not None)
    if saved is None:
        return
    plain, weight = prefix + found.tensor, saved()
    gain = state.get(f"{prefix}parametrizations.{found.tensor}.0.gain")
    for key in (*proxied, plain):
        state.pop(key, None)
    if parametrization is None:
        state[plain] = cut_as(weight, found.parameter)
        return
    # An assigned weight keeps its own precision and device, any other gets those of the model.
    weight = weight if assigned else weight.to(found.parameter)
    entries = parametrization.entries(weight, gain)
    if not weight.is_meta:
        _tell_of_move(found, weight, entries)
    for name, value in entries.items():
        mine = parametrization.entry(name, found.parameter)
        state[f"{prefix}parametrizations.{found.tensor}.{name}"] = cut_as(value, mine)


def _to_convert(
    found: ConstrainedWeight, state: dict[str, Any], prefix: str, facts: dict[str, Any]
) -> Callable[[], Tensor] | None:
    """The weight that a checkpoint has in another form; None where it can be loaded as it is, or is not there."""
    plain, proxied = prefix + found.tensor, keys_of_proxy(state, prefix, found.tensor)
    if any(key.startswith(f"{prefix}parametrizations.{found.tensor}{MATRICES}") for key in proxied):
        raise WeightError(
            f"weight '{found.binding.label}' was saved as the matrices that it consisted of (blocks= or inner=); load "
            "it into a model that is constrained with these, and save that after stiefel.release(model), which makes "
            "it whole"
        )
    original = f"{prefix}parametrizations.{found.tensor}.original"
    if found.parametrization is None:
        if not proxied or plain in state:
            return None
    elif proxied:
        if "method" not in facts or _same(facts, found.binding):
            return None
    elif plain not in state:
        return None
    elif state[plain].shape != found.binding.layout.shape:
        state[original] = state.pop(plain)  # torch then tells both shapes, whatever ``strict`` is
        return None
    else:
        return lambda: whole(state[plain])
    if "method" in facts and original in state and tuple(state[original].shape) != found.binding.layout.shape:
        for key in proxied:
            if key != original:
                del state[key]
        if found.parametrization is None:
            state[plain] = state.pop(original)
        return None
    return lambda: saved_weight(state, prefix, found.tensor, found.binding.label, facts)


def _refuse_unlike(found: ConstrainedWeight, converts: bool) -> None:
    """Raise on all processes where one alone has what a weight of another method is converted by."""
    flag = float(converts)
    least, other = agree_on_least(torch.tensor([flag, -flag]), found.parameter).tolist()
    if least != -other:
        raise WeightError(
            f"weight '{found.binding.label}' is sharded, and one process alone has the checkpoint of another method or "
            "of a plain model; load it into the whole model before fully_shard(), or on every process"
        )


def _tell_of_move(found: ConstrainedWeight, weight: Tensor, entries: dict[str, Tensor]) -> None:
    """Warn where the weight that will be held is not the one that was saved."""
    parts = {name.rpartition(".")[2]: value for name, value in entries.items() if ".parts." in name}
    binding = found.binding
    held = _weight_of(binding.constraint, binding.layout, entries["original"], parts, entries.get("0.gain"))
    size, moved = torch.linalg.vector_norm(weight), torch.linalg.vector_norm(held - weight)
    if moved > ROUNDING * torch.finfo(weight.dtype).eps * size:
        warnings.warn(
            f"weight '{binding.label}' was loaded off the set of {binding.constraint} and has been moved to the "
            f"nearest point of it, by {moved / size:.1e} of its length",
            stacklevel=2,
        )


def _facts(binding: Binding) -> dict[str, Any]:
    tally, method = binding.tally, binding.constraint
    return {
        "version": VERSION,
        # A count that is still on a device is read here: a checkpoint holds numbers.
        "steps": tally.steps,
        "stepped": tally.stepped,
        "shortened": None if tally.shortened is None else int(tally.shortened),
        "method": method.name,
        "options": _plain_options(method),
        "layout": asdict(binding.layout),
    }


def _plain_options(method: Constraint) -> dict[str, Any]:
    """The options that differ from their defaults; functions are left out, which reading a file must not call."""
    options = {f.name: getattr(method, f.name) for f in fields(method)}
    defaults = {f.name: f.default for f in fields(method)}
    return {
        name: value
        for name, value in options.items()
        if value != defaults[name] and isinstance(value, (str, int, float, bool, tuple, type(None)))
    }


def _same(facts: dict[str, Any], binding: Binding) -> bool:
    """Whether the weight was saved by this very method, with these options, and read in this way."""
    mine = _facts(binding)
    alike = all(facts[name] == mine[name] for name in ("method", "options"))
    return alike and Layout(**facts["layout"]) == binding.layout


def drop_proxy(state: dict[str, Any], prefix: str, tensor: str) -> None:
    """Take out of a state dict what a tensor is computed from."""
    for key in keys_of_proxy(state, prefix, tensor):
        del state[key]


def keys_of_proxy(state: dict[str, Any], prefix: str, tensor: str) -> list[str]:
    """Where a state dict has what a tensor is computed from."""
    return [key for key in state if key.startswith(f"{prefix}parametrizations.{tensor}.")]


def saved_weight(state: dict[str, Any], prefix: str, tensor: str, label: str, facts: dict[str, Any]) -> Tensor:
    """The weight that the method that saved it would compute.

    Raises:
        WeightError: the checkpoint does not name the method, it is not there, or a part is missing.
    """
    start = f"{prefix}parametrizations.{tensor}."
    if "method" not in facts:
        raise WeightError(
            f"weight '{label}' was saved as the proxy of a reparameterization, and the checkpoint does not say of "
            "which one (formats that keep tensors alone do not); load it into a model that is constrained by the same "
            "method with the same options, and save that model's state with torch.save, or release it"
        )
    try:
        method = get(facts["method"], **facts["options"])
    except StiefelError as error:
        raise WeightError(
            f"weight '{label}' was saved as the proxy of {facts['method']!r}, which is needed to compute it: {error}"
        ) from error
    parts = {key.rpartition(".")[2]: whole(value) for key, value in state.items() if key.startswith(f"{start}0.parts.")}
    layout = Layout(**facts["layout"])
    gain = state.get(f"{start}0.gain")
    assert isinstance(method, Reparameterization)
    needed = set(method.at_identity(layout)[1])
    if f"{start}original" not in state or needed != set(parts):
        raise WeightError(
            f"weight '{label}' was saved as the proxy of {method}, of which the checkpoint has "
            f"{sorted(k.removeprefix(start) for k in state if k.startswith(start))}; expected 'original' and "
            f"{sorted(f'0.parts.{name}' for name in needed)}: load the whole of it, before the model is sharded"
        )
    return _weight_of(method, layout, whole(state[f"{start}original"]), parts, None if gain is None else whole(gain))


def _weight_of(
    method: Constraint, layout: Layout, proxy: Tensor, parts: dict[str, Tensor], gain: Tensor | None
) -> Tensor:
    assert isinstance(method, Reparameterization)
    with full_precision(proxy.device):
        x = method.forward(layout.points(proxy), layout, **parts)
        return layout.weight(x if gain is None else x * gain.reshape(*x.shape[:2], 1))
