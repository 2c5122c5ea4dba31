"""The optimizers that torch ships, and options that they take: found by inspection, so that a new one is drawn too."""

from __future__ import annotations

import inspect
import warnings
from functools import cache
from random import Random
from typing import Any

import torch

WORDS = ("strong_wolfe", "match_rms_adamw", "original")
"""Values of options that are words: torch says which optimizer takes which, by refusing the others."""

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
}


def needs_closure(name: str) -> bool:
    """Whether ``step`` does not do without one."""
    return inspect.signature(OPTIMIZERS[name].step).parameters["closure"].default is inspect.Parameter.empty


def draw_hyper(r: Random, name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Options of an optimizer; mostly such as torch itself steps a plain weight with."""
    hyper: dict[str, Any] = {"lr": rate(r)}
    for option, parameter in list(inspect.signature(OPTIMIZERS[name].__init__).parameters.items())[2:]:
        if option != "lr" and r.random() < 0.3:
            hyper[option] = _value(r, option, parameter)
    if r.random() < 0.03:
        hyper[r.choice([*hyper, "momentun"])] = r.choice([-1.0, (2.0, -1.0), "much"])
    if r.random() < 0.9:  # of those that torch refuses, a few stay
        while len(hyper) > 1 and refusal(name, repr(hyper), dtype):
            hyper.pop(r.choice([option for option in hyper if option != "lr"]))
    return hyper


def rate(r: Random) -> float:
    """A learning rate: mostly one to train with, of any size now and then."""
    usual, any_size = [0.1, 0.01, 1.0, 10 ** r.uniform(-3, 0)], [10 ** r.uniform(-6, 3), 10 ** r.uniform(-6, 3), 1e6]
    return r.choice(usual if r.random() < 0.7 else any_size)


def _value(r: Random, option: str, parameter: inspect.Parameter) -> Any:
    default = parameter.default
    if isinstance(default, bool) or "bool" in str(parameter.annotation):
        return r.choice([True, True, False])
    if isinstance(default, tuple):
        inside = all(isinstance(v, float) and 0 <= v < 1 for v in default)
        return tuple(r.choice([0.0, 0.5, 0.9, 0.99, 0.999]) for _ in default) if inside else default
    if "str" in str(parameter.annotation):
        return r.choice(WORDS)
    if option == "weight_decay":
        return r.choice([0.0, 1e-4, 0.01, 0.1, 0.1, 1.0, 10.0])
    if "int" in str(parameter.annotation):
        return r.choice([default, 2, 5])
    if not default:
        return r.choice([0.0, 0.5, 0.9, 1e-2])
    return r.choice([default, type(default)(default / 2)])


@cache
def refusal(name: str, hyper: str, dtype: torch.dtype) -> str | None:
    """What torch says where it steps no plain matrix with these options (a dictionary's repr); None where it does."""
    weight = torch.nn.Parameter(torch.ones(3, 2, dtype=dtype))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = OPTIMIZERS[name]([weight], **eval(hyper))

            def closure() -> torch.Tensor:
                optimizer.zero_grad()
                loss = weight.abs().square().sum()
                loss.backward()
                return loss

            optimizer.step(closure)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
