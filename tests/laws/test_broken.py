"""The laws can fail: for each method m of ``broken.py``, ``{checks that reject m} ⊇ {checks named beside it} ≠ ∅``."""

import warnings

import broken
import conformance
import pytest
import torch
from torch.autograd.gradcheck import GradcheckError

import stiefel
from stiefel.optim import guard


class SoundStep(broken.Step):
    """Without a fault."""

    name, summary, reference = "sound_step", "right", "none"


class SoundMap(broken.Map):
    """Without a fault."""

    name, summary, reference = "sound_map", "right", "none"


CASES = [(cls, check) for cls, checks in broken.BROKEN.items() for check in checks]


@pytest.mark.parametrize(("cls", "check"), CASES, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_is_rejected(cls: type, check: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((AssertionError, GradcheckError)):
            conformance.run(cls(), check, torch.float64)


def test_there_are_many() -> None:
    assert len(broken.BROKEN) >= 10


def test_every_check_rejects_one() -> None:
    """But for the one of NaN gradients, which no method could hide; the next test has its fault."""
    assert {check for checks in broken.BROKEN.values() for check in checks} == set(conformance.CHECKS) - {"divergence"}


def test_a_silent_divergence_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_refuse_divergence", lambda *_: None)
    sound = SoundMap()
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        conformance.run(sound, "divergence", torch.float64)


@pytest.mark.parametrize("sound", [SoundStep(), SoundMap()], ids=lambda m: m.name)
def test_what_they_are_made_of_is_right(sound: stiefel.Constraint) -> None:
    """The same classes without a fault pass: it is the fault that is rejected."""
    for check in conformance.CHECKS:
        conformance.run(sound, check, torch.float64)
