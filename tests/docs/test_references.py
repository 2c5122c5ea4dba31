"""The references: what docstrings and the table of methods cite is in docs/references.bib, with all of its authors."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import stiefel

ROOT = Path(__file__).parents[2]
WHERE = ("journal", "booktitle", "publisher", "howpublished", "eprint")
SOFTWARE = {"geoopt", "torch"}


@dataclass(frozen=True)
class Entry:
    """One of the file.

    Args:
        key: its name there.
        fields: its fields.
    """

    key: str
    fields: dict[str, str]

    @property
    def surnames(self) -> list[str]:
        return [author.split(",")[0] for author in self.fields["author"].split(" and ")]


def entries() -> list[Entry]:
    text = (ROOT / "docs" / "references.bib").read_text(encoding="utf-8")
    found = []
    for key, body in re.findall(r"^@\w+\{(\S+),\n(.*?)^\}$", text, flags=re.MULTILINE | re.DOTALL):
        fields = dict(re.findall(r"^  (\w+) = \{(.*)\},$", body, flags=re.MULTILINE))
        assert len(fields) == body.count("\n"), f"{key}: a line that is no field"
        found.append(Entry(key, {name: re.sub(r"[{}]", "", value) for name, value in fields.items()}))
    assert len(found) == text.count("\n@") == len({entry.key for entry in found})
    return found


ENTRIES = entries()


def sources() -> Iterator[tuple[str, str]]:
    """Where a docstring of the library names its source, and the text from there to the end of the paragraph."""
    for path in sorted((ROOT / "stiefel").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                for text in re.findall(r"Source: (.*?)(?:\n\s*\n|\Z)", ast.get_docstring(node) or "", flags=re.DOTALL):
                    yield f"{path.relative_to(ROOT)}:{getattr(node, 'name', '')}", " ".join(text.split())


def cited(text: str) -> list[Entry]:
    """The entries whose first author and year a text has."""
    return [e for e in ENTRIES if re.search(rf"\b{e.surnames[0]}\b", text) and e.fields["year"] in text]


def lists(text: str, first: str) -> Iterator[list[str]]:
    """The lists of authors in a text that begin with a name: ``A and B``, ``A, B and C``; not those cut by et al."""
    name = r"(?:van de |Van |van )?[A-ZÅ][\w\-ąéèíáöôÉ]+(?: Loan| Zee| Geijn)?"
    for found in re.findall(rf"(?<!, )\b({first}(?:, {name})* (?:and|&) {name})", text):
        yield re.split(r", | and | & ", found)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.key)
def test_an_entry_says_who_what_where_and_when(entry: Entry) -> None:
    assert {"author", "title", "year"} <= set(entry.fields)
    assert any(name in entry.fields for name in WHERE)
    assert re.fullmatch(r"(19|20)\d\d", entry.fields["year"])
    short = entry.fields.get("short", entry.fields["year"])
    assert entry.fields["year"] in short


@pytest.mark.parametrize("method", stiefel.available())
def test_the_reference_of_a_method_is_an_entry(method: str) -> None:
    known = {entry.fields["short"] for entry in ENTRIES if "short" in entry.fields}
    parts = [part.strip() for part in stiefel.get(method).reference.split(";")]
    assert parts
    assert set(parts) <= known | SOFTWARE


def test_no_entry_is_named_for_the_table_that_the_table_does_not_show() -> None:
    shown = {part.strip() for method in stiefel.available() for part in stiefel.get(method).reference.split(";")}
    assert {entry.fields["short"] for entry in ENTRIES if "short" in entry.fields} <= shown


@pytest.mark.parametrize(("where", "text"), list(sources()), ids=lambda part: part.split(" ")[0])
def test_what_a_docstring_cites_is_an_entry_with_all_of_its_authors(where: str, text: str) -> None:
    if text.startswith(("as for", ":func:")):
        return
    found = cited(text)
    assert found, f"{where} cites what docs/references.bib lacks: {text}"
    for first in {entry.surnames[0] for entry in found}:
        known = [entry.surnames for entry in ENTRIES if entry.surnames[0] == first]
        for names in lists(text, first):
            assert names in known, f"{where} lists {names}, of which there is no paper; of {first}: {known}"


def test_a_paper_without_one_of_its_authors_is_found() -> None:
    text = "Source: Huang, Liu, Lang, Yu and Li (AAAI 2018)"
    assert cited(text)
    assert list(lists(text, "Huang")) == [["Huang", "Liu", "Lang", "Yu", "Li"]]
    assert ["Huang", "Liu", "Lang", "Yu", "Li"] not in [entry.surnames for entry in ENTRIES]
