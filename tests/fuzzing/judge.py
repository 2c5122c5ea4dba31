"""The verdict on one run of a configuration.

trained   every weight is finite and where its method promises, and nothing has changed that should not.
refused   by one of the library's errors, whose message names what is refused.
failed    anything else.
"""

from __future__ import annotations

import re
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

import stiefel
from fuzzing.configuration import Configuration
from fuzzing.faults import Fault, is_named
from fuzzing.optimizers import refusal
from fuzzing.trial import Trial

SECONDS = 60.0
SLOW = f"took longer than {SECONDS:g} s"
EXPECTED_WARNINGS = ("Complex modules are a new feature", "torch.jit", "lr_scheduler")
LOADED_OFF = "off its constraint's set"  # which the library tells of a weight that was off its set when it was saved


@dataclass(frozen=True)
class Verdict:
    """Of one run: ``outcome`` is trained, refused or failed; ``kind`` says what runs of one outcome differ in."""

    outcome: str
    kind: str = ""
    detail: str = ""


def judge(c: Configuration) -> Verdict:
    """Run a configuration."""
    trial = Trial(c)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        verdict = _outcome(trial)
    for warning in caught if verdict.outcome != "failed" else []:
        text = str(warning.message)
        if not any(words in text for words in EXPECTED_WARNINGS) and not (LOADED_OFF in text and trial.beyond):
            return Verdict("failed", f"warned: {_pattern(text)}", text)
    return verdict


def _outcome(trial: Trial) -> Verdict:
    c = trial.c
    try:
        with deadline():
            trial.run()
        return Verdict("trained")
    except Fault as fault:
        return Verdict("failed", fault.kind, fault.detail)
    except stiefel.StiefelError as error:
        if is_named(error, c.options, c.optimizer, c.names):
            return Verdict("refused", type(error).__name__, str(error))
        return Verdict("failed", f"a {type(error).__name__} that names nothing", str(error))
    except Exception as error:
        known = refusal(c.optimizer, repr(c.hyper), getattr(torch, c.dtype)) or ""
        likewise = known.startswith(f"{type(error).__name__}: {error}"[:40])
        kind = "torch's own, as for a plain weight" if likewise else _pattern(error)
        return Verdict("failed", f"raised {type(error).__name__}: {kind}", str(error))


def _pattern(error: object) -> str:
    """The beginning of a message without its numbers and names."""
    first = str(error).strip().partition("\n")[0]
    return re.sub(r"'[^']*'|\d[\d.e+-]*", "…", first)[:90]


@contextmanager
def deadline() -> Iterator[None]:
    """Raise where the block takes too long, as far as Python gets to notice."""

    def stop(*_: object) -> None:
        raise Fault(SLOW)

    if threading.current_thread() is not threading.main_thread():  # only that one gets signals
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
