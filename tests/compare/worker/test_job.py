"""A job goes to its process as JSON."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from specs import spec

from stiefel.compare.worker.job import Job, packed, unpacked
from stiefel.errors import ProblemError

JOB = Job(spec=spec(), file="/p.py", settings={}, root=Path("/runs"))


@pytest.mark.parametrize(
    "value",
    [
        (1, (2.5, None)),
        [True, "é\ud800"],
        {1: "a", "tuple": [2]},
        {"dict": {"path": Path("/a b")}},
        float("inf"),
        (),
        {},
    ],
)
def test_values_of_factors_come_back_as_they_were(value):
    back = unpacked(packed(value))
    assert back == value
    assert type(back) is type(value)
    job = replace(JOB, settings={"width": value}, memory=7, visible="GPU-1", timeout=0.5)
    assert Job.from_json(job.to_json()) == job
    json.loads(job.to_json())


def test_another_kind_of_value_is_refused():
    with pytest.raises(ProblemError, match=r"is \{3\}, a set, which cannot be handed to a run's process; give"):
        packed({"width": {3}})
