"""Texts without the folders of one machine, which say nothing to a reader elsewhere. Imports the standard library."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path

_EDGE = r"(?=[/\\\s\"':,;)\]]|$)"
"""What ends a folder's name: a match must not stop within one."""
_START = r"(?<![\w.~/\\-])"
_DRIVE = r"(?:[A-Za-z]:)?[/\\]"
_PACKAGES = re.compile(rf"{_START}{_DRIVE}[^\s\"':]*?[/\\](?=(?:site|dist)-packages[/\\])")
_LIBRARY = re.compile(rf"{_START}{_DRIVE}[^\s\"':]*?[/\\](?=python3\.\d+t?[/\\])")
_HOMES = re.compile(rf"{_START}(?:(?:[A-Za-z]:)?[/\\](?:home|Users)[/\\][^/\\\s\"':,;)\]]+|/root){_EDGE}")
"""Home folders as systems name them, so that records of another machine are clean too."""
_FILE = re.compile(rf'(?<=File "){_DRIVE}[^"]*[/\\](?=[^"/\\]+[/\\][^"/\\]+")')
"""The beginning of any other path in a traceback's line, up to the file's own folder."""


def portable(text: str, problem: str | os.PathLike[str] | None = None) -> str:
    """A text with short names for folders of the machine that it was written on.

    Args:
        text: such as the lines of a traceback.
        problem: the folder of the problem's file, where it is known.

    Returns:
        The text. What leads to ``site-packages`` or to Python's own library is gone, the folder of the problem and the
        working folder are ``.``, home folders ``~``; of other paths in a traceback the file and its folder remain.
    """
    if "/" not in text and "\\" not in text:
        return text
    text = _LIBRARY.sub("", _PACKAGES.sub("", text))
    for pattern, short in _folders(None if problem is None else os.path.abspath(problem), _working_folder()):
        text = pattern.sub(short, text)
    return _FILE.sub("…/", _HOMES.sub("~", text))


def _working_folder() -> str:
    try:
        return str(Path.cwd())
    except OSError:  # it has been deleted
        return ""


@lru_cache(maxsize=8)
def _folders(problem: str | None, working: str) -> tuple[tuple[re.Pattern[str], str], ...]:
    """Patterns of this machine's folders with their short names, the deepest first."""
    try:
        home = str(Path.home())
    except RuntimeError:  # no home is known
        home = ""
    known = {home: "~", working: ".", problem or "": "."}
    deep = sorted((folder for folder in known if len(Path(folder).parts) > 1), key=len, reverse=True)
    return tuple((re.compile(_START + re.escape(folder) + _EDGE), known[folder]) for folder in deep)
