"""The objectives without a network: their optima are right, and ``minimize`` reaches them in few evaluations."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import stiefel

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from parts.objectives import Objective, objectives

sys.path.pop(0)

JOBS = {job.name: job for job in objectives()}
MOST = {
    "leading subspace, 12 of 60": 75,
    "trace ratio, 3 of 20": 160,
    "independent components, 10": 45,
    "localized modes, 9": 55,
    "orbitals, 6 on 80 points": 190,
    "200 unitary gates, 4×4": 50,
    "40 rotations, 3×3": 60,
    "canonical correlations, 3": 40,
    "Procrustes, condition 1e3": 820,
}
"""Evaluations to a gradient of 1e-8, with a third to spare for other machines' rounding."""


@pytest.mark.parametrize("name", JOBS)
def test_the_optimum_is_reached_in_few_evaluations(name):
    job: Objective = JOBS[name]
    net = job.module("retraction", job.start())
    found = stiefel.minimize(net, job.of(net))
    assert found.converged
    assert found.gradient_norm <= 1e-8
    assert found.evaluations <= MOST[name]
    if job.optimum is not None:
        assert abs(found.loss - job.optimum) < 1e-10 * max(1, abs(job.optimum))


@pytest.mark.parametrize("name", [n for n, job in JOBS.items() if job.optimum is not None])
def test_no_start_ends_below_an_optimum_by_formula(name):
    job = JOBS[name]
    for seed in range(1, 6):
        net = job.module("own", job.start(seed))
        found = stiefel.minimize(net, job.of(net), second_order=True)
        assert found.converged
        assert found.loss > job.best - 1e-10 * max(1, abs(job.best))


@pytest.mark.parametrize("name", JOBS)
def test_float32_ends_at_the_rounding_floor_and_says_so(name):
    job = JOBS[name]
    net = job.module("retraction", job.start()).to(torch.complex64 if job.dtype.is_complex else torch.float32)
    stiefel.project(net)

    def loss() -> torch.Tensor:
        return job.loss({key: net[key].to(job.dtype) for key in job.shapes}).float()

    found = stiefel.minimize(net, loss, max_evaluations=3000)
    assert not found.converged
    assert "rounding" in found.message, found.message
    assert found.gradient_norm < 1e-2
