"""What holds for every test."""

import sys
from collections import defaultdict
from collections.abc import Iterator

import pytest
from common import Projection, registered
from sampling import sample

import stiefel
import stiefel.methods  # all of them, before a test could seem to have registered one


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--every-case``: no samples are taken."""
    parser.addoption("--every-case", action="store_true", help="try every case of tests that have very many")


@pytest.hookimpl(tryfirst=True)  # before those that are slow are left out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    """Mark as slow what a test's ``sampled`` leaves out."""
    if config.getoption("every_case"):
        return
    tests: dict[tuple[str, bool], list[pytest.Function]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sampled") and not item.get_closest_marker("slow"):
            elsewhere = item.get_closest_marker("skipif") is not None  # a device that most machines lack
            tests[item.nodeid.partition("[")[0], elsewhere].append(item)
    for found in tests.values():
        marker = found[0].get_closest_marker("sampled")
        assert marker is not None
        cases = {i.nodeid: {k: str(v) for k, v in i.callspec.params.items()} for i in found}
        kept = sample(cases, *marker.args, **marker.kwargs)
        for item in found:
            if item.nodeid not in kept:
                item.add_marker("slow")


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
