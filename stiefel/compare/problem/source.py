"""The source of a problem's file, which is part of what identifies its runs. Imports the standard library."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PREFIX = "stiefel_problem_"


def sources_of(path: Path, found: dict[Path, ast.Module]) -> dict[Path, ast.Module]:
    """A file's syntax tree, and those of the files beside it, or in folders beside it, that it imports."""
    _collect(path, path.parent, found)
    return found


def _collect(path: Path, root: Path, found: dict[Path, ast.Module]) -> None:
    # Entered before its imports are followed, so that files that import each other end the recursion.
    found[path] = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(found[path]):
        for base, name in _imports(node, path, root):
            for beside in _files(base, name):
                if beside not in found and beside.is_file():
                    _collect(beside, root, found)


def _imports(node: ast.AST, path: Path, root: Path) -> Iterator[tuple[Path, str]]:
    """The dotted names that a statement imports, each with the folder that it starts from."""
    if isinstance(node, ast.Import):
        # From the problem's folder, also in files below it: that folder is what `load_problem` adds to sys.path.
        yield from ((root, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        # A leading dot stands for the file's own folder, each further one for the folder above.
        base = path.parents[node.level - 1] if node.level else root
        if node.module:
            yield base, node.module
        # `from net import x`: x may be a name in net.py or the file net/x.py.
        yield from ((base, ".".join(filter(None, (node.module, alias.name)))) for alias in node.names)


def _files(base: Path, name: str) -> Iterator[Path]:
    """The files that importing a dotted name runs: of each package on the way its ``__init__``, last the module."""
    folder = base
    for part in name.split("."):
        folder /= part
        yield folder / "__init__.py"
    yield base.joinpath(*name.split(".")).with_suffix(".py")
