"""Plans the changes of a migration, and applies them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from pathlib import Path

from . import files, python, text
from .files import Skipped
from .words import Rewritten


@dataclass(frozen=True, slots=True)
class Change:
    """A file with its present and its new contents."""

    path: Path
    before: bytes
    after: bytes
    encoding: str

    @property
    def diff(self) -> str:
        """The unified diff; bytes that are not text in the file's encoding are shown escaped."""
        before, after = (_lines(data, self.encoding) for data in (self.before, self.after))
        name = str(self.path).lstrip("/")
        lines = difflib.unified_diff(before, after, f"a/{name}", f"b/{name}")
        return "".join(line if line.endswith("\n") else line + "\n\\ No newline at end of file\n" for line in lines)


@dataclass(slots=True)
class Plan:
    """The result of looking at some paths.

    Attributes:
        changes: The files to rewrite.
        doubtful: ``file:line: reason`` of every place that a person has to look at.
        skipped: The files that could not be handled.
        looked_at: The number of files looked at.
    """

    changes: list[Change] = field(default_factory=list)
    doubtful: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    looked_at: int = 0


def plan(paths: Iterable[Path], assume: bool = False) -> Plan:
    """Returns the changes that every file below ``paths`` needs, and changes nothing.

    Args:
        paths: Files and folders.
        assume: Treat every file as one that uses the system.
    """
    made = Plan()
    found = list(files.find(paths, made.skipped))
    made.looked_at = len(found)
    own = {path.stem for path in found if path.suffix in files.PYTHON}
    own |= {path.resolve().parent.name for path in found if path.name == "__init__.py"}
    for path in found:
        match files.read(path):
            case Skipped() as skipped:
                made.skipped.append(skipped)
            case bytes(before):
                _add(made, path, before, own, assume)
    return made


def apply(made: Plan) -> list[Skipped]:
    """Writes the changes; returns the files that could not be written."""
    outcomes = [files.replace(change.path, change.before, change.after) for change in made.changes]
    return [skipped for skipped in outcomes if skipped is not None]


def _add(made: Plan, path: Path, before: bytes, own: Set[str], assume: bool) -> None:
    try:
        is_python = files.kind(path) is files.PYTHON
        after = python.rewrite(before, path, own, assume) if is_python else _rewrite_text(before, assume)
    except python.ParseError as error:
        made.skipped.append(Skipped(path, str(error)))
        return
    if after.data != before:
        made.changes.append(Change(path, before, after.data, after.encoding))
    made.doubtful += [f"{path}:{line}: {why}" if line else f"{path}: {why}" for line, why in after.doubtful]


def _rewrite_text(data: bytes, assume: bool) -> Rewritten:
    # All that is rewritten is ASCII; bytes in any other encoding come out as they were.
    new, doubtful = text.rewrite(data.decode("utf-8", "surrogateescape"), assume)
    return Rewritten(new.encode("utf-8", "surrogateescape"), doubtful)


def _lines(data: bytes, encoding: str) -> list[str]:
    *lines, last = data.decode(encoding, "backslashreplace").split("\n")  # splitlines() also splits at form feeds
    return [*(line + "\n" for line in lines), *([last] if last else [])]
