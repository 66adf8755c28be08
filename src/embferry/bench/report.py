"""A report as plain data: tables of text, shown alike in the terminal, in Markdown and on the HTML page."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from .results import Results

NONE = "–"


class Row(msgspec.Struct, frozen=True):
    cells: tuple[str, ...]
    kind: str = ""
    """Selects the colour: ``ours``, ``engine``, ``peer``, ``limit``, ``good``, ``bad`` or ``faint``; ``error``,
    ``missing`` or ``skipped`` for a row that has a name and a reason instead of figures."""

    @property
    def failed(self) -> bool:
        return self.kind in ("error", "missing", "skipped")


class Table(msgspec.Struct, frozen=True):
    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""
    folded: bool = False
    """True for a table that few readers need: closed on the page, left out in the terminal."""


class Drawing(msgspec.Struct, frozen=True):
    title: str
    note: str
    svg: str


class Report(msgspec.Struct, frozen=True):
    """The first table answers the reader's question; facts about the run come after all tables but the folded ones."""

    verb: str
    """The command that measured it, such as ``bench transfer``."""
    title: str
    lead: str
    facts: list[tuple[str, str]]
    tables: list[Table]
    drawings: list[Drawing] = []
    notes: list[str] = []
    problems: list[str] = []
    """Failures; the command ends with status 1 if there is one."""

    @property
    def open_tables(self) -> list[Table]:
        return [table for table in self.tables if not table.folded]

    @property
    def folded_tables(self) -> list[Table]:
        return [table for table in self.tables if table.folded]


def facts(results: Results) -> list[tuple[str, str]]:
    """Returns when, where and with what versions the results were measured, and how busy the machine was."""
    m = results.machine
    found = [
        ("command", results.command),
        ("date", f"{results.started}, {results.took_s:.0f} s" + (", quick" if results.quick else "")),
        ("machine", f"{m.cpu}, {m.cores} cores, {m.memory_bytes / 1e9:.0f} GB, {m.kernel}"),
    ]
    if results.load_before and results.load_after:
        before, after = results.load_before, results.load_after
        words = f"{before[0]:.1f} in the minute before, {after[0]:.1f} in the last minute, on {m.cores} cores"
        warning = "; other work kept the machine busy, so measure again" if before[0] > m.cores / 2 else ""
        found.append(("load average", words + warning))
    found.append(("huge pages for shared memory", m.shmem_huge_pages or NONE))
    found.append(("versions", ", ".join(f"{name} {version}" for name, version in m.versions.items() if version)))
    if not results.complete:
        found.append(("incomplete", "the run was interrupted"))
    return found


def markdown(report: Report) -> str:
    """Returns the report as Markdown; all tables but the first are folded, so that a document stays readable."""
    parts = [f"### {table.title}\n\n{_body(table)}" for table in report.tables[:1]]
    parts.append(_list(f"{name}: {f'`{text}`' if name == 'command' else text}" for name, text in report.facts))
    if report.notes:
        parts.append("Notes:\n\n" + _list(report.notes))
    for table in report.tables[1:]:
        parts.append(f"<details><summary>{table.title}</summary>\n\n{_body(table)}\n</details>\n")
    return "\n".join(parts)


def write_markdown(report: Report, path: Path) -> None:
    """Replaces the text between two marker comments in the file at ``path``; creates the file if there is none.

    Raises:
        ValueError: the file exists and has no such comments.
    """
    begin = f"<!-- results: written by embferry {report.verb} --markdown; do not edit -->"
    end = "<!-- end of results -->"
    written = f"{begin}\n\n{markdown(report)}\n{end}\n"
    if path.exists():
        before, found, rest = path.read_text().partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"{path} has no place for results; add the lines {begin!r} and {end!r} where they belong")
        written = before + written.rstrip("\n") + after
    path.write_text(written)


def _body(table: Table) -> str:
    note = f"{table.note}\n\n" if table.note else ""
    columns = len(table.columns)
    lines = [_line(table.columns), "|" + "|".join(["---"] + ["---:"] * (columns - 1)) + "|"]
    lines += [_line(row.cells + ("",) * (columns - len(row.cells))) for row in table.rows]
    return note + "\n".join(lines) + "\n"


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _list(items: Iterable[str]) -> str:
    return "".join(f"- {item}\n" for item in items)
