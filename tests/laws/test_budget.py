"""The budget of operations: no method asks more of a device than docs/budget.md says."""

from __future__ import annotations

from pathlib import Path

import budget
import pytest

import stiefel

PAGE = Path(__file__).resolve().parents[2] / "docs" / "budget.md"
METHODS = [m for m in stiefel.available() if not m.startswith("test_")]
SPARE = 1.05
"""Other versions of torch split some operations otherwise."""


def rows() -> dict[str, list[str]]:
    """The table's cells by method."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {cells[0].strip("`"): cells[1:] for cells in found}


def test_the_page_has_every_method():
    assert set(rows()) == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_no_method_asks_more_than_its_budget(method):
    waits, *cells = rows()[method]
    for i, shape in enumerate(budget.SHAPES):
        launches, doubles, products, peak = map(float, cells[4 * i : 4 * i + 4])
        found = budget.budget(method, *shape)
        assert found.launches <= SPARE * launches + 1
        assert found.doubles <= SPARE * doubles + 1
        assert found.products <= SPARE * products + 0.1
        assert found.peak <= SPARE * peak + 0.1
        assert found.waits <= int(waits)
        assert found.launches >= launches / SPARE - 1, "less than the page says: write it anew"


@pytest.mark.parametrize("method", [m for m in METHODS if m in ("own", "projection", "cayley", "retraction")])
def test_float32_alone_has_its_budget(method):
    for launches, shape in zip(rows()[method][-2:], budget.SHAPES, strict=True):
        found = budget.budget(method, *shape, "slow")
        assert found.launches <= SPARE * float(launches) + 1
        assert found.doubles == 0
