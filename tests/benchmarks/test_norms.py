"""Normalization of activations as a factor of the network problems."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import stiefel
from stiefel.compare import load_problem

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NORMS = ("none", "batch", "layer", "group", "instance", "whitening")


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["omdsm", "mlp", "cnn", "gan", "rnn"])
def test_normalization_is_a_factor(name, norm, place):
    cls = load_problem(BENCHMARKS / f"{name}.py")
    chosen = {"norm": norm} | ({"norm_place": place} if "norm_place" in cls.__dataclass_fields__ else {})
    small = {"cnn": {"width": 0.03125, "pixels": 8}, "gan": {"width": 4}, "rnn": {"task": "digits"}}.get(name, {})
    problem = cls(**chosen, **small)
    if norm == "instance" and name not in ("cnn", "gan"):
        with pytest.raises(stiefel.errors.ProblemError, match="layer"):
            problem.make_model()
        return
    torch.manual_seed(0)
    model = problem.make_model()
    kinds = [type(m).__name__ for m in model.modules()]
    network = model.discriminator if name == "gan" else model
    count = sum("Norm" in type(m).__name__ or "Whitening" in type(m).__name__ for m in network.modules())
    assert (count > 0) == (norm != "none"), kinds
    data = problem.make_data()
    batch = tuple(t[:128] for t in data.train) if isinstance(data.train, tuple) else next(iter(data.train))
    problem.constrain(model, stiefel.get("own"))
    loss = problem.loss(model, batch)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    assert problem.loss(model, batch).isfinite()
