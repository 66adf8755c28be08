"""Paths in, changes out: what would change, as data and as a diff."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from . import files, python, text
from .files import Found, Left


@dataclass(frozen=True, slots=True)
class Change:
    """A file and what it becomes."""

    found: Found
    data: bytes
    encoding: str

    @property
    def diff(self) -> str:
        """The unified diff; bytes that are no text in the file's encoding are shown escaped."""
        before, after = (_lines(data, self.encoding) for data in (self.found.data, self.data))
        name = str(self.found.path)
        return "".join(_ended(difflib.unified_diff(before, after, f"a/{name.lstrip('/')}", f"b/{name.lstrip('/')}")))


@dataclass(slots=True)
class Plan:
    """What a migration of some paths would do."""

    changes: list[Change] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """``file:line: sentence``: old names that are left alone, and why."""
    looked_at: int = 0


def plan(paths: Iterable[Path], assume: bool = False, progress: Callable[[int], None] = lambda looked_at: None) -> Plan:
    """Looks at every file below ``paths``; changes nothing.

    :param assume: take it that every file has to do with the system.
    :param progress: told how many files have been looked at.
    """
    made = Plan()
    found = list(files.walk(paths, made.left))
    own = files.own_modules(found)
    for path in found:
        made.looked_at += 1
        progress(made.looked_at)
        file = files.look(path)
        if isinstance(file, Left):
            made.left.append(file)
        elif file is not None:
            _consider(file, own, assume, made)
    return made


def apply(made: Plan) -> list[Left]:
    """Writes the changes; says which could not be written."""
    return [left for change in made.changes if (left := files.replace(change.found, change.data)) is not None]


def _consider(file: Found, own: frozenset[str], assume: bool, made: Plan) -> None:
    try:
        rewritten = python.rewrite(file.data, file.path, own, assume) if file.is_python else _text(file.data, assume)
    except python.ParseError as error:
        made.left.append(Left(file.path, str(error)))
        return
    if rewritten.data != file.data:
        made.changes.append(Change(file, rewritten.data, rewritten.encoding))
    for line, sentence in rewritten.notes:
        made.notes.append(f"{file.path}:{line}: {sentence}" if line else f"{file.path}: {sentence}")


def _text(data: bytes, assume: bool) -> python.Rewritten:
    # What is rewritten is ASCII; any other bytes come out as they went in.
    before = data.decode("utf-8", "surrogateescape")
    return python.Rewritten(text.rewrite(before, assume).encode("utf-8", "surrogateescape"))


def _lines(data: bytes, encoding: str) -> list[str]:
    *lines, last = data.decode(encoding, "backslashreplace").split("\n")  # splitlines() also splits at form feeds
    return [*(line + "\n" for line in lines), *([last] if last else [])]


def _ended(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        yield line if line.endswith("\n") else line + "\n\\ No newline at end of file\n"
