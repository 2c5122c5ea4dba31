"""Which tensors of a module ``constrain`` means, and how each is read. Imports ``binding`` and below."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.utils import parametrize

from stiefel.attach.weights import binding_of
from stiefel.compat.torch_private import parameters_of
from stiefel.constraint import Constraint
from stiefel.errors import LayoutError, SelectionError, WeightError, nearest_names
from stiefel.layout import Layout
from stiefel.linalg import EXACT_DTYPES
from stiefel.methods import available, method_class

Layers = str | Iterable[str] | Callable[[str, nn.Module], bool] | None

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SUPPORTED = (nn.Linear, *CONVOLUTIONS)
LISTS = (nn.ParameterList, nn.ParameterDict)
# Gates whose weights torch stacks in one tensor, along its first dimension.
GATES = {nn.LSTM: 4, nn.LSTMCell: 4, nn.GRU: 3, nn.GRUCell: 3}


@dataclass(frozen=True)
class Target:
    """One tensor to constrain: ``owner.tensor``, called ``name`` from the module given, and layers that share it."""

    name: str
    owner: nn.Module
    tensor: str
    ties: tuple[Target, ...] = ()

    @property
    def key(self) -> tuple[int, str]:
        """Identity of the tensor, whatever its name."""
        return id(self.owner), self.tensor

    @property
    def places(self) -> tuple[Target, ...]:
        """Itself and the layers that share its parameter."""
        return (self, *self.ties)

    @property
    def names(self) -> list[str]:
        """Its name, and those of the layers that share it."""
        return [self.name, *(tie.name for tie in self.ties)]

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter itself."""
        parameter = parameters_of(self.owner)[self.tensor]
        assert parameter is not None
        return parameter


def select(module: nn.Module, layers: Layers, exclude: str | Iterable[str]) -> list[Target]:
    """Resolve ``layers`` and ``exclude`` to tensors.

    Raises:
        SelectionError: a name that does not exist, nothing selected, a tensor that is constrained or parametrized
            already, or is selected twice.
    """
    modules = dict(module.named_modules(remove_duplicate=False))  # a shared layer has several names
    if layers is None and isinstance(module, LISTS):
        layers = [""]
    if layers is None or callable(layers):
        targets = [
            Target(_join(prefix, "weight"), owner, "weight")
            for prefix, owner in modules.items()
            if isinstance(owner, SUPPORTED) and (layers is None or layers(prefix, owner))
        ]
    else:
        names = [layers] if isinstance(layers, str) else list(layers)
        targets = [target for name in names for target in _resolve(modules, name)]
    excluded = [exclude] if isinstance(exclude, str) else list(exclude)
    left_out = {target.key for name in excluded for target in _excluded(modules, name)}
    # A shared layer has several names: found by default it is one target, named twice by the user an error.
    by_default = layers is None or callable(layers)
    targets = [t for t in _once(targets, by_default) if t.key not in left_out]
    if not targets:
        raise SelectionError(
            f"nothing to constrain in {type(module).__name__}: layers={_describe(layers)} with exclude={excluded!r} "
            "selects no weight. By default these are the weights of Linear, Conv1-3d and ConvTranspose1-3d; name other "
            'tensors in layers, as in layers=["rnn.weight_hh_l0"]'
        )
    for target in targets:
        _check_free(target)
    return _merge_ties(modules, targets, left_out)


def layout_of(target: Target, constraint: Constraint, axes: str | None = None) -> Layout:
    """How a method reads a tensor: :func:`reading_of` it, with the method's groups and scale.

    Raises:
        LayoutError: ``group_size`` does not fit.
    """
    layout = reading_of(target, constraint, axes)
    try:
        return replace(layout, group_size=constraint.group_size, scale=constraint.fixed_scale)
    except LayoutError as error:
        raise LayoutError(f"weight '{target.name}': {error}") from None


