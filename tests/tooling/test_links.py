"""Links of every page lead to files and sections that exist; blocks of code are what they say they are."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").rglob("*.md")))
FENCE = re.compile(r"^(?P<fence>```+)(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=fence)$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)|<(?:img|a) [^>]*(?:src|href)=\"([^\"]+)\"")
CODE = re.compile(r"`[^`\n]+`")
HEADING = re.compile(r"^#{1,6} +(.+?)(?: +\{[^}]*\})?$", re.MULTILINE)
LANGUAGES = {"", "python", "json", "yaml", "sh", "console", "text", "mermaid"}
ELSEWHERE = ("https://", "http://", "mailto:")


def links_of(text: str) -> list[str]:
    """Returns the targets of links and pictures, without those in code."""
    return [first or second for first, second in LINK.findall(CODE.sub("``", FENCE.sub("", text)))]


def anchors_of(text: str) -> set[str]:
    """Returns the names that GitHub gives to the sections of a page."""
    found: Counter[str] = Counter()
    names = set()
    for heading in HEADING.findall(FENCE.sub("", text)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        names.add(f"{name}-{found[name]}" if found[name] else name)
        found[name] += 1
    return names


def wrong_links(page: Path, text: str) -> list[str]:
    """Returns the links of a page that lead nowhere."""
    wrong = []
    for link in links_of(text):
        if link.startswith(ELSEWHERE):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        is_there = target == page or (target.exists() and target.is_relative_to(ROOT))
        if not is_there or (anchor and anchor not in anchors_of(text if target == page else target.read_text())):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_section(page: Path) -> None:
    assert wrong_links(page, page.read_text()) == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("[a](library.md) [b](library.md#the-two-sides) [c](#a-b--c)\n\n## A `B` – c", []),
        ("[a](no.md)", ["no.md"]),
        ("![a](no.png)", ["no.png"]),
        ("[a](library.md#no)", ["library.md#no"]),
        ("[a](#no)\n\n## Yes", ["#no"]),
        ("[a](#yes-1)\n\n## Yes", ["#yes-1"]),
        ("[a](#yes-1)\n\n## Yes\n\n## Yes", []),
        ("[a](#no)\n\n```sh\n## No\n```", ["#no"]),
        ("`[a](no.md)`\n\n```\n[a](no.md)\n```", []),
        ('<img src="no.png" alt="a">', ["no.png"]),
        ("[a](../../no.md)", ["../../no.md"]),
        ("[a](https://example.org/no)", []),
    ],
)
def test_what_leads_nowhere_is_found(text: str, wrong: list[str]) -> None:
    assert wrong_links(ROOT / "docs" / "page.md", text) == wrong


def commands_of(code: str) -> str:
    """Returns the commands of a session in a console: lines behind a prompt, or all lines if there is no prompt."""
    prompted = [line[2:] for line in code.splitlines() if line.startswith("$ ")]
    return "\n".join(prompted) if prompted else code


def check(language: str, code: str) -> None:
    """Parses a block of code.

    Raises:
        ValueError, SyntaxError, YAMLError: It is not what its language says.
    """
    if language == "python":
        ast.parse(code)
    elif language == "json":
        json.loads(code)
    elif language == "yaml":
        yaml.safe_load(code)
    elif language in ("sh", "console"):
        done = subprocess.run(["bash", "-n"], input=commands_of(code), capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(done.stderr)
    elif language not in LANGUAGES:
        raise ValueError(f"blocks of {language} are not checked")


def blocks() -> Iterator[tuple[str, str, str]]:
    for page in PAGES:
        text = page.read_text()
        for block in FENCE.finditer(text):
            line = text.count("\n", 0, block.start()) + 1
            yield f"{page.relative_to(ROOT)}:{line}", block["language"], block["code"]


BLOCKS = list(blocks())


@pytest.mark.parametrize(("language", "code"), [block[1:] for block in BLOCKS], ids=[block[0] for block in BLOCKS])
def test_every_block_is_what_its_language_says(language: str, code: str) -> None:
    check(language, code)


@pytest.mark.parametrize(
    ("language", "code"),
    [
        ("python", "def f(:"),
        ("json", "{'a': 1}"),
        ("yaml", "a: [1"),
        ("sh", "if true; then"),
        ("console", "embferry ask 'what"),
        ("console", "$ embferry ask 'what\nblue"),
        ("pyhton", "a = 1"),
    ],
)
def test_a_wrong_block_is_found(language: str, code: str) -> None:
    with pytest.raises((ValueError, SyntaxError, yaml.YAMLError)):
        check(language, code)


def test_what_a_console_answers_is_no_command() -> None:
    check("console", "$ embferry status\nhttp://127.0.0.1:8000 (ready")
