"""A method in a file of one's own, outside the package: known, tested, compared and listed like any other."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import conformance
import pytest
from common import compare
from documents import COMPARISON, ROOT, snippet, snippets

import stiefel
import stiefel.methods

SOURCE = '''"""Retraction by QR of the tangent step, under another name."""

from dataclasses import dataclass

from torch import Tensor

from stiefel.constraint import Claim, StepMethod
from stiefel.manifold.geometry import project_tangent
from stiefel.linalg import qf
from stiefel.methods import register


@register
@dataclass(frozen=True, kw_only=True)
class Tangent(StepMethod):
    """``X ← qf(X + shrink · P_X(U))``.

    Args:
        shrink: factor of the step.
    """

    shrink: float = 1.0

    name = "my_tangent"
    summary = "a method from outside"
    reference = "nobody, 2026"
    claim = Claim()

    @property
    def coefficients(self) -> tuple[float, float]:
        return (self.shrink, self.shrink)

    def step(self, x: Tensor, displacement: Tensor, lr: float) -> Tensor:
        return qf(x + self.shrink * project_tangent(x, displacement))
'''


@pytest.fixture
def own_method(tmp_path: Path) -> Iterator[Path]:
    """Write the file, run it, and forget the method afterwards."""
    path = tmp_path / "my_method.py"
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("my_method", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["my_method"] = module
    spec.loader.exec_module(module)
    yield path
    del sys.modules["my_method"], stiefel.constraint.catalogue._CATALOGUE["my_tangent"]


def test_it_is_in_the_catalogue_and_in_the_table(own_method: Path) -> None:
    assert "my_tangent" in stiefel.available()
    assert stiefel.get("my_tangent", shrink=0.5).coefficients == (0.5, 0.5)
    row = next(line for line in stiefel.methods.table().splitlines() if "`my_tangent`" in line)
    assert "a method from outside" in row
    assert "`shrink=1.0`" in row
    assert "(1, 1)" in row


def through_the_laws(folder: Path, module: str, name: str) -> str:
    """What pytest says of the laws on a method of a file in a folder, which is imported before tests are collected."""
    tests = Path(conformance.__file__).parent
    command = [sys.executable, "-m", "pytest", "-p", module, "-p", "no:cacheprovider", "--every-case", "-vv"]
    done = subprocess.run(
        [*command, "-k", name, str(tests / "test_conformance.py"), str(tests / "test_finds_optima.py")],
        cwd=tests.parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(tests.parent)])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    for check in conformance.CHECKS:
        test = "test_fixed_points_conform[" if check == "fixed_points" else f"test_conforms[{check}-"
        assert f"{test}{name}-cpu] PASSED" in done.stdout
    return done.stdout


def test_it_goes_through_the_conformance_suite(own_method: Path) -> None:
    """As a user runs it: no test knows of it."""
    said = through_the_laws(own_method.parent, "my_method", "my_tangent")
    assert "test_procrustes[my_tangent-(5, 5)-30.0] PASSED" in said


def test_the_template_passes_the_laws_word_for_word(tmp_path: Path) -> None:
    (template,) = snippets(ROOT / "CONTRIBUTING.md")
    (tmp_path / "nearest_point_file.py").write_text(template)
    said = through_the_laws(tmp_path, "nearest_point_file", "nearest_point")
    assert "test_procrustes[nearest_point-(3, 8)-30.0] PASSED" in said


def test_it_is_compared(own_method: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = own_method.parent
    (folder / "my_problem.py").write_text("import my_method\n" + snippet(COMPARISON, "make_data"))
    arguments = ("--methods", "my_tangent", "unconstrained", "--seeds", "1", "--scale", "1", "--epochs", "2")
    assert compare(folder / "my_problem.py", *arguments, "--no-cost", "--jobs", "1") == 0
    assert "my_tangent" in capsys.readouterr().out
    assert "my_tangent" in (folder / "runs" / "summary.csv").read_text()
