"""The law of captured steps where there is no GPU: a CUDA graph reads the tensors that a step had when it was captured.

So each step writes into the tensors that the one before it left; what the host counts is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from common import forms
from test_devices import Training, net
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

import stiefel
from stiefel.constraint import Constraint

FORMS = [form for name in stiefel.available() for form in forms(name)]
BASES = {
    "momentum": (SGD, {"lr": 0.05, "momentum": 0.9}),
    "Nesterov": (SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "Adam": (Adam, {"lr": 1e-2}),
    "AdamW": (AdamW, {"lr": 1e-2, "amsgrad": True}),
}
COUNTED = {"step"}
"""States that an optimizer counts on the host; torch keeps them on the device where ``capturable`` is set."""


def held(training: Training) -> Iterator[tuple[str, Tensor]]:
    """All that a step leaves to the next one."""
    model, optimizer = training.model, training.optimizer
    yield from model.named_parameters()
    yield from model.named_buffers()
    for i, state in enumerate(optimizer.state.values()):
        for key, value in state.items():
            if isinstance(value, Tensor) and key not in COUNTED:
                yield f"{i}.{key}", value


@pytest.mark.sampled(3)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", FORMS, ids=str)
def test_a_step_writes_into_the_tensors_that_the_last_one_left(method: Constraint, base: str) -> None:
    cls, hyper = BASES[base]
    try:
        training = Training(stiefel.constrain(net("cpu"), method), "cpu")
        training.optimizer = stiefel.optimizer(training.model, cls, **hyper)
    except stiefel.OptimizerError:
        pytest.skip("refused by name")
    training.steps(2)
    before = {name: (value.data_ptr(), value.clone()) for name, value in held(training)}
    training.steps(1)
    after = dict(held(training))
    assert before.keys() == after.keys()
    assert [name for name, (place, _) in before.items() if after[name].data_ptr() != place] == []
    assert any(not torch.equal(value, after[name]) for name, (_, value) in before.items())


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """As while a graph is captured, but that it is computed."""
    monkeypatch.setattr("stiefel.linalg.devices.is_capturing", lambda tensor: True)


@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize(
    ("method", "base", "hyper", "what"),
    [
        ("riemannian", Adam, {}, "the bias correction of Riemannian Adam"),
        ("riemannian", SGD, {"stabilize": 10}, "stabilize"),
        ("rsdm", SGD, {}, "the step of 'rsdm'"),
        ("soft", SGD, {"strength": lambda step: 1e-3 * step}, "the strength of 'soft'"),
        ("soft", SGD, {"strength": lambda step: 1e-3 * step, "decoupled": True}, "the strength of 'soft'"),
        ("dissolving", SGD, {"strength": lambda step: 1e-3 * step}, "the strength of 'dissolving'"),
        ("cayley", SGD, {"rebase": 2}, "the start of 'cayley'"),
    ],
    ids=["Adam", "stabilize", "draws", "schedule", "decoupled schedule", "schedule of a proxy", "moving start"],
)
def test_what_the_host_counts_is_refused(
    method: str, base: type[torch.optim.Optimizer], hyper: dict[str, object], what: str
) -> None:
    options = {k: hyper[k] for k in ("strength", "decoupled", "rebase") if k in hyper}
    model = stiefel.constrain(nn.Linear(12, 8), method, **options)
    optimizer = stiefel.optimizer(model, base, lr=0.1, **{k: v for k, v in hyper.items() if k not in options})

    def step() -> None:
        (model(torch.randn(4, 12)).square().sum() + stiefel.penalty(model)).backward()
        optimizer.step()

    with pytest.raises(stiefel.OptimizerError, match=f"{what} depends on the number of steps taken"):
        step()


@pytest.mark.usefixtures("captured")
def test_a_start_that_moves_at_every_step_needs_no_count() -> None:
    model = stiefel.constrain(nn.Linear(12, 8), "cayley", rebase=1)
    optimizer = stiefel.optimizer(model, SGD, lr=0.1)
    before = [b.clone() for b in model.buffers()]
    model(torch.randn(4, 12)).square().sum().backward()
    optimizer.step()
    assert not any(map(torch.equal, model.buffers(), before))
