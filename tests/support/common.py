"""What several test files share: layers with their layouts, the forms of a method, and one of a user's own."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import stiefel
from stiefel.compare import cli
from stiefel.layout import Layout

LAYERS = {
    "wide": (lambda: nn.Linear(9, 4), Layout((4, 9))),
    "tall": (lambda: nn.Linear(4, 9), Layout((9, 4))),
    "square": (lambda: nn.Linear(5, 5), Layout((5, 5))),
    "conv": (lambda: nn.Conv2d(3, 6, 3), Layout((6, 3, 3, 3))),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), Layout((6, 2, 3, 3), blocks=2)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), Layout((4, 3, 2, 2), blocks=2, transposed=True)),
}


FAULTY = '''
"""A linear problem that can be made to fail in several ways."""
import ctypes, os, signal, sys, time
from dataclasses import dataclass
import torch
from torch import nn
from stiefel.compare import Data, Problem

@dataclass(frozen=True, kw_only=True)
class Toy(Problem):
    fault: str = "none"
    epochs: int = 3
    batch_size: int = 16
    target = 0.1

    def make_model(self):
        return nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 2))

    def make_data(self):
        x = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))
        y = (x[:, 0] > 0).long()
        return Data((x[:64], y[:64]), (x[64:80], y[64:80]), (x[80:], y[80:]))

    def loss(self, model, batch):
        loss = super().loss(model, batch)
        if "stiefel.compare.problem.check" in sys.modules:  # the driver's check of the problem, before any run
            return loss
        if self.fault == "raise":
            raise KeyError("broken on purpose")
        if self.fault == "segfault":
            ctypes.string_at(0)
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "allocate":
            hold = [torch.ones(50_000_000) for _ in range(1000)]
        if self.fault == "hang":
            time.sleep(600)
        return loss * float("nan") if self.fault == "nan" else loss
'''
"""A problem file, as text."""


def compare(problem: Path, *arguments: str) -> int:
    """The exit status of ``stiefel compare``, with records beside the problem's file.

    It runs in this process, so that all tests share one server that runs are forked from: its imports take seconds.
    """
    return cli.main(["compare", str(problem), "--lr", "0.1", "--out", str(problem.parent / "runs"), *arguments])


def forms(name: str, **options: Any) -> list[stiefel.Constraint]:
    """A method with these options, first as it is, and with every combination of its options that take a word.

    Those are the ones whose type is a ``Literal``, or for which its tuning space names words. A start that stays or
    moves makes two forms as well.
    """
    first, words = stiefel.get(name, **options), {}
    hints = get_type_hints(type(first))
    for option in (f.name for f in fields(first)):
        literal = get_args(hints[option]) if get_origin(hints[option]) is Literal else ()
        if values := [v for v in first.tuning.get(option, literal) if isinstance(v, str)]:
            words[option] = sorted(values, key=lambda v: v != getattr(first, option))  # its own value comes first
    found = [replace(first, **dict(zip(words, choice, strict=True))) for choice in product(*words.values())]
    found += [replace(method, rebase=2) for method in found if getattr(method, "rebase", 2) is None]
    return [method for method in found if method.orthogonal_start]  # laws are of sets, and of none the network as it is


def on_common_set(method: stiefel.Constraint) -> stiefel.Constraint:
    """The method with the options that put it on the same set as all others."""
    return replace(method, **{k: v for k, v in method.comparison.items() if k in {f.name for f in fields(method)}})


class Largest(TorchDispatchMode):
    """Keeps the number of entries of the largest tensor that any operation returned."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.entries = max(self.entries, leaf.numel())
        return result


@dataclass(frozen=True, kw_only=True)
class Projection(stiefel.StepMethod):
    """X ← polar(X + U)."""

    name = "test_projection"
    summary = "project after the step"
    reference = "none"
    claim = stiefel.Claim()

    def step(self, x: Tensor, displacement: Tensor, lr: float) -> Tensor:
        return self.nearest(x + displacement, None)


def registered(cls: type[stiefel.Constraint]) -> Iterator[str]:
    """Register a method while a fixture is in use; yields its name."""
    stiefel.register(cls)
    try:
        yield cls.name
    finally:
        del stiefel.constraint.catalogue._CATALOGUE[cls.name]


class PeakMemory(TorchDispatchMode):
    """Keeps the most entries, and bytes, that tensors made inside held at one time, views counted once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.entries = 0
        self._alive: dict[StorageWeakRef, tuple[int, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._alive = {ref: size for ref, size in self._alive.items() if not ref.expired()}
        given = {StorageWeakRef(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                ref = StorageWeakRef(leaf.untyped_storage())
                if ref not in self._alive and ref not in given:
                    size = leaf.untyped_storage().nbytes()
                    self._alive[ref] = size, size // leaf.element_size()
        self.bytes = max(self.bytes, sum(size for size, _ in self._alive.values()))
        self.entries = max(self.entries, sum(entries for _, entries in self._alive.values()))
        return result


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal entries, the same for a seed in every test."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Callable[[], Tensor]:
    """One step of training towards outputs of 0, as a function of nothing; returns the loss."""

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean() + stiefel.penalty(model)
        loss.backward()
        optimizer.step()
        return loss

    return step
