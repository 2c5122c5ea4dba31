"""What happens to a model and its optimizer between two steps. Few of these may change a weight (``MOVES``)."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, parametrize, vector_to_parameters
from torch.optim.swa_utils import AveragedModel

import stiefel
from fuzzing.faults import Fault
from fuzzing.models import LARGE, gaussian
from fuzzing.optimizers import OPTIMIZERS, needs_closure
from stiefel import measure
from stiefel.attach.weights import constrained_weights

if TYPE_CHECKING:
    from fuzzing.models import Net
    from fuzzing.trial import Trial


def _go_on_with(trial: Trial, pair: tuple[Net, torch.optim.Optimizer], step: int) -> None:
    """A copy of the model and the optimizer; of torch's optimizers, where torch can copy it (LBFGS it cannot)."""
    lost = vars(trial.optimizer).keys() - vars(pair[1]).keys() - vars(torch.optim.SGD([torch.ones(1)])).keys()
    if lost - {"step"} and type(trial.optimizer) in OPTIMIZERS.values():  # a schedule puts that one there
        return
    trial.model, trial.optimizer = pair
    trial.schedule_from(step)


def deepcopy(trial: Trial, step: int) -> None:
    _go_on_with(trial, copy.deepcopy((trial.model, trial.optimizer)), step)


def pickled(trial: Trial, step: int) -> None:
    if not any(parametrize.is_parametrized(m) for m in trial.model.modules()):  # which torch refuses to pickle
        _go_on_with(trial, pickle.loads(pickle.dumps((trial.model, trial.optimizer))), step)


def load(trial: Trial, step: int) -> None:
    """State dicts, into a fresh pair that starts elsewhere."""
    file = io.BytesIO()
    torch.save((trial.model.state_dict(), trial.optimizer.state_dict()), file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    method = next(constrained_weights(trial.model)).binding.constraint
    options = {k: v for k, v in vars(method).items() if v != getattr(type(method)(), k)}
    other = type(trial)(replace(trial.c, seed=trial.c.seed + 1, start="gaussian"))
    dtype = trial.starts[0].dtype
    trial.model, trial.optimizer = other.pair(method.name, options)
    if dtype == torch.float64:  # to(a complex dtype) would make real gains complex
        trial.model.double()
    trial.model.load_state_dict(states[0])
    trial.optimizer.load_state_dict(states[1])
    trial.schedule_from(step)


def evaluate(trial: Trial, step: int) -> None:
    trial.model.eval()
    with torch.no_grad():
        trial.model(0)
    trial.model.train()


def no_grad(trial: Trial, step: int) -> None:
    with torch.no_grad():
        trial.model(0)


def report(trial: Trial, step: int) -> None:
    if all(w.isfinite().all() for w in trial.model.weights()):
        str(stiefel.report(trial.model))


def measured(trial: Trial, step: int) -> None:
    """Everything that there is to measure of a model in training."""
    if trial.beyond or trial.c.model in LARGE:
        return
    loss = partial(trial.loss, step)
    measure.redundancy(trial.model)
    for quantity in (measure.effective_rates, measure.dependence, measure.preservation, measure.activation_variance):
        quantity(trial.model, loss)
    for of_layers in (measure.conditioning, measure.operator_spectrum):
        of_layers(trial.model, loss, unconstrained=True)
    rows: list[object] = []
    with stiefel.Monitor(trial.model, sinks=[rows.append], every=1) as monitor:
        trial.model(0)
    monitor.log(loss=1.0)
    monitor.close()
    str(monitor)
    trial.optimizer.zero_grad()


def project(trial: Trial, step: int) -> None:
    stiefel.project(trial.model)


def refresh(trial: Trial, step: int) -> None:
    stiefel.refresh(trial.model)


def vector(trial: Trial, step: int) -> None:
    """The parameters become views of one vector; as copies of their values, since that leaves no trace."""
    if len({p.dtype for p in trial.model.parameters()}) == 1:
        flat = parameters_to_vector(trial.model.parameters())
        vector_to_parameters(flat.detach().clone(), trial.model.parameters())


def average(trial: Trial, step: int) -> None:
    """Of the weights and others like them, which is off the set until it is projected."""
    averaged = AveragedModel(trial.model)
    with torch.no_grad():
        for p in averaged.module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    stiefel.project(averaged.module)
    if trial.feasible() and not all(w.allows(w.residual()) for w in constrained_weights(averaged.module)):
        raise Fault("a projected average is off its claim")


def idle(trial: Trial, step: int) -> None:
    """A step of which no weight has a gradient."""
    if not needs_closure(trial.c.optimizer) and not trial.overflowed:
        trial.optimizer.zero_grad()
        trial.optimizer.step()


def double(trial: Trial, step: int) -> None:
    """Before training: torch's optimizers do not convert what they keep of each parameter."""
    if not trial.optimizer.state:
        stiefel.project(trial.model.double())
        trial.start_over()


def freeze(trial: Trial, step: int) -> None:
    """The first of several weights, or not any longer."""
    found = list(constrained_weights(trial.model))
    if len(found) > 1 and not trial.model.stacked:
        found[0].parameter.requires_grad_(not found[0].parameter.requires_grad)


@torch.no_grad()
def assign(trial: Trial, step: int) -> None:
    """Another value for each weight, off the set: the method's own point nearest to it is the weight then."""
    for found in constrained_weights(trial.model):
        value = gaussian(tuple(found.value.shape), found.value.dtype, trial.c.seed)
        if found.parametrization is None:
            found.parameter.copy_(value)
        else:
            setattr(found.owner, found.tensor, value)
    stiefel.project(trial.model)
    trial.check_weights(moved={})


def release(trial: Trial, step: int, method: str) -> None:
    """Release, and constrain by another method."""
    kept = [w.detach().clone() for w in trial.model.weights()]
    stiefel.release(trial.model)
    if not all(torch.allclose(a, b, 0, 0, equal_nan=True) for a, b in zip(kept, trial.model.weights(), strict=True)):
        raise Fault("release changes a weight")
    if not all(type(p) is nn.Parameter for p in trial.model.parameters()):
        raise Fault("release leaves a parameter of another class")
    trial.beyond = False
    trial.model, trial.optimizer = trial.pair(method, {}, trial.model)
    trial.start_over()


def spoil(trial: Trial, step: int) -> None:
    """The step that follows has a loss that is NaN or infinite (see ``Trial.step``)."""


SPOILT = {"nan": math.nan, "inf": math.inf}
"""Events by which the next step's loss is that many times what it was."""
MOVES = ("assign", "double", "release")
"""Events that change weights, as they say."""
EVENTS: dict[str, Callable[..., None]] = {
    "deepcopy": deepcopy,
    "pickle": pickled,
    "load": load,
    "eval": evaluate,
    "no_grad": no_grad,
    "report": report,
    "measure": measured,
    "project": project,
    "refresh": refresh,
    "vector": vector,
    "average": average,
    "idle": idle,
    "double": double,
    "freeze": freeze,
    "assign": assign,
    "release": release,
    **dict.fromkeys(SPOILT, spoil),
}
