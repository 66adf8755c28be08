"""Finds the files to migrate, plans their changes, and applies them."""

from __future__ import annotations

import contextlib
import difflib
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from . import python, text, words
from .words import MENTIONS, RewriteError, is_of_system, split

PYTHON = split(".py .pyi")
TEXT = split("""
    .sh .bash .zsh .ksh .fish .ps1 .yaml .yml .md .rst .txt .json .toml .cfg .conf .ini .mk .j2 .tf .service .env
    Makefile Dockerfile Justfile Jenkinsfile .bashrc .bash_aliases .zshrc
    """)
SKIPPED_FOLDERS = split("""
    .git .hg .svn .venv venv node_modules site-packages __pycache__ .tox .nox .eggs .mypy_cache .ruff_cache
    .pytest_cache
    """)
MAX_BYTES = 4 << 20
REMAINS = f"{words.ROOT!r} in a file of the system; rewrite it yourself"


@dataclass(frozen=True, slots=True)
class Change:
    """A file with its present and its new contents."""

    path: Path
    before: bytes
    after: bytes

    @property
    def diff(self) -> str:
        """The unified diff; bytes that are not UTF-8 are shown escaped."""
        before, after = map(_lines, (self.before, self.after))
        name = str(self.path).lstrip("/")
        lines = difflib.unified_diff(before, after, f"a/{name}", f"b/{name}")
        return "".join(line if line.endswith("\n") else line + "\n\\ No newline at end of file\n" for line in lines)


@dataclass(slots=True)
class Plan:
    """The result of looking at some paths.

    Attributes:
        changes: The files to rewrite.
        doubtful: ``file:line: reason`` of every place that a person has to look at.
        left: ``file: reason`` of every file that could not be handled; their contents are unchanged.
        looked_at: The number of files looked at.
        remaining: Number of lines of the system's own files that would have the old root word after the changes. All
            are doubtful places.
    """

    changes: list[Change] = field(default_factory=list)
    doubtful: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    looked_at: int = 0
    remaining: int = 0


def plan(paths: Iterable[Path], assume: bool = False) -> Plan:
    """Returns the changes that every file below ``paths`` needs, and changes nothing.

    Args:
        paths: Files and folders. Links inside folders are not followed. A given path is followed, and a given file is
            included under any name.
        assume: Treat every file as one that uses the system.
    """
    made = Plan()
    found: dict[Path, Path] = {}
    for path in paths:
        for file in [path] if path.is_file() else _below(path, made.left):
            found.setdefault(file.resolve(), file)
    made.looked_at = len(found)
    own = {path.stem for path in found.values() if path.suffix in PYTHON}
    own |= {real.parent.name for real, path in found.items() if path.name == "__init__.py"}
    for path in found.values():
        with _listing(made.left, path):
            before = _read(path)
            if before is None:
                continue
            if _kind(path) is PYTHON:
                after, doubtful = python.rewrite(before, path, own, assume)
            else:
                # All that is rewritten is ASCII; bytes in any other encoding come out as they were.
                new, doubtful = text.rewrite(before.decode("utf-8", "surrogateescape"), assume)
                after = new.encode("utf-8", "surrogateescape")
            if after != before:
                made.changes.append(Change(path, before, after))
            left = _left_lines(after) if is_of_system(path) else []
            made.remaining += len(left)
            listed = {line for line, _ in doubtful}
            doubtful = sorted([*doubtful, *((line, REMAINS) for line in left if line not in listed)])
            made.doubtful += [f"{path}:{line}: {why}" if line else f"{path}: {why}" for line, why in doubtful]
    return made


def _left_lines(data: bytes) -> list[int]:
    """Returns the numbers of the lines that have the old root word."""
    return [number for number, line in enumerate(data.split(b"\n"), start=1) if words.ROOT.encode() in line.lower()]


def apply(made: Plan) -> list[str]:
    """Writes the changes; returns ``file: reason`` of the files that could not be written."""
    left: list[str] = []
    for change in made.changes:
        with _listing(left, change.path):
            _replace(change)
    return left


@contextlib.contextmanager
def _listing(left: list[str], path: Path) -> Iterator[None]:
    """Lists the file as left if the block cannot handle it."""
    try:
        yield
    except (RewriteError, OSError) as error:
        left.append(f"{path}: {getattr(error, 'strerror', None) or error}")


def _below(folder: Path, left: list[str]) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        left.append(f"{error.filename}: {error.strerror or error}")

    for here, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
        files = [Path(here, name) for name in sorted(names)]
        yield from (file for file in files if file.is_file() and not file.is_symlink() and _kind(file) is not None)


def _kind(path: Path) -> frozenset[str] | None:
    """Returns :data:`PYTHON`, :data:`TEXT`, or None for other files. Without a suffix, the first line decides."""
    for known in (PYTHON, TEXT):
        if not known.isdisjoint((path.suffix, path.name)):
            return known
    if path.suffix:
        return None
    try:
        with path.open("rb") as file:
            line = file.readline(200)
    except OSError:
        return TEXT  # reading it again reports the error
    return (PYTHON if b"python" in line else TEXT) if line.startswith(b"#!") else None


def _read(path: Path) -> bytes | None:
    """Returns the contents of a file that mentions an old word; None if it mentions none."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents:
            if not MENTIONS.search(contents):
                return None
            if size > MAX_BYTES:
                raise RewriteError(f"{size} bytes; the limit is {MAX_BYTES}")
            data = contents[:]
    if b"\0" in data:
        raise RewriteError("it is not text in a known encoding")
    return data


def _replace(change: Change) -> None:
    """Replaces the contents of a file, all or nothing; its owner and mode stay."""
    real = change.path.resolve()
    if real.read_bytes() != change.before:
        raise RewriteError("it has changed meanwhile; run the command again")
    was = real.stat()
    handle, name = tempfile.mkstemp(prefix=f".{real.name}.", dir=real.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(change.after)
            os.fchown(file.fileno(), was.st_uid, was.st_gid)
            os.fchmod(file.fileno(), was.st_mode & 0o7777)
        os.replace(name, real)
    except BaseException:
        os.unlink(name)
        raise


def _lines(data: bytes) -> list[str]:
    *lines, last = data.decode("utf-8", "backslashreplace").split("\n")  # splitlines() also splits at form feeds
    return [*(line + "\n" for line in lines), *([last] if last else [])]
