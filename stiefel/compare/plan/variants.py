"""A method with options, as the axis of a comparison has it. Imports ``methods``."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from stiefel.compare.record.spec import RunSpec, written
from stiefel.errors import OptionError
from stiefel.methods import available, get, method_class


@dataclass(frozen=True)
class Variant:
    """A method with options, as a comparison's axis has it."""

    method: str
    options: tuple[tuple[str, Any], ...] = ()

    def at(self, scales: Iterable[Any]) -> Iterator[dict[str, Any]]:
        """Its options at each scale; once where it has a scale of its own, or starts from the network as it is."""
        own = dict(self.options)
        if not get(self.method, **own).orthogonal_start:
            yield own
        else:
            for scale in (own["scale"],) if "scale" in own else scales:
                yield {**own, "scale": scale}

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Read ``name``, ``name:option=value,option=value`` or another name of one of these (:func:`aliases`).

        A scale given here is this variant's only one.

        Tuning leaves a knob alone that is given here, even at its default.

        Raises:
            UnknownMethodError, OptionError: as :func:`stiefel.get` raises them, or where an option has no value.
        """
        name, _, rest = aliases().get(text, text).partition(":")
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
    name = written(spec.method, shown)
    return {long: short for short, long in aliases().items()}.get(name, name)


def aliases() -> dict[str, str]:
    """Methods with options that comparisons call by a name of their own, as ``default``, with what they stand for."""
    return {
        alias: written(name, dict(options))
        for name in available()
        for alias, options in method_class(name).aliases.items()
    }


def literal(text: str) -> Any:
    """A Python literal, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def parse_variants(texts: Sequence[str]) -> tuple[Variant, ...]:
    """Variants from the command line; ``all`` is the whole catalogue with its aliases."""
    names = [name for text in texts for name in ([*available(), *aliases()] if text == "all" else [text])]
    return tuple(dict.fromkeys(Variant.parse(name) for name in names))
