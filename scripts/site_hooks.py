"""Hooks of MkDocs, so that the site shows the pages of ``docs/`` as GitHub does.

Pages link to files beside ``docs/``, which a site does not have: the two pages for contributors and each linked file
become part of the site. Markdown within ``<details>`` is read. Diagrams in Mermaid, which would be loaded from
elsewhere, are left out: the tables below them say the same. Commands without a prompt are not shown as output.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent

PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changes.md"}
"""Pages beside ``docs/``, and their names on the site."""

ALONE = ("index.md", "tutorial.md")
"""Pages that are a whole section, so that a list of the pages of their section would be empty."""

OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)")
FROM_ROOT = re.compile(r"\]\((?:docs/)?(?=[a-z-]+\.md)")
CODE_IN_ROW = re.compile(r"`[^`\n]+`")
SESSION = re.compile(r"^```console\n(?!\$ )", re.MULTILINE)
MERMAID = re.compile(r"^```mermaid\n.*?^```\n", re.DOTALL | re.MULTILINE)
ROLE = re.compile(r":(?:class|meth|func|mod|attr|data):<code>[~.]*(?:[a-z_]\w*\.)*((?:[A-Z]\w*\.)?\w+)</code>")
"""A reference in a docstring, as Sphinx writes it."""

PYTHON = """---
search: {{exclude: true}}
---
# `{path}`

````python
{text}````
"""


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that lie beside ``docs/``, and each file there that a page links to."""
    for source, name in PAGES.items():
        text = (ROOT / source).read_text("utf-8").replace("](CHANGELOG.md", "](changes.md")
        files.append(File.generated(config, name, content=FROM_ROOT.sub("](", text)))
    pages = [page.content_string for page in files.documentation_pages()]
    linked = {path for page in pages for path in OUTSIDE.findall(page) if path not in PAGES}
    for path in sorted(linked):
        file = ROOT / path
        if not file.is_file():  # the link remains as it is, and ends the build
            continue
        if file.suffix == ".py":
            content: str | bytes = PYTHON.format(path=path, text=file.read_text("utf-8"))
        else:
            content = file.read_bytes()
        files.append(File.generated(config, _on_site(path), content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Returns a page whose Markdown means the same to MkDocs as to GitHub."""
    markdown = OUTSIDE.sub(lambda match: f"]({_on_site(match[1])}", markdown)
    markdown = MERMAID.sub("", markdown).replace("<details>", '<details markdown="1">')
    markdown = SESSION.sub("```sh\n", markdown)
    if page.file.src_uri in ALONE:
        page.meta["hide"] = ["navigation"]
    lines = [
        CODE_IN_ROW.sub(lambda code: code[0].replace("\\|", "|"), line) if line.startswith("|") else line
        for line in markdown.split("\n")
    ]
    return "\n".join(lines)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Returns a page without the Sphinx roles of docstrings."""
    return ROLE.sub(r"<code>\1</code>", html)


def _on_site(path: str) -> str:
    """Returns the name on the site of a file beside ``docs/``."""
    return PAGES.get(path) or f"source/{path}{'.md' if path.endswith('.py') else ''}"
