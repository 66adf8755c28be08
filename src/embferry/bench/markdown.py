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
    return "\n".join(parts) + "\n\n" + "\n".join(_table(table) for table in tables(results))


def write(results: Results, path: Path) -> None:
    """Replaces what is between the two marks of ``path``, or makes the file if there is none.

    :raises ValueError: the file exists and lacks the marks."""
    written = f"{BEGIN}\n\n{text(results)}\n{END}\n"
    if path.exists():
        old = path.read_text()
        before, begin, rest = old.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise ValueError(f"{path} has no place for results; it needs the lines {BEGIN!r} and {END!r}")
        written = before + written.rstrip("\n") + after
    path.write_text(written)


def _table(table: Table) -> str:
    lines = [f"### {table.title}", ""]
    if table.note:
        lines += [f"{table.note[0].upper()}{table.note[1:]}.", ""]
    lines.append(_line(table.columns))
    lines.append("|" + "|".join(["---"] + ["---:"] * (len(table.columns) - 1)) + "|")
    lines += [_line(row.cells) for row in table.rows]
    return "\n".join(lines) + "\n"


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