def reading_of(target: Target, constraint: Constraint, axes: str | None = None) -> Layout:
    """How a tensor is read: by its axes, where they are given, and otherwise from the kind of module that owns it.

    Raises:
        WeightError: not a tensor of at least two dimensions with finite entries, in a precision that the method holds.
        LayoutError: ``axes`` do not fit, or tied layers read it in different ways.
    """
    _check_weight(target.name, target.parameter, constraint)
    try:
        layouts = [_read(t) if axes is None else Layout(tuple(t.parameter.shape), axes=axes) for t in target.places]
    except LayoutError as error:
        raise LayoutError(f"weight '{target.name}': {error}") from None
    for tie, layout in zip(target.ties, layouts[1:], strict=True):
        if layout != layouts[0]:
            raise LayoutError(
                f"weights '{target.name}' and '{tie.name}' are one tied parameter, but their layers read it "
                f"as {layouts[0]} and as {layout}; exclude both"
            )
    return layouts[0]


def _read(target: Target) -> Layout:
    owner, parameter = target.owner, target.parameter
    layout = Layout(tuple(parameter.shape))
    if isinstance(owner, CONVOLUTIONS) and target.tensor == "weight":
        stride, dilation = (() if set(v) == {1} else tuple(v) for v in (owner.stride, owner.dilation))
        return replace(layout, blocks=owner.groups, transposed=owner.transposed, stride=stride, dilation=dilation)
    if isinstance(owner, (nn.RNNBase, nn.RNNCellBase)) and target.tensor.startswith(("weight_hh", "weight_ih")):
        # Each gate has a block of rows, which is a matrix of its own; plain RNNs have one.
        gates = next((count for kind, count in GATES.items() if isinstance(owner, kind)), 1)
        return replace(layout, blocks=gates)
    if isinstance(owner, nn.MultiheadAttention) and target.tensor == "in_proj_weight":
        return replace(layout, blocks=3)  # q, k and v
    return replace(layout, batched=parameter.ndim > 2)  # of any other tensor the last two dimensions are a matrix


def _once(targets: list[Target], by_default: bool) -> list[Target]:
    """Each tensor once: a shared layer found under two names is one, a tensor named twice by the user an error."""
    found: dict[tuple[int, str], Target] = {}
    for target in targets:
        first = found.setdefault(target.key, target)
        if first is not target and not by_default:
            names = f"'{first.name}'" if first.name == target.name else f"'{first.name}', also called '{target.name}',"
            raise SelectionError(f"weight {names} is selected twice; name it once")
    return list(found.values())


def _excluded(modules: dict[str, nn.Module], name: str) -> list[Target]:
    """Every tensor that an excluded name covers: itself, or all below a layer or container of that name."""
    # Called for its error, where no layer or tensor has that name.
    _resolve(modules, name, any_tensor=True)
    return [
        Target(_join(prefix, tensor), owner, tensor)
        for prefix, owner in modules.items()
        # A parametrized tensor is no longer among its module's parameters.
        for tensor in [*parameters_of(owner), *getattr(owner, "parametrizations", {})]
        # With the dots "conv1" does not cover "conv10"; the empty name is the whole model's.
        if not name or f"{_join(prefix, tensor)}.".startswith(f"{name}.")
    ]


def _resolve(modules: dict[str, nn.Module], name: str, any_tensor: bool = False) -> list[Target]:
    """The tensors meant by one name: a tensor's own name, a layer's, or that of a module with layers below it."""
    if not isinstance(name, str):
        raise SelectionError(f"layers and exclude take names, as in layers=['0', 'head'], got {name!r}")
    prefix, _, leaf = name.rpartition(".")
    owner = modules.get(prefix)
    if owner is not None and leaf and _has_tensor(owner, leaf):
        return [Target(name, owner, leaf)]
    if name in modules:
        if _has_tensor(modules[name], "weight"):
            return [Target(_join(name, "weight"), modules[name], "weight")]
        if isinstance(modules[name], LISTS):
            return [Target(_join(name, tensor), modules[name], tensor) for tensor in parameters_of(modules[name])]
        below = [
            Target(_join(prefix, "weight"), owner, "weight")
            for prefix, owner in modules.items()
            if isinstance(owner, SUPPORTED) and prefix.startswith(f"{name}." if name else "")
        ]
        if below or any_tensor:
            return below
        tensors = [n for n, p in modules[name].named_parameters(recurse=False) if p.ndim >= 2]
        raise SelectionError(
            f"'{name}' ({type(modules[name]).__name__}) has no `weight` and no Linear or convolution below it; name a "
            f"tensor of it: {', '.join(f'{name}.{t}' for t in tensors) or 'it has none with two dimensions'}"
        )
    known = [m for m in modules if m] + [
        _join(m, t) for m, owner in modules.items() for t, _ in owner.named_parameters(recurse=False)
    ]
    raise SelectionError(f"there is no layer or parameter named {name!r}; {nearest_names(name, known)}")


