"""A report as plain data: tables of text, shown alike in the terminal, in Markdown and on the HTML page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import msgspec

from .results import Results

NONE = "–"
T = TypeVar("T")


class Row(msgspec.Struct, frozen=True):
    cells: tuple[str, ...]
    kind: str = ""
    """Selects the colour: ``ours``, ``engine``, ``peer``, ``limit``, ``good`` or ``bad``; ``error``, ``missing`` or
    ``skipped`` for a row that has a name and a reason instead of figures."""
    bar: tuple[float, float, float] | None = None
    """Length of the bar that the page draws, and both ends of its whisker, in a unit of the table."""

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

    @property
    def longest_bar(self) -> float:
        return max((max(row.bar) for row in self.rows if row.bar), default=0.0)


class Report(msgspec.Struct, frozen=True):
    """The first table answers the reader's question; facts about the run come after all tables but the folded ones."""

    verb: str
    """The command that measured it, such as ``bench transfer``."""
    title: str
    lead: str
    facts: list[tuple[str, str]]
    tables: list[Table]
    notes: list[str] = []
    problems: list[str] = []
    """Failures; the command ends with status 1 if there is one."""


def cells(columns: Mapping[str, Callable[[T], str]], of: T) -> tuple[str, ...]:
    return tuple(text(of) for text in columns.values())


def pairs(title: str, head: tuple[str, str], rows: Iterable[tuple[str, str]], note: str = "", kind: str = "") -> Table:
    return Table(title, head, tuple(Row(row, kind) for row in rows), note)


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
