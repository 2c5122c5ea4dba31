"""Every private name of torch that this library uses, each behind a public name that says what it asks.

A release of torch may rename or drop any of them: each is listed with the versions in which it was seen, and a test
names the one that a newer torch lacks. Imports torch alone.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import torch
import torch._compile
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "PRIVATE_NAMES", "Convertible", "TorchDispatchMode", "compiler_callbacks", "copy_all_", "drop_flat_weights",
    "forward_levels", "has_hook", "is_batched_gradient", "is_called_by", "is_forward_mode", "is_functorch_active",
    "is_in_onnx_export", "is_joining", "norms_of_all", "not_compiled", "on_conversion", "operator_of",
    "parameters_of", "recording_within", "remove_hooks", "restore_flat_weights", "saves_tensors_elsewhere",
    "submodules_of", "takes_tensors", "tree_leaves", "tree_map", "version", "zero_all_",
]  # fmt: skip

PRIVATE_NAMES: dict[str, str] = {
    "torch._C._functorch.TransformType": "2.8 to 2.14",
    "torch._C._functorch.get_interpreter_stack": "2.8 to 2.14",
    "torch._C._functorch.is_legacy_batchedtensor": "2.8 to 2.14",
    "torch._C._functorch.peek_interpreter_stack": "2.8 to 2.14",
    "torch._C._dispatch_tls_is_dispatch_key_excluded": "2.8 to 2.14",
    "torch._C._dispatch_tls_set_dispatch_key_excluded": "2.8 to 2.14",
    "torch.autograd.forward_ad._current_level": "2.8 to 2.14",
    "torch._foreach_copy_": "2.8 to 2.14",
    "torch._foreach_norm": "2.8 to 2.14",
    "torch._foreach_zero_": "2.8 to 2.14",
    "torch.utils._pytree.tree_leaves": "2.8 to 2.14",
    "torch.utils._pytree.tree_map": "2.8 to 2.14",
    "torch.utils._python_dispatch.TorchDispatchMode": "2.8 to 2.14",
    "torch._ops.OpOverload._overloadpacket": "2.8 to 2.14",
    "torch._compile._disable_dynamo": "2.8 to 2.14",
    "torch._dynamo.callback.callback_handler": "2.8 to 2.14",
    "torch.distributed.algorithms.join.Joinable._join_config": "2.8 to 2.14",
    "torch.optim.LBFGS._add_grad": "2.8 to 2.14",
    "torch.optim.LBFGS._gather_flat_grad": "2.8 to 2.14",
    "torch.optim.LBFGS._set_param": "2.8 to 2.14",
    "torch.nn.utils.parametrize._cache_enabled": "2.8 to 2.14",
    "torch.nn.Module._apply": "2.8 to 2.14",
    "torch.nn.Module._forward_hooks": "2.8 to 2.14",
    "torch.nn.Module._forward_hooks_always_called": "2.8 to 2.14",
    "torch.nn.Module._forward_pre_hooks": "2.8 to 2.14",
    "torch.nn.Module._load_state_dict_post_hooks": "2.8 to 2.14",
    "torch.nn.Module._load_state_dict_pre_hooks": "2.8 to 2.14",
    "torch.nn.Module._modules": "2.8 to 2.14",
    "torch.nn.Module._parameters": "2.8 to 2.14",
    "torch.nn.Module._state_dict_hooks": "2.8 to 2.14",
    "torch.nn.RNNBase._flat_weights": "2.8 to 2.14",
    "torch.nn.RNNBase._flat_weight_refs": "2.8 to 2.14",
    "torch.nn.RNNBase._flat_weights_names": "2.8 to 2.14",
    "torch.nn.RNNBase._init_flat_weights": "2.8 to 2.14",
    "torch.Tensor._version": "2.8 to 2.14",
}
"""Names that this library cannot do without, and the versions of torch that have them.

Not among them are ``torch._C._autograd._top_saved_tensors_default_hooks`` (see :func:`saves_tensors_elsewhere`) and
``torch.onnx._internal.exporter._flags._is_onnx_exporting`` (see :func:`is_in_onnx_export`).
"""


# --- transforms, hooks and compilers that are active around a computation ---


def is_functorch_active() -> bool:
    """Whether a transform of :mod:`torch.func` (vmap, grad, jvp) is under way."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_batched_gradient(gradient: Tensor) -> bool:
    """Whether a gradient is a batch of gradients (``is_grads_batched=True``), whose values cannot be read."""
    return torch._C._functorch.is_legacy_batchedtensor(gradient)


def is_forward_mode() -> bool:
    """Whether forward-mode derivatives are being computed (:func:`torch.autograd.forward_ad.dual_level`)."""
    return torch.autograd.forward_ad._current_level >= 0


