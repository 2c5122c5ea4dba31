"""Damage to records: one field replaced or dropped, or a file cut or overwritten at a random byte."""

import json
import random
from pathlib import Path
from typing import Any

from stiefel.compare.record.spec import RunSpec

DEEP = "<deep>"
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 3, 0.5, 1e-308, 1e308, -1e308, float("nan"), float("inf"), 10**30, 10**400, "", "0.5",
    "text", "\ud800", "$\\frac{$", "=1+1", "<script>", [], [1], ["a", None], [[1.0]], {}, {"a": 1}, {"a": {"b": []}},
    DEEP,
)  # fmt: skip
"""What may stand in the place of any value."""


def places(data: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The keys that lead to each value below some JSON data."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [place for key, value in items for place in ((*at, key), *places(value, (*at, key)))]


def changed(data: Any, rng: random.Random) -> str:
    """The data as JSON with one value replaced or dropped; what it was about is in the text alone."""
    *way, last = rng.choice(places(data))
    holder = data
    for key in way:
        holder = holder[key]
    if rng.random() < 0.1:
        del holder[last]
    else:
        holder[last] = rng.choice(ODD)
    return json.dumps(data).replace(json.dumps(DEEP), "[" * 5000 + "]" * 5000)


def damage(run: Path, rng: random.Random) -> str:
    """Damage a run's record or its measurements; returns what the damaged file holds."""
    file = run / rng.choice(("run.json", "run.json", "metrics.jsonl"))
    whole = file.read_text()
    if not whole:
        return ""
    at = rng.randrange(len(whole))
    kind = rng.random()
    if kind < 0.15:
        text = whole[:at]
    elif kind < 0.2:
        text = whole[:at] + rng.choice('\0{]"é') * rng.randrange(1, 9) + whole[at:]
    elif file.name == "run.json":
        text = changed(json.loads(whole), rng)
        text = rehashed(text) if rng.random() < 0.8 else text
    else:
        lines = whole.splitlines()
        line = rng.randrange(len(lines))
        lines[line] = changed(json.loads(lines[line]), rng)
        text = "\n".join(lines) + "\n"
    file.write_text(text)
    return text


def rehashed(text: str) -> str:
    """A record with the hash that belongs to its spec, where it has one: so the change of the spec itself is met."""
    try:
        raw = json.loads(text)
        return json.dumps(raw | {"hash": RunSpec.from_dict(raw["spec"]).hash})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return text
