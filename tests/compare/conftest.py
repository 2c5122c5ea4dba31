"""What the tests of the comparison share."""

import pytest
from common import FAULTY


@pytest.fixture
def toy(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text(FAULTY)
    return path
