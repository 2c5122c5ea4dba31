"""A method with options, as the axis of a comparison has it. Imports ``constraint``."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from stiefel.compare.record.spec import RunSpec, written
from stiefel.constraint import available, get, method_class
from stiefel.errors import OptionError


@dataclass(frozen=True)
class Variant:
    """A method with options, as a comparison's axis has it."""

    method: str
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Read ``name`` or ``name:option=value,option=value``; a scale given here is this variant's only one.

        Tuning leaves a knob alone that is given here, even at its default.

        Raises:
            UnknownMethodError, OptionError: as :func:`stiefel.get` raises them, or where an option has no value.
        """
        name, _, rest = text.partition(":")
        # What every comparison sets for the method comes first, so that the text can override it.
        options: dict[str, Any] = dict(method_class(name).comparison)
        for part in filter(None, rest.split(",")):
            key, equals, value = part.partition("=")
            if not equals:
                raise OptionError(f"{text!r} has an option without a value; write name:option=value,option=value")
            options[key] = literal(value)
        method = get(name, **options)  # checks names and values
        usual = {f.name: f.default for f in fields(method)}
        # The scale and the knobs stay even at their defaults: they record what was fixed by hand.
        kept = {"scale", *method.tuning}
        return cls(name, tuple(sorted((k, v) for k, v in options.items() if k in kept or v != usual[k])))


def label_of(spec: RunSpec) -> str:
    """The method as a user would write it: without the scale, and without what every comparison sets for it."""
    usual = method_class(spec.method).comparison if spec.method in available() else {}
    shown = {k: v for k, v in spec.options.items() if k != "scale" and not (k in usual and usual[k] == v)}
    return written(spec.method, shown)


def literal(text: str) -> Any:
    """A Python literal, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def parse_variants(texts: Sequence[str]) -> tuple[Variant, ...]:
    """Variants from the command line; ``all`` is the whole catalogue."""
    names = [name for text in texts for name in (available() if text == "all" else [text])]
    # Each once: `all own` names own twice.
    return tuple(dict.fromkeys(Variant.parse(name) for name in names))
