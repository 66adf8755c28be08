"""The documentation site has every page and every public name. ``make site`` checks the rest."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import embferry.library

ROOT = Path(__file__).parents[2]
FROM_OUTSIDE = {"contributing.md", "changes.md"}
"""Pages that scripts/site_hooks.py makes of files beside ``docs/``."""


class Loader(yaml.SafeLoader):
    """Reads MkDocs' settings without making the Python objects that they name."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)


def pages_of(entry: Any) -> Iterator[str]:
    """Yields the files of a part of the navigation."""
    if isinstance(entry, str):
        yield entry
    else:
        for part in entry.values() if isinstance(entry, dict) else entry:
            yield from pages_of(part)


def test_the_navigation_has_every_page_once() -> None:
    settings = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)
    pages = list(pages_of(settings["nav"]))
    assert sorted(pages) == sorted({page.name for page in (ROOT / "docs").glob("*.md")} | FROM_OUTSIDE)


def test_the_reference_of_python_has_every_public_name_once() -> None:
    names = re.findall(r"^::: embferry\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(names) == sorted(embferry.library.__all__)


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_lists_within_lists_are_indented_as_mkdocs_reads_them(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert re.findall(r"^ {1,3}(?:[-*]|\d+\.) .*", text, re.MULTILINE) == []
