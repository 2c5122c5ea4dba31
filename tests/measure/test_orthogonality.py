"""``report``: a row for each weight, measured against the declared scale."""

from __future__ import annotations

import json
import math

import pytest
import torch
from contract import FORWARD, METHODS, batch, gram_error, mlp, train
from torch import nn

import stiefel
import stiefel.methods
from stiefel.attach.weights import constrained_weights


def test_a_singular_weight_has_no_sign_and_infinite_condition() -> None:
    model = stiefel.constrain(nn.Linear(3, 3), "unconstrained")
    with torch.no_grad():
        model.weight.zero_()
    (row,) = stiefel.report(model).rows
    assert (row.determinant, row.condition) == (None, math.inf)
    with torch.no_grad():
        model.weight.copy_(torch.diag(torch.tensor([1.0, 1.0, -1.0])))
    (row,) = stiefel.report(model).rows
    assert (row.determinant, row.condition) == (-1, 1.0)


@pytest.mark.parametrize("method", METHODS)
def test_report_measures_by_definition(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 8))
    stiefel.constrain(model, method, scale=2.0)
    with torch.no_grad():
        for found in constrained_weights(model):
            found.parameter.data.add_(batch(*found.parameter.shape), alpha=0.01)
    report, expected = stiefel.report(model), []
    for row, w in zip(report.rows, (model[0].weight.detach(), model[1].weight.detach().mT), strict=True):
        x = w.double() / 2.0
        sigma = torch.linalg.svdvals(x)
        error = (x @ x.mT - torch.eye(len(x), dtype=x.dtype)).norm().item()
        assert row.scale == 2.0
        assert row.method == method
        assert row.error == pytest.approx(error, rel=1e-6, abs=1e-12)
        assert row.relative == pytest.approx(error / math.sqrt(len(x)), rel=1e-6, abs=1e-12)
        assert row.sigma_max == pytest.approx(sigma[0].item(), rel=1e-9)
        assert row.sigma_min == pytest.approx(sigma[-1].item(), rel=1e-9)
        assert row.condition == pytest.approx((sigma[0] / sigma[-1]).item(), rel=1e-9)
        expected.append(row.relative)
    assert report.worst == max(expected)


@pytest.mark.parametrize("method", METHODS)
def test_report_is_a_table_and_json(method: str) -> None:
    report = stiefel.report(stiefel.constrain(mlp(), method, scale="relu"))
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["worst"] == report.worst
    assert [row["name"] for row in data["weights"]] == ["0.weight", "2.weight", "4.weight"]
    lines = str(report).splitlines()
    assert lines[0].split()[:4] == ["weight", "method", "layout", "scale"]
    rows = [line for line in lines if method in line]
    assert len(rows) == 3
    assert all("1.414" in row for row in rows)
    assert "8×6 columns" in rows[0]


def test_report_of_a_nan_weight_is_nan_and_never_fine() -> None:
    model = stiefel.constrain(mlp(), "unconstrained")
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    report = stiefel.report(model)
    assert math.isnan(report.worst)
    assert math.isnan(report.rows[1].sigma_max)
    assert report.rows[0].relative < 1e-6


@pytest.mark.parametrize("method", [m for m in FORWARD if stiefel.get(m).can_learn_scale and stiefel.get(m).feasible])
def test_report_divides_by_learned_scales(method: str) -> None:
    torch.manual_seed(0)
    model = stiefel.constrain(nn.Linear(6, 4), method, scale="learnable")
    start = model.weight.detach().clone()
    train(model, stiefel.optimizer(model, torch.optim.SGD, lr=0.5), batch(8, 6), steps=5)
    assert gram_error(start) < 1e-6
    assert gram_error(model.weight.detach()) > 1e-3
    report = stiefel.report(model)
    assert report.worst < 1e-5
    assert report.rows[0].scale == "learnable"
