"""Constrained weights as they are found in a module. Imports ``parametrization``, ``optim`` and below."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stiefel.attach.proxy.bucket import Bucket, Formula, computed_together
from stiefel.attach.proxy.parametrization import Reparametrized
from stiefel.compat.sharding import is_sharded, whole, write
from stiefel.compat.torch_private import parameters_of, submodules_of
from stiefel.constraint import Binding, Penalized, Reparameterization, residual_of
from stiefel.linalg import in_double, is_traced
from stiefel.optim import Mark
from stiefel.optim.buckets import bucket

# Entries of the owner's __dict__, which copies and pickles of the module have too.
_ATTRIBUTE = "_stiefel"
_MARKS = "_stiefel_marks"


@dataclass(frozen=True)
class ConstrainedWeight:
    """A constrained tensor found in a module: ``owner.tensor``, by its name from the module searched."""

    name: str
    owner: nn.Module
    tensor: str
    binding: Binding
    place: str = ""
    """The owner's name from there."""

    @property
    def path(self) -> str:
        """The tensor's name among the parameters of the module searched, once it is released."""
        return f"{self.place}.{self.tensor}" if self.place else self.tensor

    @property
    def value(self) -> Tensor:
        """The weight as the layer uses it, computed anew: measurements and checkpoints must not depend on a cache.

        The whole of a sharded one: all processes that hold a part have to ask for it together.
        """
        if self.parametrization is not None:
            self.parametrization.cached = None
            tensors = self.parametrization.tensors(self.parameter)
            if any(map(is_sharded, tensors)):
                return Bucket([self.parametrization.formula]).weights(list(map(whole, tensors)))[0]
        return whole(getattr(self.owner, self.tensor))

    @property
    def parametrization(self) -> Reparametrized | None:
        """The module that computes the weight from its proxy; None for a weight without a proxy."""
        if not isinstance(self.binding.constraint, Reparameterization):
            return None
        return self.owner.parametrizations[self.tensor][0]  # type: ignore[index, return-value]

    @property
    def parameter(self) -> nn.Parameter:
        """What the optimizer trains: the weight itself, or its proxy."""
        if parametrize.is_parametrized(self.owner, self.tensor):
            return self.owner.parametrizations[self.tensor].original  # type: ignore[index, union-attr]
        return getattr(self.owner, self.tensor)

    @property
    def gains(self) -> Tensor | None:
        """The learnable factors of its rows, ``(b, p, 1)``, None without a learnable scale; points are without them."""
        gain = None if self.parametrization is None else self.parametrization.gain
        return None if gain is None else whole(gain).reshape(*self.binding.layout.matrix_shape[:2], 1)

    @property
    def may_be_off_set(self) -> bool:
        """Whether values written from outside can put the weight off its set: with a proxy alone they cannot.

        Unless a penalty on the proxy is what keeps it near the set.
        """
        method = self.binding.constraint
        if isinstance(method, Reparameterization) and not isinstance(method, Penalized):
            # Buffers are used as they are loaded: a trivialization from a start off the set gives weights off the set.
            return any(True for _ in self.owner.parametrizations[self.tensor].buffers())  # type: ignore[index, union-attr]
        return True

    def trained(self) -> list[Tensor]:
        """The parameters that training changes: the weight itself, or its proxy, gain and trained parts."""
        if parametrize.is_parametrized(self.owner, self.tensor):
            return list(self.owner.parametrizations[self.tensor].parameters())  # type: ignore[index, union-attr]
        weight = parameters_of(self.owner).get(self.tensor)
        return [] if weight is None else [weight]

    def keep(self, marks: list[Mark]) -> None:
        """Keep on the module the marks by which optimizers know the weight's parameters, so that copies have them."""
        self.owner.__dict__.setdefault(_MARKS, {})[self.tensor] = marks

    @torch.no_grad()
    def residual(self) -> float:
        """``‖XXᵀ − I‖_F/√p``, the largest of the weight's matrices, in double precision."""
        return residual_of(self.points())

    def allows(self, residual: float) -> bool:
        """Whether such a residual is within what the weight's method promises; true where it promises nothing."""
        return self.binding.allows(residual, self.parameter.dtype)

    @torch.no_grad()
    def has_determinant(self) -> bool:
        """Whether the weight's determinants have the sign asked for; true where none was."""
        sign = self.binding.constraint.determinant
        return sign is None or bool((torch.linalg.det(in_double(self.points())).sign() == sign).all())

    @torch.no_grad()
    def move_to_nearest(self) -> None:
        """Put the weight at the nearest point of its method's set."""
        self.start_from(self.value)

    @torch.no_grad()
    def start_from(self, weight: Tensor) -> None:
        """Put the weight at the point of its method's set that is nearest to a given one."""
        if self.parametrization is None:
            write(self.parameter, self.binding.nearest(weight))
        elif is_sharded(self.parameter):
            write(self.parameter, self.parametrization.right_inverse(weight))
        else:
            setattr(self.owner, self.tensor, weight)  # the proxy then starts from the nearest point

    def points(self) -> Tensor:
        """The weight as ``(b, p, n)`` in units in which the constraint is X Xᵀ = I."""
        parametrization = self.parametrization
        if parametrization is None or parametrization.gain is None:
            return self.binding.layout.points(self.value)
        # Before the gain: a weight cannot be divided by a gain that has become 0.
        together = Bucket([parametrization.formula])
        return together.held(together.stack(list(map(whole, parametrization.tensors(self.parameter)))))

    @property
    def alone(self) -> bool:
        """Whether the weight is a proxy's function and nothing else: no other parametrization, no part elsewhere."""
        parametrization = self.parametrization
        if parametrization is None or parametrization.held is not None:
            return False
        whole_list: Any = self.owner.parametrizations[self.tensor]  # type: ignore[index]
        return len(whole_list) == 1 and not any(map(is_sharded, parametrization.tensors(self.parameter)))


