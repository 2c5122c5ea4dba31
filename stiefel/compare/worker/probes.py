"""What is measured of a model beside scores and orthogonality, and when. Imports ``training`` and ``measure``.

A measurement is a line of ``PROBES``: its name in the rows, the function of :mod:`stiefel.measure`, and its moments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from stiefel.compare.problem.batches import Batch, Batches
from stiefel.compare.worker.training import Training
from stiefel.measure.model.conditioning import Conditioning, conditioning
from stiefel.measure.model.dependence import dependence
from stiefel.measure.model.effective_rate import effective_rates
from stiefel.measure.model.operators import operator_spectrum
from stiefel.measure.model.signal import preservation, redundancy
from stiefel.measure.model.variance import activation_variance

SIGNAL_BATCH = 256
"""Examples on which signals and gradients are measured."""
WINDOWS = 8
"""Windows of a convolution's images from which second moments are taken, for each entry of a window."""
RATES = 10
"""Epochs of a reported run, evenly spread, after which effective rates are measured; tuning runs measure none."""


@dataclass(frozen=True)
class Moment:
    """When a measurement is made: after ``epoch`` of ``epochs`` (0: before the first) of a reported or a tuning run."""

    epoch: int
    epochs: int
    reported: bool

    @property
    def at_end(self) -> bool:
        """Whether it is the start or the end of training."""
        return self.epoch in (0, self.epochs)

    @property
    def at_reported_end(self) -> bool:
        """Whether it is the start or the end of a reported run's training."""
        return self.reported and self.at_end

    @property
    def sampled(self) -> bool:
        """Whether it is the start, the end, or one of the evenly spread moments of a reported run."""
        # Every k-th epoch with k = ⌈epochs/RATES⌉, hence at most RATES of them.
        return self.reported and (self.at_end or self.epoch % math.ceil(self.epochs / RATES) == 0)


@dataclass(frozen=True)
class Probe:
    """A measurement.

    Args:
        name: its key in a row of measurements.
        measure: the measurement of a model on a batch.
        due: whether it is made at a moment.
        copies: whether it copies the model, for which torch's cache of weights must be off. If it fails, its fields
            are missing and the reason is recorded; the run goes on.
    """

    name: str
    measure: Callable[[Training, Batch], Any]
    due: Callable[[Moment], bool]
    copies: bool = False


def _energy(training: Training, batch: Batch) -> dict[str, Any]:
    layers = preservation(training.model, lambda: training.problem.loss(training.model, batch))
    return {name: {key: value for key, value in asdict(s).items() if key != "calls"} for name, s in layers.items()}


def _variance(training: Training, batch: Batch) -> dict[str, Any]:
    return activation_variance(training.model, lambda: training.problem.loss(training.model, batch))


def _redundancy(training: Training, batch: Batch) -> dict[str, Any]:
    return redundancy(training.model)


def _conditioning(training: Training, batch: Batch) -> dict[str, Any]:
    layers = conditioning(training.model, lambda: training.problem.loss(training.model, batch), per_entry=WINDOWS)
    return {name: _conditions(found) for name, found in layers.items()}


def _conditions(found: Conditioning) -> dict[str, float | None]:
    """Ranks, and conditions over what is not zero: records hold no infinity."""
    a, s, block = found.inputs, found.gradients, found.block
    return {
        "input_condition": a.condition_nonzero if a else None,
        "input_rank": a.rank if a else None,
        "input_size": a.size if a else None,
        "gradient_condition": s.condition_nonzero if s else None,
        "gradient_rank": s.rank if s else None,
        "block_condition": block.condition_nonzero if block else None,
    }


def _operator(training: Training, batch: Batch) -> dict[str, Any]:
    layers = operator_spectrum(training.model, lambda: training.problem.loss(training.model, batch))
    return {name: {"operator_largest": o.largest, "operator_smallest": o.smallest} for name, o in layers.items()}


def _effective_rate(training: Training, batch: Batch) -> dict[str, Any]:
    return effective_rates(training.model, lambda m: training.problem.loss(m, batch))


def _dependence(training: Training, batch: Batch) -> dict[str, Any]:
    most = training.problem.dependent_layers
    return dependence(training.model, lambda m: training.problem.loss(m, batch), most=most).to_dict()


PROBES = (
    Probe("energy", _energy, lambda moment: moment.at_end),
    Probe("variance", _variance, lambda moment: moment.at_end),
    Probe("redundancy", _redundancy, lambda moment: moment.at_end),
    Probe("conditioning", _conditioning, lambda moment: moment.at_reported_end),
    Probe("operator", _operator, lambda moment: moment.at_reported_end),
    Probe("effective_rate", _effective_rate, lambda moment: moment.sampled, copies=True),
    Probe("dependence", _dependence, lambda moment: moment.at_reported_end, copies=True),
)


def probe(training: Training, part: Batches, moment: Moment, *, copies: bool) -> dict[str, Any]:
    """The results of the probes that are due, by name, on one batch of a part of the data.

    Args:
        training: what is measured.
        part: of the data.
        moment: of the training.
        copies: whether to run the probes that copy the model, or the others.
    """
    due = [p for p in PROBES if p.copies is copies and p.due(moment)]
    # dependent_layers = 0 is how a problem turns both probes on copies off.
    if not due or (copies and not training.problem.dependent_layers):
        return {}
    batch = next(part.all(SIGNAL_BATCH))  # unshuffled: of tensors, the same examples at every moment
    if not copies:
        with training.evaluating():
            return {p.name: p.measure(training, batch) for p in due}
    # In training mode, so that gradients are those of a training step, dropout and batch statistics included.
    try:
        return {p.name: p.measure(training, batch) for p in due}
    except Exception as error:
        return {"gradients_reason": f"{type(error).__name__}: {error}"}
