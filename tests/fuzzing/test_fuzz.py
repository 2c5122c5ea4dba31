"""Some of the random configurations of ``fuzz.py``, and that it finds faults of each kind that it looks for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from math import inf, nan

import broken
import fuzz
import pytest
from common import registered
from torch import Tensor

import stiefel
from fuzzing.configuration import STYLES, Configuration, Decaying, draw
from fuzzing.events import EVENTS
from fuzzing.judge import judge
from fuzzing.models import BORN, LARGE, LOSSES, MODELS, STARTS
from fuzzing.optimizers import OPTIMIZERS
from stiefel.errors import LayoutError
from stiefel.layout import Layout
from stiefel.methods import method_class
from stiefel.optim import guard

SEED, COUNT, TOGETHER = 13, 200, 25


@pytest.mark.sampled(6, values=False)
@pytest.mark.parametrize("first", range(0, COUNT, TOGETHER))
def test_random_configurations_train_or_are_refused_by_name(first: int) -> None:
    found = list(fuzz.results(range(first, first + TOGETHER), SEED, jobs=1))
    failed = [result for result in found if result[2].outcome == "failed"]
    assert not failed, "\n".join(fuzz.describe(failed, SEED, reduce=False))
    assert sum(verdict.outcome == "trained" for *_, verdict in found) > TOGETHER / 4


def test_what_is_drawn_is_everything_there_is() -> None:
    drawn = [draw(0, number) for number in range(2000)]
    assert {c.method for c in drawn} == set(stiefel.available())
    assert {c.model for c in drawn} == {*MODELS, *LARGE, *BORN}
    assert {c.optimizer for c in drawn} == set(OPTIMIZERS)
    assert {c.loss for c in drawn} == set(LOSSES)
    assert {c.start for c in drawn} == set(STARTS)
    assert {c.style for c in drawn} == set(STYLES)
    assert {event.split()[0] for c in drawn for _, event in c.events} == set(EVENTS)
    for name in stiefel.available():
        options = Counter(option for c in drawn if c.method == name for option in c.options)
        assert set(options) >= {f.name for f in fields(method_class(name))}


def test_a_configuration_is_its_seed_and_its_representation() -> None:
    names = {"Configuration": Configuration, "Decaying": Decaying, "inf": inf, "nan": nan}
    for number in range(300):
        c = draw(3, number)
        assert str(draw(3, number)) == str(c)
        assert str(eval(str(c), names)) == str(c)


# --- it can fail ---


@dataclass(frozen=True, kw_only=True)
class RefusesWithoutAName(stiefel.StepMethod):
    """Says that it cannot, and not what."""

    name, summary, reference = "test_silent", "refuses", "none"

    def check(self, layout: Layout) -> None:
        raise LayoutError("no")

    def step(self, x: Tensor, displacement: Tensor, lr: float) -> Tensor:
        return x


@dataclass(frozen=True, kw_only=True)
class Crashes(stiefel.StepMethod):
    """Cannot be given one row."""

    name, summary, reference = "test_crashes", "crashes", "none"
    claim = stiefel.Claim()

    def step(self, x: Tensor, displacement: Tensor, lr: float) -> Tensor:
        return self.nearest(x + displacement / (x.shape[-2] - 1), None) if x.shape[-2] > 1 else x[7]


@pytest.fixture
def wrong(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from registered(request.param)


FAULTS = [
    (broken.Drifts, "off its claim"),
    (broken.LowPrecision, "off its claim"),
    (broken.NaNAtTheStart, "NaN"),
    (broken.Jitters, "changes a weight"),
    (Crashes, "raised IndexError"),
]


@pytest.mark.sampled(3, values=False)
@pytest.mark.parametrize(
    ("wrong", "kind"), FAULTS, indirect=["wrong"], ids=lambda v: v if isinstance(v, str) else v.__name__
)
def test_a_method_that_is_wrong_on_purpose_is_found(wrong: str, kind: str) -> None:
    """Within so many draws, of which others may be refused, or fail in another way."""
    kinds = Counter(judge(replace(draw(1, number), method=wrong, options={})).kind for number in range(60))
    assert any(kind in found for found in kinds), kinds


@pytest.mark.parametrize("wrong", [RefusesWithoutAName], indirect=True)
def test_a_refusal_that_names_nothing_is_found(wrong: str) -> None:
    verdict = judge(Configuration(wrong, model="matrix"))
    assert (verdict.outcome, verdict.kind) == ("refused", "LayoutError")  # constrain() adds the weight's name
    assert verdict.detail == "weight 'a': no"


def test_a_silent_divergence_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_refuse_divergence", lambda *_: None)
    verdict = judge(Configuration("own", events=((1, "nan"),)))
    assert (verdict.outcome, verdict.kind) == ("failed", "a gradient that is NaN or infinite is stepped without a word")


def test_an_example_is_reduced_to_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_refuse_divergence", lambda *_: None)
    events = ((0, "report"), (1, "nan"), (3, "refresh"))
    c = Configuration("own", options={"scale": 2.0}, model="tall", optimizer="Adam", loss="pull", events=events, seed=4)
    assert str(fuzz.reduced(c, judge(c).kind)) == "Configuration('own', steps=2, events=((1, 'nan'),))"
