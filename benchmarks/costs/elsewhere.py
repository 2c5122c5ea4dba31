"""A device that is not there: tensors that say they are on one, and have real numbers.

Under :func:`elsewhere` tensors answer ``device``, ``is_cuda`` and their like as those of an accelerator would, so that
each branch that a method takes there runs on any machine. What the host would wait for is refused, or listed, and so is
float64 on a device that has none. Tensors made before are on the device; those made within it without a ``device``,
and what is computed from these alone, are on the host.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stiefel.optim import divergence

aten = torch.ops.aten

FACTORIES = {
    torch.arange, torch.empty, torch.empty_strided, torch.eye, torch.full, torch.linspace, torch.logspace, torch.ones,
    torch.rand, torch.randint, torch.randn, torch.randperm, torch.tensor, torch.as_tensor, torch.zeros, torch.asarray,
}  # fmt: skip
READS = {
    Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__bool__, Tensor.__float__, Tensor.__int__,
    Tensor.__index__, Tensor.__complex__, Tensor.__array__,
}  # fmt: skip
"""What makes a host wait for a tensor's values."""
WAITING = {
    aten._linalg_svd, aten._linalg_eigh, aten.linalg_eig, aten.linalg_matrix_exp, aten._linalg_check_errors,
    aten.nonzero, aten.masked_select, aten._unique2, aten.linalg_lstsq, aten.equal,
}  # fmt: skip
"""Operations in whose kernels for CUDA torch itself reads numbers back: by torch's sources."""
VIEWS = {
    aten.view, aten._unsafe_view, aten.t, aten.transpose, aten.expand, aten.permute, aten.select, aten.slice,
    aten.squeeze, aten.unsqueeze, aten.detach, aten.alias, aten.diagonal, aten.as_strided, aten.split, aten.unbind,
    aten.split_with_sizes, aten.view_as_real, aten.view_as_complex, aten._reshape_alias, aten._conj, aten.real,
    aten.imag, aten.is_same_size, aten.unfold, aten._neg_view, aten.lift_fresh, aten.chunk, aten.empty,
    aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided,
}  # fmt: skip
"""Operations that launch nothing."""
PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm}
DOUBLE = {torch.float64, torch.complex128}


class HostWait(AssertionError):
    """The host would wait for the device."""


class NoDouble(TypeError):
    """The device has no float64."""


@dataclass
class Counts:
    """What a device would have been asked for.

    Args:
        launches: operations that are no views.
        doubles: those with float64.
        waits: what the host waited for.
        calls: by operation.
        flops: of products of matrices.
        peak: the most bytes that tensors made meanwhile held at one time.
    """

    launches: int = 0
    doubles: int = 0
    waits: list[str] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    flops: int = 0
    peak: int = 0
    on_host: bool = False
    alive: dict[StorageWeakRef, int] = field(default_factory=dict)

    def clear(self) -> None:
        """Count from here on."""
        self.launches = self.doubles = self.flops = self.peak = 0
        self.waits.clear()
        self.calls.clear()
        self.alive.clear()


@contextmanager
def elsewhere(kind: str = "cuda", *, double: str = "fast", waits: bool = False) -> Iterator[Counts]:
    """Everything that exists is on a device of this kind.

    Args:
        kind: what tensors say: ``"cuda"``, ``"xpu"``, ``"mps"``.
        double: ``"fast"``, ``"slow"``, or ``"none"``, where the use of float64 raises :class:`NoDouble`.
        waits: list what the host waits for; otherwise it raises :class:`HostWait`.
    """
    counts = Counts()
    with ExitStack() as stack:
        for name, stand_in in _patches(double).items():
            stack.enter_context(mock.patch(name, stand_in))
        stack.callback(lambda: divergence._flags.pending.clear())  # what is told later belongs to this device
        stack.enter_context(_Counting(counts, double, waits))
        answering = stack.enter_context(_Answering(kind, counts, waits))
        stack.enter_context(mock.patch("torch.autograd.function.BackwardCFunction.apply", _within(answering)))
        yield counts


def _within(answering: _Answering) -> Any:
    """A function's backward pass under the mode, which torch's engine leaves."""
    apply = torch.autograd.function.BackwardCFunction.apply

    def applied(self: Any, *args: Any) -> Any:
        with answering:
            return apply(self, *args)

    return applied


