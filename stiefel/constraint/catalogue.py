"""The catalogue: methods by name. Imports ``base`` and the errors.

It is filled by importing :mod:`stiefel.methods`, which loads every file of its folder, and by a user's own classes.
"""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any, TypeVar

from stiefel.constraint.base import Constraint, Control
from stiefel.errors import OptionError, StiefelError, UnknownMethodError, nearest_names

_CATALOGUE: dict[str, type[Constraint]] = {}

C = TypeVar("C", bound=type[Constraint])


def register(cls: C) -> C:
    """Add a method to the catalogue, so that it works everywhere a name works; usable as a decorator.

    Args:
        cls: a concrete :class:`Constraint` with ``name``, ``summary`` and ``reference``.

    Returns:
        ``cls`` itself.

    Raises:
        StiefelError: not a concrete constraint, an attribute is missing, or the name belongs to another class.
    """
    if not (isinstance(cls, type) and issubclass(cls, Constraint)):
        raise StiefelError(f"register() takes a subclass of stiefel.Constraint, got {cls!r}")
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise StiefelError(f"{cls.__name__} cannot be registered: it does not define {missing}")
    for attribute in ("name", "place", "summary", "reference"):
        if not isinstance(getattr(cls, attribute, None), str):
            raise StiefelError(f"{cls.__name__} cannot be registered: it needs a class attribute `{attribute}: str`")
    # The same qualified name counts as the same class, so that a reloaded module may register again.
    known = _CATALOGUE.get(cls.name)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise StiefelError(f"a method named {cls.name!r} is registered already, by {known.__module__}; rename one")
    _CATALOGUE[cls.name] = cls
    return cls


def available() -> list[str]:
    """Names of all registered methods, sorted."""
    return sorted(_CATALOGUE)


def get(name: str, **options: Any) -> Constraint:
    """The method ``name`` with these options.

    Raises:
        UnknownMethodError: no such name; the message has the nearest ones.
        OptionError: no such option, or a value out of its range.
    """
    cls = method_class(name)
    known = [f.name for f in fields(cls)]
    for option in options:
        if option not in known:
            names, everything = nearest_names(option, known), ", ".join(known)
            more = f" (all: {everything})" if names.startswith("did") else ""  # else they are listed already
            raise OptionError(f"{name!r} has no option {option!r}; {names}{more}")
    return cls(**options)


def method_class(name: str) -> type[Constraint]:
    """The class registered under ``name``."""
    if name not in _CATALOGUE:
        raise UnknownMethodError(f"no method is named {name!r}; {nearest_names(str(name), _CATALOGUE)}")
    return _CATALOGUE[name]


def control() -> str:
    """The name of the method that does nothing, against which a comparison measures the others."""
    return next(name for name in available() if issubclass(_CATALOGUE[name], Control))


def table() -> str:
    """The catalogue as a Markdown table, as in docs/methods.md."""
    head = "| method | acts on | what it does | its own options (defaults) | on the set | (a, b) | source |\n"
    head += "|---" * 7 + "|\n"
    # scale and group_size are options of every method, and not listed.
    common = {f.name for f in fields(Constraint)}
    rows = []
    for name in available():
        cls = _CATALOGUE[name]
        own = ", ".join(f"`{f.name}={f.default!r}`" for f in fields(cls) if f.name not in common)
        method = cls()
        ab, claim = method.coefficients, "—" if method.claim is None else str(method.claim)
        step = "—" if ab is None else f"({ab[0]:g}, {ab[1]:g})"
        rows.append(f"| `{name}` | {cls.place} | {cls.summary} | {own or '—'} | {claim} | {step} | {cls.reference} |\n")
    return head + "".join(rows)
