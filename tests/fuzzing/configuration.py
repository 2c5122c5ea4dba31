"""One random configuration: what is trained, by which method, with which optimizer, and what happens on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields, replace
from math import inf, nan
from random import Random
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

import stiefel
from fuzzing.events import EVENTS
from fuzzing.models import BORN, FLAT, LARGE, LOSSES, MODELS, REAL, STARTS, make
from fuzzing.optimizers import OPTIMIZERS, draw_hyper, needs_closure
from stiefel.methods import method_class

STYLES = ("plain", "closure", "accumulate", "clip", "scaler", "scaler and clip", "autocast")
GROUPS = ("whole", "list", "named", "two", "constrained only", "bad")


@dataclass(frozen=True)
class Configuration:
    """One run. Every field but the method has the simplest value as its default, to which examples are reduced.

    Args:
        method, options: as given to ``stiefel.constrain``.
        model, bias, dtype, start: what is trained, and from where.
        optimizer, hyper, groups: as given to ``stiefel.optimizer``; ``groups`` is a word for the parameters.
        tensor_rate: the learning rate is a tensor.
        loss, size: what pulls the weights, and by what its gradient is multiplied.
        active: the share of a step's weights that get a gradient.
        style: how a step is taken.
        schedule: the rate goes to zero.
        keep: gradients are set to zero, not to None.
        steps, events: how many, and what happens before which.
        seed: of all that is drawn in the run.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    model: str = "wide"
    bias: bool = False
    dtype: str = "float64"
    start: str = "gaussian"
    optimizer: str = "SGD"
    hyper: dict[str, Any] = field(default_factory=lambda: {"lr": 0.1})
    groups: str = "whole"
    tensor_rate: bool = False
    loss: str = "linear"
    size: float = 1.0
    active: float = 1.0
    style: str = "plain"
    schedule: bool = False
    keep: bool = False
    steps: int = 3
    events: tuple[tuple[int, str], ...] = ()
    seed: int = 0

    @property
    def names(self) -> list[str]:
        """Those of the weights, and of the layers that they are tied to."""
        found = make(self.model, self.bias, self.seed).named_parameters(remove_duplicate=False)
        return [name for name, p in found if p.ndim >= 2]

    def __str__(self) -> str:
        """The call that makes it, without the values that are as usual."""
        usual = Configuration(self.method)
        changed = [f.name for f in fields(self) if getattr(self, f.name) != getattr(usual, f.name)]
        return f"Configuration({', '.join([repr(self.method), *(f'{n}={getattr(self, n)!r}' for n in changed)])})"


class Decaying:
    """A strength that halves at every step; picklable, with a representation that makes it again."""

    def __call__(self, step: int) -> float:
        return 0.1 * 0.5**step

    def __repr__(self) -> str:
        return "Decaying()"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Decaying)


# --- drawing ---


def draw(seed: int, number: int) -> Configuration:
    """The configuration of that number among those of a seed."""
    r = Random(f"{seed}:{number}")
    method = r.choice(stiefel.available())
    dtype = r.choice(["float32"] * 20 + ["float64"] * 10 + ["complex64", "complex128"] * 4 + ["bfloat16", "float16"])
    large = r.random() < 0.05 and method_class(method).thin
    optimizer = r.choice([*OPTIMIZERS] if r.random() < 0.5 else ["SGD", "SGD", "Adam", "AdamW"])
    names = [*LARGE] if large else [*MODELS, *BORN]
    names = ["gates"] if dtype.startswith("complex") and r.random() < 0.1 else names
    names = FLAT if optimizer == "Muon" and r.random() < 0.8 else names  # it takes nothing else
    model = r.choice([n for n in names if not (n in REAL and dtype.startswith("complex"))])
    style = r.choice(STYLES if r.random() < 0.6 else STYLES[:1])
    if style.startswith("scaler") and dtype.startswith("complex"):  # torch's scaler is of real gradients only
        style = "clip"
    if style == "autocast" and dtype != "float32":
        style = "plain"
    if needs_closure(optimizer):
        style = "closure"
    steps = r.choice([3, 3, 5, 8, 12, 30] if r.random() < 0.99 else [500])
    steps = 3 if model == "200 gates" else min(steps, 12) if large else steps
    hyper = draw_hyper(r, optimizer, getattr(torch, dtype))
    return Configuration(
        method=method,
        options=draw_options(r, method),
        model=model,
        bias=r.random() < 0.5 and names is not FLAT,
        dtype=dtype,
        start=r.choice([*STARTS] if r.random() < 0.5 else [*STARTS][:1]),
        optimizer=optimizer,
        hyper=hyper,
        groups=r.choice(GROUPS if r.random() < 0.4 else GROUPS[:1]),
        tensor_rate=r.random() < 0.04,
        loss=r.choice([*LOSSES]),
        size=r.choice([1.0] if r.random() < 0.6 else [1e-30, 1e-8, 10.0, 1e4, 1e10, 1e20]),
        active=r.choice([1.0, 1.0, 0.5]),
        style=style,
        schedule=r.random() < 0.2,
        keep=r.random() < 0.2 and not dtype.startswith("complex"),  # torch zeroes by foreach, as it clips
        steps=steps,
        events=draw_events(r, method, steps),
        seed=r.randrange(1000),
    )


