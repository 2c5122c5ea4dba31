"""What the data of a record must be, so that reports can calculate with them. Imports ``spec``.

A record comes from a disk: a copy that broke off, another program or a person may have changed it. A field that is
missing is no fault, because an earlier version may not have written it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

LARGEST = 1e100
"""Largest size of a number that reports calculate with: beyond, the spread of a sample is infinite."""
DEEPEST = 12
"""Most levels of nesting."""
WHOLE = 2**63
"""Bound of whole numbers: what tables and files hold as numbers."""

COUNTS = (
    "best_epoch", "steps", "seconds", "steps_to_target", "seconds_to_target", "compile_seconds", "orthogonality_worst",
    "orthogonality_final", "peak_resident_bytes", "matmul_flops", "factorization_flops", "operators", "gpu_peak_bytes",
    "gpu_reserved_bytes", "gpu_energy_joules", "parameters", "constrained_weights", "test_examples", "default_rate",
    "gradient_norm",
)  # fmt: skip
"""Entries of a summary that are numbers from zero on, or null."""
NUMBERS = ("best_validation", "test_at_best", "final_validation", "target", "constraint_share")
TEXTS = ("metric", "faults", "gpu_reason", "flops_reason", "cost_doubt", "gradient_norm_reason")
FLAGS = ("higher_is_better", "log_scale")
PLACES = ("commit", "stiefel", "cpu", "gpu", "gpu_reason", "torch")
"""Entries of an environment that are texts, or null; ``cores`` and ``threads`` are numbers."""

_SURROGATE = re.compile("[\ud800-\udfff]")


def printable(value: Any, level: int = 0) -> Any:
    """JSON data that any file can hold: half characters, which no encoding has, become ``�``.

    Numbers that are not finite or that reports cannot calculate with become None, as runs record infinity.

    Raises:
        ValueError: it is nested too deep.
    """
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value) if not value.isascii() else value
    if isinstance(value, dict):
        _bound(level)
        return {printable(key): printable(item, level + 1) for key, item in value.items()}
    if isinstance(value, list):
        _bound(level)
        return [printable(item, level + 1) for item in value]
    if isinstance(value, float):
        return value if abs(value) <= LARGEST else None
    return value if not isinstance(value, int) or -WHOLE <= value < WHOLE else None


def _bound(level: int) -> None:
    if level > DEEPEST:
        raise ValueError(f"more than {DEEPEST} levels of nesting")


def is_number(value: Any) -> bool:
    """Whether it is a number, which true and false are not; :func:`printable` has bounded it."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_spec(spec: Mapping[str, Any]) -> None:
    """Raise :class:`TypeError` or :class:`ValueError`, naming the field, where it is no spec of a run."""
    for key, known in (("kind", ("quality", "cost")), ("phase", ("tuning", "final"))):
        if spec[key] not in known:
            raise ValueError(f"{key} is {shown(spec[key])}, not {' or '.join(known)}")
    for key in ("problem", "digest", "method", "device", "dtype"):
        if not isinstance(spec.get(key, "as before"), str) or not spec.get(key, "as before"):
            raise TypeError(f"{key} is {shown(spec[key])}, not a string")
    for key in ("fields", "options", "knobs"):
        entries = spec.get(key, {})
        if not isinstance(entries, dict) or not all(map(_is_plain, entries.values())):
            raise TypeError(f"{key} is {shown(entries)}, not an object of numbers, texts and lists of these")
    if not (is_number(spec["lr"]) and spec["lr"] > 1 / LARGEST):
        raise ValueError(f"lr is {shown(spec['lr'])}, not a positive number")
    study = spec.get("study")
    for key, value in (("seed", spec["seed"]), ("study", 0 if study is None else study)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise TypeError(f"{key} is {shown(value)}, not a whole number from 0 on")


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float))