def forward_levels() -> int:
    """How many forward-mode transforms of :mod:`torch.func` (jvp, jacfwd) are under way, one within another."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack)


def saves_tensors_elsewhere() -> bool:
    """Whether saved-tensor hooks are active, as they are under gradient checkpointing.

    Checkpointing counts the tensors that a segment saves and runs the segment again in the backward pass: both runs
    have to do the same operations. True where this torch cannot tell.
    """
    # The argument True: see the hooks while a compiler traces too.
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None


def is_in_onnx_export() -> bool:
    """Whether ``torch.onnx.export`` is at work."""
    # Looked up, not imported: the exporter needs other packages. Dynamo, which that export tries too, takes
    # torch.onnx.is_in_onnx_export() for false.
    flags = sys.modules.get("torch.onnx._internal.exporter._flags")
    return flags is not None and flags._is_onnx_exporting


def is_joining(module: nn.Module) -> bool:
    """Whether processes may have uneven inputs, under ``torch.distributed.algorithms.Join`` or ``module.join()``."""
    config: Any = module._join_config
    return config.enable


def compiler_callbacks() -> Any:
    """The handler called when ``torch.compile`` begins and ends compiling; None before the compiler is imported."""
    # Looked up, not imported: the compiler is slow to import, and compiles nothing before something else imports it.
    return getattr(sys.modules.get("torch._dynamo.callback"), "callback_handler", None)


@contextmanager
def recording_within() -> Iterator[None]:
    """Let autograd record inside of an operation of one's own, from which torch keeps it out."""
    keys = [
        getattr(torch._C.DispatchKey, name) for name in ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView")
    ]
    out = [key for key in keys if torch._C._dispatch_tls_is_dispatch_key_excluded(key)]
    for key in out:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for key in out:
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, True)


F = TypeVar("F", bound=Callable[..., Any])


def not_compiled(function: F) -> F:
    """Let ``torch.compile`` call a function as it is, with all that it calls, instead of tracing it.

    As ``torch.compiler.disable``, which imports the compiler at once; this does so when the function is called, and by
    then torch's own optimizers have.
    """
    return torch._compile._disable_dynamo(function)  # type: ignore[return-value]


def operator_of(overload: Any) -> Any:
    """The operator of which a dispatched function is one overload: ``aten.add`` of ``aten.add.Tensor``."""
    return overload._overloadpacket


def takes_tensors(formula: Any) -> None:
    """Mark a formula of :mod:`torch.utils.flop_counter` as taking tensors rather than their shapes."""
    formula._get_raw = True


# --- tensors ---


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; 0 for one made in inference mode, which keeps no count."""
    return 0 if tensor.is_inference() else tensor._version


def copy_all_(tensors: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into the tensor at its place, in as few kernels as possible."""
    torch._foreach_copy_(list(tensors), list(sources))


def zero_all_(tensors: Sequence[Tensor]) -> None:
    """Fill all tensors with 0, in as few kernels as possible."""
    torch._foreach_zero_(list(tensors))


def norms_of_all(tensors: Sequence[Tensor], order: float) -> Sequence[Tensor]:
    """The norm of this order of each tensor, in as few kernels as possible."""
    return torch._foreach_norm(list(tensors), order)


# --- modules ---


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's own parameters by name, in its order; a change of this dictionary changes the module."""
    return module._parameters


def submodules_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's own submodules by name, without the slow ``__getattr__``."""
    return module._modules


def _all_hooks(module: nn.Module) -> list[dict[int, Callable[..., Any]]]:
    return [
        module._load_state_dict_post_hooks,
        module._state_dict_hooks,
        module._load_state_dict_pre_hooks,
        module._forward_pre_hooks,
        module._forward_hooks,
    ]


def has_hook(module: nn.Module, function: Callable[..., Any]) -> bool:
    """Whether a module has this very function as a hook, of whatever kind."""
    return any(getattr(hook, "hook", hook) is function for hooks in _all_hooks(module) for hook in hooks.values())


def remove_hooks(module: nn.Module, *functions: Callable[..., Any]) -> None:
    """Take these functions off a module's hooks, of whatever kind."""
    for hooks in _all_hooks(module):
        for key, hook in list(hooks.items()):
            # torch wraps some hooks and keeps the function itself in their attribute ``hook``.
            if getattr(hook, "hook", hook) in functions:
                del hooks[key]
                # A forward hook made with always_call=True has its key here too.
                module._forward_hooks_always_called.pop(key, None)


def on_conversion(cls: type[nn.Module], call: Callable[[Any], object]) -> None:
    """Call a function with a module of this class after each ``to()``, ``cuda()``, ``half()`` and their like.

    For a class made for one module, as parametrizing does: the replaced ``_apply`` is then that of its base.
    """

    def _apply(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        # type(self), not cls: the class of a copied module may be a copy of cls that shares this function.
        applied = type(self).__mro__[1]._apply(self, *args, **kwargs)  # type: ignore[attr-defined]
        call(self)
        return applied

    cls._apply = _apply  # type: ignore[method-assign]


class Convertible(nn.Module):
    """A module with hooks that run before and after its tensors are moved or converted."""

    def before_conversion(self) -> None:
        """Called before the module's tensors are moved or converted."""

    def after_conversion(self) -> None:
        """Called after the module's tensors were moved or converted."""

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self.before_conversion()
        super()._apply(*args, **kwargs)
        self.after_conversion()
        return self


def drop_flat_weights(recurrent: nn.RNNBase) -> None:
    """Drop a recurrent module's list of flat weights; it reads them anew at its next forward pass.

    Does nothing while torch caches parametrized weights, because the module has to find those again.
    """
    if not parametrize._cache_enabled:
        count = len(recurrent._flat_weights_names)
        recurrent._flat_weights = [None] * count
        # It reads them anew where a reference does not lead to the weight that it has now: these lead nowhere.
        recurrent._flat_weight_refs = [weakref.ref(nn.Parameter())] * count


def is_called_by(name: str) -> bool:
    """Whether a function of this name is among the callers, at whatever distance."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == name:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def restore_flat_weights(recurrent: nn.RNNBase) -> None:
    """Rebuild a recurrent module's list of flat weights, as an ordinary one has it."""
    recurrent._init_flat_weights()
