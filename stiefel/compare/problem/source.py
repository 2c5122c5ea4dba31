"""The source of a problem's file, which is part of what identifies its runs. Imports the standard library."""

from __future__ import annotations

import ast
from pathlib import Path

PREFIX = "stiefel_problem_"


def sources_of(path: Path, found: dict[Path, ast.Module]) -> dict[Path, ast.Module]:
    """A file's syntax tree, and those of the files beside it that it imports."""
    found[path] = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(found[path]):
        imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in imported:
            beside = path.parent / f"{name.partition('.')[0]}.py"
            if beside not in found and beside.is_file():
                sources_of(beside, found)
    return found
