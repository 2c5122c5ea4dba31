"""The sample of cases that is tried by default."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from sampling import sample

HERE = Path(__file__).parent
CASES = {f"test[{a}-{b}-{c}]": {"a": a, "b": b, "c": c} for a, b, c in product(range(12), range(10), "xy")}


@pytest.mark.parametrize("every", [2, 6, 10**9])
def test_every_value_occurs_and_the_share_is_about_what_was_asked(every):
    kept = sample(CASES, every)
    for name in "abc":
        assert {CASES[k][name] for k in kept} == {case[name] for case in CASES.values()}
    assert len(kept) <= 1.3 * len(CASES) / every + 12 + 10 + 2
    assert kept == sample(dict(reversed(CASES.items())), every)


def test_without_its_values_it_is_a_share_alone_and_never_nothing():
    assert 20 <= len(sample(CASES, 8, values=False)) <= 40
    assert len(sample(CASES, 10**9, values=False)) == 1


def test_what_is_left_out_is_slow(tmp_path):
    (tmp_path / "conftest.py").write_text((HERE / "conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow: …\n    sampled: …\n")
    (tmp_path / "test_it.py").write_text(
        "import pytest\n\n"
        "@pytest.mark.sampled(50)\n"
        "@pytest.mark.parametrize('a', range(3))\n"
        "@pytest.mark.parametrize('b', range(4))\n"
        "def test_it(a, b):\n    pass\n"
    )
    found = []
    for marker in ("slow", "not slow"):
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", marker, str(tmp_path)]
        environment = {**os.environ, "PYTHONPATH": str(HERE / "support")}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        found.append({line for line in done.stdout.splitlines() if "::" in line})
    slow, default = found
    assert not slow & default
    assert len(slow | default) == 12
    assert 4 <= len(default) <= 6