@torch.no_grad()
def points_of(weights: Sequence[ConstrainedWeight]) -> list[Tensor]:
    """:meth:`ConstrainedWeight.points` of each, computed anew; those of equal layout as one batch."""
    found: dict[int, Tensor] = {}
    formulas: dict[int, tuple[Formula, tuple[Tensor, ...]]] = {}
    for i, weight in enumerate(weights):
        if weight.alone and (parametrization := weight.parametrization) is not None:
            formulas[i] = parametrization.formula, parametrization.tensors(weight.parameter)
        else:
            found[i] = weight.points()
    for group in bucket(formulas, lambda i: computed_together(*formulas[i]), lambda i: formulas[i][1][0]):
        together = Bucket([formulas[i][0] for i in group])
        x = together.held(together.stack([t for i in group for t in formulas[i][1]]))
        counts = [layout.matrix_shape[0] for layout in together.layouts]
        found.update(zip(group, x.split(counts), strict=True))
    return [found[i] for i in range(len(weights))]


def _called(prefix: str, tensor: str, binding: Binding) -> str:
    if binding.title:  # a part of a layer's weight, held by the parametrization that puts the weight together
        prefix, tensor = prefix.rpartition("parametrizations.")[0].rstrip("."), binding.title
    return f"{prefix}.{tensor}" if prefix else tensor


def first_parametrization(
    owner: nn.Module | None, tensor: str, *, only: bool = False
) -> tuple[nn.Module | None, Tensor | None]:
    """The first parametrization of ``owner.tensor`` and its proxy, read past torch's containers, which are slow.

    Args:
        owner: the module; None gives None.
        tensor: the weight's name.
        only: give None where there is a second parametrization.
    """
    group: Any = None if owner is None else submodules_of(owner).get("parametrizations")
    listed = None if group is None else submodules_of(group).get(tensor)
    if listed is None or (only and len(submodules_of(listed)) > 1):
        return None, None
    # A replica of a module (DataParallel) has plain attributes instead of parameters.
    return submodules_of(listed).get("0"), parameters_of(listed).get("original", listed.__dict__.get("original"))


def add_quick_access(owner: nn.Module, tensor: str, together: Callable[[nn.Module], None] | None = None) -> None:
    """Wrap torch's property, which calls two modules at each access, in one that first asks for a ready weight.

    Args:
        owner: the module.
        tensor: the weight's name.
        together: called where none is ready, to compute those of all the owner's tensors.
    """
    torchs = vars(type(owner))[tensor]

    def weight(self: nn.Module) -> Tensor:
        """The prefetched or cached weight, or else the one that torch's property computes."""
        if not is_traced():
            parametrization, proxy = first_parametrization(self, tensor, only=True)
            if parametrization is not None and proxy is not None:
                ready = parametrization.ready(proxy)  # type: ignore[operator]
                if ready is None and together is not None and torch.is_grad_enabled():
                    together(self)
                    ready = parametrization.ready(proxy)  # type: ignore[operator]
                if ready is not None:
                    return ready
        return torchs.fget(self)

    # On the class that torch made for this module when it was parametrized, not on one that others share.
    setattr(type(owner), tensor, property(weight, torchs.fset))


def bindings_of(owner: nn.Module) -> dict[str, Binding]:
    """The bindings that this very module carries, by tensor name; empty where it carries none."""
    return owner.__dict__.get(_ATTRIBUTE, {})


def binding_of(owner: nn.Module, tensor: str) -> Binding | None:
    """The binding of a tensor, or of the first of the matrices that it is put together from; None where it is free."""
    if tensor in bindings_of(owner):
        return bindings_of(owner)[tensor]
    if not parametrize.is_parametrized(owner, tensor):
        return None
    below = owner.parametrizations[tensor].modules()  # type: ignore[index, union-attr]
    return next((binding for each in below for binding in bindings_of(each).values()), None)


def bind(owner: nn.Module, tensor: str, binding: Binding) -> None:
    """Record a binding on its module."""
    owner.__dict__.setdefault(_ATTRIBUTE, {})[tensor] = binding


def unbind(owner: nn.Module, tensor: str) -> None:
    """Remove a binding, and with the last one every trace of it."""
    for attribute in (_ATTRIBUTE, _MARKS):
        carried = owner.__dict__.get(attribute, {})
        carried.pop(tensor, None)
        if not carried:
            owner.__dict__.pop(attribute, None)


def constrained_weights(module: nn.Module, *, ties: bool = False) -> Iterator[ConstrainedWeight]:
    """All constrained weights of a module and its submodules, in the module's order.

    Args:
        module: where to look.
        ties: whether a parameter that several layers share comes once per layer; by default it comes once.
    """
    seen = set()
    for prefix, owner in module.named_modules():
        for tensor, binding in bindings_of(owner).items():
            found = ConstrainedWeight(_called(prefix, tensor, binding), owner, tensor, binding, prefix)
            if ties or id(found.parameter) not in seen:
                seen.add(id(found.parameter))
                yield found
