"""The table of docs/compatibility.md says what is: each of its cells is tried again."""

from __future__ import annotations

import pytest
from contract import METHODS
from features import FEATURES, REFUSED, RIGHT, SEVERAL, documented, outcome


@pytest.mark.sampled(4, values=False)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FEATURES)
def test_a_row_of_the_table_is_current(name):
    if name.startswith("ONNX"):
        pytest.importorskip("onnxscript")
    assert {m: outcome(FEATURES[name], m) for m in METHODS} == documented()[name]  # make compatibility


def test_no_cell_is_silent_or_raw():
    table = documented()
    assert list(table) == [*FEATURES, *SEVERAL]
    assert {cell for row in table.values() for cell in row.values()} == {RIGHT, REFUSED}
