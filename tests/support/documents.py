"""The project's documents, and the code in them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
METHODS, TRAINING, COMPARISON = (ROOT / "docs" / f"{name}.md" for name in ("methods", "training", "comparison"))
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def snippets(document: Path) -> list[str]:
    """A document's Python code blocks."""
    return re.findall(r"```python\n(.*?)```", document.read_text(), flags=re.S)


def snippet(document: Path, word: str) -> str:
    """Its one code block with this word in it."""
    (found,) = (code for code in snippets(document) if word in code)
    return found