def _has_tensor(owner: nn.Module, tensor: str) -> bool:
    return parameters_of(owner).get(tensor) is not None or parametrize.is_parametrized(owner, tensor)


def _join(prefix: str, tensor: str) -> str:
    return f"{prefix}.{tensor}" if prefix else tensor


def _describe(layers: Layers) -> str:
    return (
        "a predicate"
        if callable(layers)
        else repr(layers if layers is None or isinstance(layers, str) else list(layers))
    )


def _check_free(target: Target) -> None:
    binding = binding_of(target.owner, target.tensor)
    if binding is not None:
        raise SelectionError(
            f"weight '{target.name}' is constrained already, by {binding.constraint}; leave it out with exclude="
            f"['{target.name}'], or call stiefel.release first"
        )
    if parametrize.is_parametrized(target.owner, target.tensor):
        raise SelectionError(
            f"weight '{target.name}' has a torch parametrization already; remove it "
            "(torch.nn.utils.parametrize.remove_parametrizations) or exclude the weight"
        )
    if parameters_of(target.owner).get(target.tensor) is None:
        raise SelectionError(
            f"weight '{target.name}' is not a parameter of its layer (a hook such as the old spectral_norm or "
            "weight_norm computes it); remove the hook or exclude the weight"
        )


def _merge_ties(modules: dict[str, nn.Module], targets: list[Target], left_out: set[tuple[int, str]]) -> list[Target]:
    """Make each parameter one target, which knows the other layers that share it."""
    # All places of each parameter, selected or not: whoever shares one gets the constraint too.
    places: dict[int, list[Target]] = {}
    for prefix, owner in modules.items():
        for tensor, p in parameters_of(owner).items():
            places.setdefault(id(p), []).append(Target(_join(prefix, tensor), owner, tensor))
    merged: dict[int, Target] = {}
    for target in targets:
        parameter = target.parameter
        if id(parameter) in merged:
            continue
        shared = {tie.key: tie for tie in places[id(parameter)] if tie.key != target.key}
        for tie in shared.values():
            _check_free(tie)
            if tie.key in left_out:
                raise SelectionError(
                    f"weight '{target.name}' is tied to '{tie.name}', which is excluded: they are one parameter; "
                    "exclude both or neither"
                )
        merged[id(parameter)] = replace(target, ties=tuple(shared.values()))
    return list(merged.values())


def _check_weight(name: str, parameter: torch.Tensor, constraint: Constraint) -> None:
    if parameter.is_meta:
        raise WeightError(f"weight '{name}' is on the meta device and has no values; materialize the model first")
    if hasattr(parameter, "device_mesh"):
        raise WeightError(
            f"weight '{name}' is sharded ({type(parameter).__name__}); constrain whole weights, before sharding"
        )
    if parameter.ndim < 2:
        raise WeightError(
            f"weight '{name}' has shape {tuple(parameter.shape)}; orthogonality needs at least two dimensions "
            "(outputs, inputs); exclude it"
        )
    if parameter.numel() == 0:
        raise WeightError(f"weight '{name}' has shape {tuple(parameter.shape)} and no entries; exclude it")
    if parameter.dtype in EXACT_DTYPES and parameter.dtype not in constraint.dtypes:
        unitary = [m for m in available() if not method_class(m).real_only]
        raise WeightError(
            f"weight '{name}' is {parameter.dtype}, and {constraint.name!r} holds real weights (float32, float64) "
            f"only; exclude it, or use one of {', '.join(unitary)}"
        )
    if parameter.dtype not in EXACT_DTYPES:
        raise WeightError(
            f"weight '{name}' is {parameter.dtype}; constraints hold in torch.float32 or torch.float64 (complex64 or "
            "complex128 for unitary weights) only. Keep the weights in float32, as in model.float(), and use "
            "torch.autocast for speed"
        )
    if not torch.isfinite(parameter).all():
        bad = int((~torch.isfinite(parameter)).sum())
        raise WeightError(f"weight '{name}' has {bad} entries that are NaN or infinite; re-initialize it first")
