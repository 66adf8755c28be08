"""Checks the patterns of docs and docstrings that a program can recognise.

    python scripts/check_english.py

Docstrings begin with a noun or a verb, follow Google's style, and the project's own words stay out of source, tests and
docs. Prints each finding with its place; exits with 1 if there is any.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ("src", "tests", "training", "scripts", "examples", "benchmarks")
PAGES = ("README.md", "CONTRIBUTING.md", "docs")

SHIMS = ROOT / "scripts" / "shims"
"""Files with names that other projects have chosen."""
BEGINNINGS = ("Who", "What", "Whom", "Whose", "Of", "So", "That", "Those", "Answers")
"""A docstring begins with the thing it describes or with a verb, not with one of these."""

FIELDS = re.compile(r"^\s*:(param|type|raises|returns?|rtype|ivar|yields?)\b", re.MULTILINE)
"""Sphinx fields: use Args, Returns, Raises, Attributes."""

OWN_WORDS = re.compile(
    r"\b(roads?|pump|patience|agenda|shelf|tally|peace)\b"
    r"|(?<![a-z])(landings?|gates?|crowds?|cargos?|openings)(?![a-z])|\b(an|its|every) opening\b|examined",
    re.IGNORECASE,
)
"""Words of an earlier vocabulary, the second line also as parts of identifiers: the field has a word for each.

A byte may land, and a room is opened: only the nouns are replaced.
"""

PRONOUNS = re.compile(r"\b(whoever|whomever|whatever|nobody|somebody|someone)\b", re.IGNORECASE)
"""Name the thing instead."""


def main() -> int:
    """Prints every finding. Returns the exit status."""
    found = sorted({*docstrings(), *words()})
    for place, line, why in found:
        print(f"{place.relative_to(ROOT)}:{line}: {why}")
    return 1 if found else 0


def docstrings() -> Iterator[tuple[Path, int, str]]:
    """Yields (file, line, finding) for the docstrings of every module, class, function and attribute."""
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
                continue
            text = node.value.value
            if not isinstance(text, str):
                continue
            first = text.lstrip().split(maxsplit=1)[:1]
            if first and first[0].rstrip(",:") in BEGINNINGS:
                yield path, node.lineno, f"a docstring begins with {first[0]!r}: begin with a noun or a verb"
            if FIELDS.search(text):
                yield path, node.lineno, "a Sphinx field in a docstring: use Args, Returns, Raises, Attributes"


def words() -> Iterator[tuple[Path, int, str]]:
    """Yields (file, line, finding) for words that the project does not use."""
    pages = [
        page for name in PAGES for page in sorted((ROOT / name).rglob("*.md") if "." not in name else [ROOT / name])
    ]
    for path in [*python_files(), *pages]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if path.parent != SHIMS and (match := OWN_WORDS.search(line)):
                yield path, number, f"{match[0]!r}: use the field's word"
            if match := PRONOUNS.search(line):
                yield path, number, f"{match[0]!r}: name the thing"


def python_files() -> Iterator[Path]:
    """Yields every Python file of the project but this one, which has to name the words."""
    for folder in PYTHON:
        yield from (path for path in sorted((ROOT / folder).rglob("*.py")) if path != Path(__file__).resolve())


if __name__ == "__main__":
    sys.exit(main())
