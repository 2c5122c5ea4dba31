"""The source of a problem's file, which is part of what identifies its runs. Imports the standard library."""

from __future__ import annotations

import ast
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
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from net import x`: x may be a name in net.py or the file net/x.py.
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            # From the problem's folder, also for imports of files below it: that folder is what `load_problem` adds to
            # sys.path.
            beside = root.joinpath(*name.split(".")).with_suffix(".py")
            if beside not in found and beside.is_file():
                _collect(beside, root, found)
