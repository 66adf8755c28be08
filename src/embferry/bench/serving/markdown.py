"""Results as Markdown, for the documents: generated, never typed."""

from __future__ import annotations

from pathlib import Path

from ..markdown import put, table_text
from .report import facts, notes, tables
from .results import Results

BEGIN = "<!-- results: written by embferry bench serve --markdown; do not edit -->"
END = "<!-- end of results -->"


def text(results: Results) -> str:
    """Facts as a list, one table after another, and what is to be noted."""
    parts = [f"- {name}: {f'`{what}`' if name == 'command' else what}" for name, what in facts(results)]
    written = "\n".join(parts) + "\n\n" + "\n".join(map(table_text, tables(results)))
    remarks = "".join(f"- {note}\n" for note in notes(results))
    return written + (f"\n### Notes\n\n{remarks}" if remarks else "")


def write(results: Results, path: Path) -> None:
    """Replaces what is between the two marks of ``path``, or makes the file if there is none.

    :raises ValueError: the file exists and lacks the marks."""
    put(text(results), path, BEGIN, END)