def check_outcome(outcome: Mapping[str, Any]) -> None:
    """Raise :class:`TypeError`, naming the entry, where what a run recorded beside its spec has another type."""
    for key in ("summary", "environment"):
        if not isinstance(outcome[key], dict):
            raise TypeError("summary and environment must be objects")
    summary, environment = outcome["summary"], outcome["environment"]
    _texts(outcome, ("reason", "label"))
    _texts(summary, TEXTS)
    _texts(environment, PLACES)
    trace = outcome.get("traceback", [])
    if not isinstance(trace, list) or not all(isinstance(line, str) for line in trace):
        raise TypeError(f"traceback is {shown(trace)}, not a list of texts")
    for key in FLAGS:
        if not isinstance(summary.get(key), (bool, type(None))):
            raise TypeError(f"{key} is {shown(summary[key])}, not true or false")
    if not isinstance(outcome.get("control"), (bool, type(None))):
        raise TypeError(f"control is {shown(outcome['control'])}, not true or false")
    _numbers(summary, NUMBERS)
    _numbers(summary, COUNTS, least=0)
    _numbers(summary, ("step_ratio",), least=1 / LARGEST)
    _numbers(outcome, ("wall_seconds",), least=0)
    _numbers(environment, ("cores", "threads"), least=0)
    parts = summary.get("test_parts")
    if parts is not None and not (isinstance(parts, list) and all(map(_or_null, parts))):
        raise TypeError(f"test_parts is {shown(parts)}, not a list of numbers")
    for name, step in _steps(summary):
        if not isinstance(step, dict):
            raise TypeError(f"step_seconds of {name} is {shown(step)}, not an object")
        try:
            _numbers(step, ("median", "q1", "q3"), least=1 / LARGEST)
            _numbers(step, ("n",), least=1)
        except TypeError as error:
            raise TypeError(f"step_seconds of {name}: {error}") from error


def moment(ended: Any) -> float:
    """The time of a run's end, in seconds since 1970, from these or from a text of ISO 8601.

    Raises:
        ValueError: it is neither.
    """
    if is_number(ended):
        return float(ended)
    try:
        return datetime.fromisoformat(ended).timestamp()
    except (TypeError, OverflowError, OSError, ValueError) as error:
        raise ValueError(f"ended is {shown(ended)}, not a time in seconds or of ISO 8601") from error


def _steps(summary: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    steps = summary.get("step_seconds")
    if steps is None:
        return ()
    if not isinstance(steps, dict):
        raise TypeError(f"step_seconds is {shown(steps)}, not an object")
    return steps.items()


def _texts(data: Mapping[str, Any], keys: Iterable[str]) -> None:
    for key in keys:
        if not isinstance(data.get(key), (str, type(None))):
            raise TypeError(f"{key} is {shown(data[key])}, not a string")


def _numbers(data: Mapping[str, Any], keys: Iterable[str], least: float = -LARGEST) -> None:
    for key in keys:
        value = data.get(key)
        if value is not None and not (is_number(value) and value >= least):
            bound = "" if least < 0 else " from 0 on" if least == 0 else " above 0"
            raise TypeError(f"{key} is {shown(value)}, not a number{bound}")


def row_of(raw: Any) -> dict[str, Any] | None:
    """A row of measurements from its JSON: scores, orthogonality, what layers do; None where a type is another."""
    try:
        row: dict[str, Any] = printable(raw)
        return row if all(_row(row)) else None
    except (TypeError, ValueError, KeyError, AttributeError):
        return None


def _row(row: dict[str, Any]) -> Iterator[bool]:
    yield all(is_number(row[key]) and row[key] >= 0 for key in ("step", "seconds"))
    yield _or_null(row.get("epoch")) and _or_null(row["train_loss"])
    yield _by_name(row["validation"]) and _by_name(row.get("test", {}))
    yield _or_null(row["orthogonality"]["worst"]) and _by_name(row["orthogonality"]["layers"])
    yield all(_by_name(row.get(key) or {}) for key in ("variance", "redundancy", "effective_rate"))
    yield all(_layer(layer) for key in ("energy", "conditioning", "operator") for layer in row.get(key, {}).values())
    yield isinstance(row.get("gradients_reason", ""), str)
    found = row.get("dependence")
    if found is not None:
        size = len(found["layers"])
        yield all(isinstance(name, str) for name in found["layers"])
        lines = [found["gradient"], *found["turn"]]
        yield len(lines) == size + 1 and all(len(line) == size and all(map(_or_null, line)) for line in lines)


def _or_null(value: Any) -> bool:
    return value is None or is_number(value)


def _layer(values: Mapping[str, Any]) -> bool:
    """What of a layer was measured, or the reason why not."""
    _texts(values, ("reason",))
    return _by_name({key: value for key, value in values.items() if key != "reason"})


def _by_name(values: Mapping[str, Any]) -> bool:
    return all(map(_or_null, values.values()))


def shown(value: Any, most: int = 60) -> str:
    """A value as a message quotes it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"
