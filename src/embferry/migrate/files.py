"""Finds, reads and replaces the files to migrate."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .words import MENTIONS

PYTHON = frozenset({".py", ".pyi"})
TEXT = frozenset(
    {".sh", ".bash", ".zsh", ".ksh", ".fish", ".ps1", ".yaml", ".yml", ".md", ".rst", ".txt", ".json", ".toml", ".cfg"}
    | {".conf", ".ini", ".mk", ".j2", ".tf", ".service", ".env"}
    | {"Makefile", "Dockerfile", "Justfile", "Jenkinsfile", ".bashrc", ".bash_aliases", ".zshrc"}
)
SKIPPED_FOLDERS = frozenset(
    {".git", ".hg", ".svn", ".venv", "venv", "node_modules", "site-packages", "__pycache__", ".tox", ".nox", ".eggs"}
    | {".mypy_cache", ".ruff_cache", ".pytest_cache"}
)
MAX_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that could not be handled; its contents are unchanged."""

    path: Path
    reason: str


def find(paths: Iterable[Path], skipped: list[Skipped]) -> Iterator[Path]:
    """Yields every file to look at below the paths, each once.

    Links inside folders are not followed. A given path is followed, and a given file is included under any name.

    Args:
        paths: Files and folders.
        skipped: Receives the folders that cannot be read.
    """

    def unreadable(error: OSError) -> None:
        skipped.append(Skipped(Path(error.filename), error.strerror or str(error)))

    def below(folder: Path) -> Iterator[Path]:
        for here, folders, names in os.walk(folder, onerror=unreadable):
            folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
            files = [Path(here, name) for name in sorted(names)]
            yield from (file for file in files if file.is_file() and not file.is_symlink() and kind(file) is not None)

    seen: set[Path] = set()
    for path in paths:
        for file in [path] if path.is_file() else below(path):
            if (real := file.resolve()) not in seen:
                seen.add(real)
                yield file


def kind(path: Path) -> frozenset[str] | None:
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


def read(path: Path) -> bytes | Skipped | None:
    """Returns the contents of a file that mentions an old word; None if it mentions none."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as large:
                    found = MENTIONS.search(large)
                return Skipped(path, f"{size} bytes; the limit is {MAX_BYTES}") if found else None
            data = file.read()
    except OSError as error:
        return Skipped(path, error.strerror or str(error))
    if not MENTIONS.search(data):
        return None
    return Skipped(path, "it is not text in a known encoding") if b"\0" in data else data


def replace(path: Path, before: bytes, after: bytes) -> Skipped | None:
    """Replaces the contents of a file, all or nothing; its owner and mode stay. Returns the reason if it failed."""
    real = path.resolve()
    try:
        if real.read_bytes() != before:
            return Skipped(path, "it has changed meanwhile; run the command again")
        was = real.stat()
        handle, name = tempfile.mkstemp(prefix=f".{real.name}.", dir=real.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(after)
                os.fchown(file.fileno(), was.st_uid, was.st_gid)
                os.fchmod(file.fileno(), was.st_mode & 0o7777)
            os.replace(name, real)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        return Skipped(path, error.strerror or str(error))
    return None