class _Answering(TorchFunctionMode):
    def __init__(self, kind: str, counts: Counts, waits: bool) -> None:
        super().__init__()
        self.kind, self.there, self.counts, self.waits = kind, torch.device(kind, 0), counts, waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return func(*args, **kwargs)
        if func in _KINDS:
            return _KINDS[func] == ("cpu" if _on_host(args[0]) else self.kind)
        if func == Tensor.device.__get__:
            return torch.device("cpu") if _on_host(args[0]) else self.there
        if func in READS and not _on_host(args[0]):
            self._wait(func.__name__)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, (torch.device, str))]
        goes = next((torch.device(g).type for g in given if _is_device(g)), None)
        if func is Tensor.to and isinstance(args[1] if len(args) > 1 else None, Tensor):
            goes = "cpu" if _on_host(args[1]) else self.kind
        args, kwargs = _on_cpu(args), _on_cpu(kwargs)
        pinned = bool(kwargs.pop("pin_memory", False))
        here = all(map(_on_host, tensors)) and goes in (None, "cpu")
        self.counts.on_host = here or (func is Tensor.to and (goes == "cpu" or _on_host(args[0])))
        found = func(*args, **kwargs)
        self.counts.on_host = False
        if goes is None:
            host = all(map(_on_host, tensors)) if tensors else func in FACTORIES or pinned
        else:
            host = goes == "cpu"
            if host and func is Tensor.to and not _on_host(tensors[0]) and not kwargs.get("non_blocking"):
                self._wait("to('cpu')")
        if func is Tensor.cpu:
            host = True
        for each in tree_leaves(found):
            if isinstance(each, Tensor) and not any(each is t for t in tensors):
                each._on_host = host  # type: ignore[attr-defined]
        if isinstance(found, Tensor) and any(found is t for t in tensors) and _on_host(found) != host:
            found = found.clone()
            found._on_host = host  # type: ignore[attr-defined]
        return found

    def _wait(self, what: str) -> None:
        if not self.waits:
            raise HostWait(f"{what}() makes the host wait for the device")
        self.counts.waits.append(what)


class _Counting(TorchDispatchMode):
    def __init__(self, counts: Counts, double: str, waits: bool) -> None:
        super().__init__()
        self.counts, self.double, self.waits = counts, double, waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        found = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, found)) if isinstance(leaf, Tensor)]
        if packet in VIEWS or self.counts.on_host or not tensors or all(map(_on_host, tensors)):
            return found
        self._weigh(args, found)
        if packet in PRODUCTS:
            a, b = _factors(args)
            self.counts.flops += 2 * a.numel() * b.shape[-1]
        self.counts.launches += 1
        self.counts.calls[packet.__name__] += 1
        if any(t.dtype in DOUBLE for t in tensors):
            self.counts.doubles += 1
            if self.double == "none":
                raise NoDouble(f"{packet.__name__}: the device has no float64")
        if packet in WAITING:
            if not self.waits:
                raise HostWait(f"{packet.__name__} makes the host wait for the device")
            self.counts.waits.append(packet.__name__)
        return found

    def _weigh(self, args: Any, found: Any) -> None:
        """Note the memory of what was made."""
        alive = {ref: size for ref, size in self.counts.alive.items() if not ref.expired()}
        given = {StorageWeakRef(t.untyped_storage()) for t in tree_leaves(args) if isinstance(t, Tensor)}
        for t in tree_leaves(found):
            if isinstance(t, Tensor) and (ref := StorageWeakRef(t.untyped_storage())) not in given:
                alive.setdefault(ref, t.untyped_storage().nbytes())
        self.counts.alive = alive
        self.counts.peak = max(self.counts.peak, sum(alive.values()))


def _factors(args: Any) -> list[Tensor]:
    """The two matrices of a product, of which fused ones have a summand before them."""
    return [t for t in args if isinstance(t, Tensor)][-2:]


_KINDS = {
    Tensor.is_cuda.__get__: "cuda",  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: "cpu",  # type: ignore[attr-defined]
    Tensor.is_mps.__get__: "mps",  # type: ignore[attr-defined]
    Tensor.is_xpu.__get__: "xpu",  # type: ignore[attr-defined]
    Tensor.is_meta.__get__: "meta",  # type: ignore[attr-defined]
}


def _on_host(tensor: Any) -> bool:
    return getattr(tensor, "_on_host", False)


def _is_device(given: Any) -> bool:
    return isinstance(given, torch.device) or given.partition(":")[0] in ("cpu", "cuda", "mps", "xpu", "meta")


def _on_cpu(given: Any) -> Any:
    """The same with the device replaced by the one that is there."""
    if isinstance(given, torch.device) or (isinstance(given, str) and _is_device(given)):
        return torch.device("cpu")
    if isinstance(given, tuple):
        return tuple(map(_on_cpu, given))
    return {k: _on_cpu(v) for k, v in given.items()} if isinstance(given, dict) else given


class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, "cpu")  # type: ignore[call-arg]


class _Autocast(torch.autocast):
    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu", *args, **kwargs)


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True


def _patches(double: str) -> dict[str, Any]:
    """What of torch does not dispatch on tensors, and would look for the device."""
    return {
        "stiefel.linalg.precision._ratio": lambda *args: 1.0 if double == "fast" else math.inf,
        "torch.Event": _Event,
        "torch.cuda.Event": _Event,
        "torch.cuda.current_stream": lambda *args: None,
        "torch.cuda.is_current_stream_capturing": lambda: False,
        "torch.accelerator.current_stream": lambda *args: None,
        "torch.Generator": _Generator,
        "torch.autocast": _Autocast,
    }
