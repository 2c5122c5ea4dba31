"""What holds for every test."""

import sys
from collections.abc import Iterator

import pytest
from common import Projection, registered

import stiefel
import stiefel.methods  # all of them, before a test could seem to have registered one


@pytest.fixture(autouse=True)
def _catalogue() -> Iterator[None]:
    """Take methods out of the catalogue again that a test has registered, as by loading a problem that brings some."""
    catalogue = stiefel.constraint.catalogue._CATALOGUE
    before = dict(catalogue)
    yield
    for name in catalogue.keys() - before.keys():
        module = catalogue.pop(name).__module__
        if module.startswith("parts."):
            sys.modules.pop(module, None)  # so that the next problem that imports it registers them again


@pytest.fixture
def projection() -> Iterator[str]:
    yield from registered(Projection)
