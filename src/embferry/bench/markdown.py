"""Results as Markdown, for the documents: generated, never typed."""

from __future__ import annotations

from pathlib import Path

from .report import Table, facts, tables
from .results import Results

BEGIN = "<!-- results: written by embferry bench transfer --markdown; do not edit -->"
END = "<!-- end of results -->"


def text(results: Results) -> str:
    """Facts as a list, then one table after another."""
    parts = [f"- {name}: {f'`{what}`' if name == 'command' else what}" for name, what in facts(results)]
    return "\n".join(parts) + "\n\n" + "\n".join(map(table_text, tables(results)))


def write(results: Results, path: Path) -> None:
    """Replaces what is between the two marks of ``path``, or makes the file if there is none.

    :raises ValueError: the file exists and lacks the marks."""
    put(text(results), path, BEGIN, END)


def put(generated: str, path: Path, begin: str, end: str) -> None:
    """Replaces what is between two marks of ``path``, or makes the file if there is none.

    :raises ValueError: the file exists and lacks the marks."""
    written = f"{begin}\n\n{generated}\n{end}\n"
    if path.exists():
        old = path.read_text()
        before, found, rest = old.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"{path} has no place for results; it needs the lines {begin!r} and {end!r}")
        written = before + written.rstrip("\n") + after
    path.write_text(written)


def table_text(table: Table) -> str:
    """One table, with its title."""
    lines = [f"### {table.title}", ""]
    if table.note:
        lines += [f"{table.note[0].upper()}{table.note[1:]}.", ""]
    lines.append(_line(table.columns))
    lines.append("|" + "|".join(["---"] + ["---:"] * (len(table.columns) - 1)) + "|")
    lines += [_line(row.cells) for row in table.rows]
    return "\n".join(lines) + "\n"


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