def draw_events(r: Random, method: str, steps: int) -> tuple[tuple[int, str], ...]:
    """At most three, each before one of the steps; a release names the method that comes after."""
    if r.random() < 0.3:
        return ()
    words = [r.choice([*EVENTS]) for _ in range(r.randint(1, 3))]
    words = [f"release {r.choice(stiefel.available())}" if w == "release" else w for w in words]
    return tuple(sorted((r.randrange(steps + 1), word) for word in words))


def draw_options(r: Random, method: str) -> dict[str, Any]:
    """Values of some of a method's options, a few of them invalid."""
    cls = method_class(method)
    hints, options = get_type_hints(cls), {}
    for option in fields(cls):
        if r.random() < 0.4:
            right, wrong = _values(r, option, hints[option.name], cls.tuning.get(option.name, ()))
            options[option.name] = r.choice(wrong) if r.random() < 0.04 else r.choice(right)
    if r.random() < 0.01:
        options[r.choice(["stength", "centre", ""])] = 1
    return options


def _values(r: Random, option: Field[Any], hint: Any, tuning: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Values of an option that its type and its tuning space allow, and some that they do not."""
    default = option.default
    wrong: list[Any] = [0, -1, -0.5, nan, inf, "zzz", [], 1.5, True, None]
    if option.name == "scale":
        return [10 ** r.uniform(-3, 3), 2.0, "relu", "learnable"], [0, -1.0, nan, inf, "gelu", True, None, [1.0]]
    if option.name == "group_size":
        return [1, 1, 2, 3], [0, -1, 1.5, True, 1000, "2"]
    if option.name == "determinant":  # of square weights, which few are
        return [None, None, None, None, 1, -1], [0, 2, True, 1.0, "+"]
    if option.name == "subspace":  # of others, and not of controls
        return [False, False, False, True], [0, None, "yes"]
    words = [*(v for v in tuning if isinstance(v, str)), *_words(hint)]
    if words:
        return words, wrong
    if isinstance(default, bool):
        return [True, False], wrong
    if hint == int | None:  # a count, or never
        return [*tuning, 2, 3], [value for value in wrong if value is not None]
    if isinstance(default, int):
        return [*tuning, default, 1, 2, 3 * default], wrong
    right = [*tuning, 1e-3, 0.3, *([default / 2, 2 * default] if default else [])]
    return [*right, Decaying()] if "Callable" in str(hint) else right, wrong


def _words(hint: Any) -> list[Any]:
    """The values of a ``Literal``, also of one within a union."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    inner = [word for part in get_args(hint) for word in _words(part)]
    return [*inner, True, False] if inner and bool in get_args(hint) else inner


def simpler(c: Configuration) -> list[Configuration]:
    """Configurations with one thing less than this one, the greatest simplifications first."""
    usual = Configuration(c.method)
    found = [replace(c, **{f.name: getattr(usual, f.name)}) for f in fields(c) if f.name != "steps"]
    found += [replace(c, options={k: v for k, v in c.options.items() if k != gone}) for gone in c.options]
    found += [replace(c, hyper={k: v for k, v in c.hyper.items() if k != gone}) for gone in c.hyper if gone != "lr"]
    found += [replace(c, hyper={**c.hyper, "lr": 0.1})]
    found += [replace(c, events=tuple(e for e in c.events if e != gone)) for gone in c.events]
    found += [replace(c, steps=n) for n in (1, 3, c.steps // 2, c.steps - 1) if 0 < n < c.steps]
    return [smaller for smaller in found if str(smaller) != str(c)]
