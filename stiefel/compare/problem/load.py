"""A problem from its file, and its data. Imports ``problem``, ``source``."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path

from stiefel.compare.problem.batches import seed_everything
from stiefel.compare.problem.problem import Data, Problem
from stiefel.compare.problem.source import PREFIX
from stiefel.errors import ProblemError


def load_problem(path: str | Path) -> type[Problem]:
    """The problem class that a file defines.

    Raises:
        ProblemError: there is no such file, it fails on import, or it does not define exactly one problem.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise ProblemError(f"there is no problem file {str(path)!r}; give a Python file that defines a stiefel Problem")
    name = PREFIX + path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ProblemError(
            f"{str(path)!r} is not a Python file; a problem is a .py file that defines a stiefel Problem"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # a problem may import the network that stands beside it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # SystemExit: a script may exit at its top level
        del sys.modules[name]
        raise ProblemError(f"{path} fails on import: {type(error).__name__}: {error}") from error
    # Defined in this file: Problem itself and bases from other files are imported, and no candidates.
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Problem) and value.__module__ == name
    ]
    concrete = [cls for cls in found if not inspect.isabstract(cls)]
    if len(concrete) == 1:
        return concrete[0]
    if found and not concrete:
        missing = ", ".join(sorted(found[0].__abstractmethods__))
        raise ProblemError(f"{path}: {found[0].__name__} is incomplete: it does not define {missing}; add these")
    what = f"{len(concrete)} problems ({', '.join(c.__name__ for c in concrete)})" if concrete else "no problem"
    raise ProblemError(
        f"{path} defines {what}; it must define exactly one subclass of stiefel.compare.Problem; "
        "stiefel new-problem FILE writes one to start from"
    )


def load_data(problem: Problem) -> Data:
    """The problem's data; the global generators are seeded first, so that they are the same in every run."""
    seed_everything(0)
    return problem.make_data()
